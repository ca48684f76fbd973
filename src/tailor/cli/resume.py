"""`tailor resume`: go on with an interrupted run or comparison."""

from __future__ import annotations

from typing import Annotated

import typer

from tailor.cli.output import AsJson, Quiet, say
from tailor.cli.tune import show
from tailor.data.progress import stages

app = typer.Typer(add_completion=False)


@app.command()
def resume(
    run: Annotated[
        str, typer.Argument(help="The run's name, its artifact's name (its latest run), its folder, or a comparison.")
    ],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Go on with an interrupted or killed run or comparison, to the result it would have had."""
    from tailor.recipes.compare import known, resume_comparison, unfinished
    from tailor.recipes.tune import resume as run_resume

    if run not in unfinished() and (run not in known() or _is_run(run)):  # a finished comparison is shown
        show(run_resume(run, quiet=quiet), as_json)
        return
    from tailor.cli.compare import show as show_comparison

    with stages(quiet) as progress:
        result = resume_comparison(run, progress=progress, say=(lambda text: None) if quiet else say)
    show_comparison(result, as_json)
    result.check()


def _is_run(name: str) -> bool:
    from tailor.errors import NotFoundError
    from tailor.runs import Run

    try:
        Run.open(name)
    except NotFoundError:
        return False
    return True
