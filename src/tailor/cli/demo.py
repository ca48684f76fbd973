"""`tailor demo`: what this is, in three minutes, with no download."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailor.cli.output import AsJson, Quiet, emit, say

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
    """Tune the embedded base on sample support tickets with every technique, and compare them on held-out ones."""
    from tailor.recipes.demo import TECHNIQUES
    from tailor.recipes.demo import demo as run_demo

    for name in technique or ():
        if name not in TECHNIQUES:
            raise typer.BadParameter(f"the demo has no technique {name!r}; choices: {', '.join(TECHNIQUES)}")
    started = time.perf_counter()
    result = run_demo((lambda text: None) if quiet else say, techniques=tuple(technique or TECHNIQUES), quiet=quiet)
    rows = [
        {
            "technique": row.name,
            "metrics": row.evaluation.to_dict()["metrics"],
            "num_parameters": row.num_parameters,
            "seconds": round(row.seconds, 1),
        }
        for row in result.rows
    ]
    emit({"rows": rows, "held_out": str(result.held_out)}, as_json, lambda console: _render(console, result))
    if not as_json:
        say(f"{time.perf_counter() - started:.0f} s in all")


def _render(console: Console, result: Demo) -> None:
    from rich.table import Table
    from rich.text import Text

    base = result.rows[0]
    table = Table(title="Fernway support tickets: queue and reply, on held-out tickets", title_justify="left")
    table.add_column("technique")
    for header in ("queue written", "queue chosen of six", "ROUGE-L", "perplexity", "trained parameters", "time"):
        table.add_column(header, justify="right")
    for row in result.rows:
        scores: dict[str, Any] = row.evaluation.metrics
        table.add_row(
            row.name,
            _with_interval(scores["accuracy"]),
            _with_interval(scores["label_accuracy"]),
            f"{scores['rougeL'].mean:.2f}",
            f"{scores['perplexity'].mean:.1f}",
            f"{row.num_parameters:,}",
            f"{row.seconds:.0f} s",
            style="bold" if row is result.best else None,
        )
    console.print(table)
    console.print("shares of held-out tickets with the right queue, and their 95 % intervals")
    best = result.best
    for k in result.shown:
        console.print(Text.assemble("\n", ("ticket", "bold"), "  ", best.evaluation.rows[k].prompt), soft_wrap=True)
        for label, row in (("before", base), (f"after ({best.name})", best)):
            answer = str(row.evaluation.rows[k].completion).replace("\n", " · ")
            console.print(Text.assemble("  ", (label, "dim"), "  ", answer), soft_wrap=True)
    name = f"demo-{best.name.replace('_', '-')}"
    console.print("\nnext:")
    console.print(f'  tailor generate {name} "My parcel never came, order FW-20817."')
    console.print(f"  tailor verify {name}")
    console.print("  tailor data check YOUR.jsonl")
    console.print("  tailor tune YOUR.jsonl --technique lora --name mine")


def _with_interval(score: Any) -> str:
    return f"{score.mean:.2f} [{score.low:.2f}, {score.high:.2f}]"
