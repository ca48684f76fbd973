"""`tailor demo`: what this is, in minutes, with no download."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from tailor.cli.output import AsJson, Quiet, draw, emit, say
from tailor.data.progress import stages

if TYPE_CHECKING:
    from rich.console import Console

    from tailor.recipes.demo import Demo

app = typer.Typer(add_completion=False)


@app.command()
def demo(
    technique: Annotated[list[str] | None, typer.Option("--technique", "-t", help="Only these techniques.")] = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Compare every technique on sample support tickets, with the embedded base, in minutes."""
    from tailor.recipes.demo import TECHNIQUES
    from tailor.recipes.demo import demo as run_demo

    for name in technique or ():
        if name not in TECHNIQUES:
            raise typer.BadParameter(f"the demo has no technique {name!r}; choices: {', '.join(TECHNIQUES)}")
    started = time.perf_counter()
    if not quiet:
        say("support tickets of a shop: which queue, and what to reply? base: tailor-nano (7 M parameters)")
    with stages(quiet) as progress:
        tell = (lambda text: None) if quiet else say
        result = run_demo(tuple(technique or TECHNIQUES), progress=progress, say=tell)
    emit(
        {**result.result.report, "folder": str(result.result.folder)}, as_json, lambda console: _render(console, result)
    )
    if not as_json:
        say(f"{time.perf_counter() - started:.0f} s in all")


def _render(console: Console, result: Demo) -> None:
    from rich.text import Text

    from tailor.evaluation.drawing.terminal import render_comparison

    draw(console, render_comparison(result.result.report))
    for shown in result.shown:
        console.print(Text.assemble("\n", ("ticket", "bold"), "  ", shown.ticket), soft_wrap=True)
        for label, answer in (("before", shown.before), (f"after ({result.best})", shown.after)):
            console.print(Text.assemble("  ", (label, "dim"), "  ", answer.replace("\n", " · ")), soft_wrap=True)
    console.print(f"\nreport: {result.result.folder / 'report.html'}", soft_wrap=True)
    if result.best not in (None, "base"):
        name = f"demo-{str(result.best).replace('_', '-')}"
        console.print("next:")
        console.print(f'  tailor generate {name} "My parcel never came, order FW-20817."')
        console.print(f"  tailor verify {name}")
    console.print("  tailor data check YOUR.jsonl")
    console.print("  tailor compare YOUR.jsonl --sizes 64,all")
