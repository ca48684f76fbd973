"""`tailor resume`: go on with interrupted runs, a comparison, a sweep or a prompt search."""

from __future__ import annotations

from typing import Annotated

import typer

from tailor.cli.output import AsJson, Quiet, say
from tailor.cli.tune import show, show_many
from tailor.data.progress import stages

app = typer.Typer(add_completion=False)


@app.command()
def resume(
    names: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME...",
            help="A run's name, its artifact's name (its latest run), its folder, a comparison, a sweep or a "
            "prompt search. Several runs, or the name of a group that was started together, go on in the same passes.",
        ),
    ],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Go on with an interrupted or killed run or comparison, to the result it would have had."""
    from tailor.recipes.compare import known, resume_comparison, unfinished
    from tailor.recipes.prompt_optimize import known as prompts
    from tailor.recipes.sweep import known as sweeps

    if len(names) > 1:
        _runs(names, as_json=as_json, quiet=quiet)
        return
    run = names[0]
    if run in sweeps() and run not in unfinished():
        _sweep(run, as_json=as_json, quiet=quiet)
        return
    if run in prompts() and run not in unfinished():
        _prompt(run, as_json=as_json, quiet=quiet)
        return
    if run not in unfinished() and (run not in known() or _is_run(run)):  # a finished comparison is shown
        _runs([run], as_json=as_json, quiet=quiet)
        return
    from tailor.cli.compare import show as show_comparison

    with stages(quiet) as progress:
        result = resume_comparison(run, progress=progress, say=(lambda text: None) if quiet else say)
    show_comparison(result, as_json)
    result.check()


def _runs(names: list[str], *, as_json: bool, quiet: bool) -> None:
    from tailor.recipes.tune import resume as resume_run
    from tailor.recipes.tune_together import resume_many, runs_of

    folders = [run.folder for run in runs_of(names)]
    if len(folders) == 1:
        show(resume_run(folders[0], quiet=quiet), as_json)
    else:
        show_many(resume_many(folders, quiet=quiet), as_json)


def _sweep(name: str, *, as_json: bool, quiet: bool) -> None:
    from tailor.cli.sweep import show as show_sweep
    from tailor.recipes.sweep import resume_sweep

    with stages(quiet) as progress:
        result = resume_sweep(name, progress=progress, say=(lambda text: None) if quiet else say)
    show_sweep(result, as_json)
    result.check()


def _prompt(name: str, *, as_json: bool, quiet: bool) -> None:
    from tailor.cli.prompt import show_search
    from tailor.recipes.prompt_optimize import resume_prompt

    with stages(quiet) as progress:
        result = resume_prompt(name, progress=progress, say=(lambda text: None) if quiet else say)
    show_search(result, as_json)


def _is_run(name: str) -> bool:
    from tailor.errors import NotFoundError
    from tailor.recipes.tune_together import runs_of

    try:
        runs_of([name])
    except NotFoundError:
        return False
    return True
