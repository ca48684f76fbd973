"""`tailor resume`: go on with an interrupted run."""

from __future__ import annotations

from typing import Annotated

import typer

from tailor.cli.output import AsJson, Quiet
from tailor.cli.tune import show

app = typer.Typer(add_completion=False)


@app.command()
def resume(
    run: Annotated[str, typer.Argument(help="The run's name, its artifact's name (its latest run), or its folder.")],
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Go on with an interrupted or killed run, to the result it would have had."""
    from tailor.recipes.tune import resume as run_resume

    show(run_resume(run, quiet=quiet), as_json)
