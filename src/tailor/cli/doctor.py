"""`tailor doctor`: is this machine ready, and what to do where it is not."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from tailor.cli.output import AsJson, emit

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(add_completion=False)

COLOURS = {"PASS": "green", "WARN": "yellow", "FAIL": "bold red"}


@app.command()
def doctor(
    base: Annotated[
        str | None, typer.Option("--base", "-b", help="Check this base's tokenizer and template too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check Python, torch, packages, folders and the embedded base. Exit code 1 when something fails."""
    from rich.text import Text

    from tailor.recipes.doctor import doctor as run_doctor

    found = run_doctor(base)
    counts = {status: sum(one.status == status for one in found) for status in COLOURS}

    def render(console: Console) -> None:
        topic = ""
        for one in found:
            if one.topic != topic:
                topic = one.topic
                console.print(Text(topic), style="bold", soft_wrap=True)
            line = Text.assemble("  ", (one.status, COLOURS[one.status]), f"  {one.name}: {one.detail}")
            console.print(line, soft_wrap=True)
            if one.fix:
                console.print(Text(f"        fix: {one.fix}"), soft_wrap=True)
        console.print(", ".join(f"{count} {status}" for status, count in counts.items()))

    emit({"counts": counts, "checks": [asdict(one) for one in found]}, as_json, render)
    if counts["FAIL"]:
        raise typer.Exit(1)
