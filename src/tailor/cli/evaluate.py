"""`tailor eval`: scores with intervals on rows the model has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailor.cli.output import (
    AsJson,
    BaseOf,
    Columns,
    Device,
    Dtype,
    Quantize,
    Quiet,
    SkipBadRows,
    Task,
    draw,
    emit,
    numbers,
    pairs,
    say,
)
from tailor.data.progress import stages

app = typer.Typer(add_completion=False)


@app.command()
def evaluate(
    name: Annotated[str, typer.Argument(help="An artifact or a base.")],
    data: Annotated[str, typer.Argument(help="A file of rows.")],
    metrics: Annotated[
        list[str] | None, typer.Option("--metric", "-m", help="A metric by name; by the kind of task when none.")
    ] = None,
    answer_pattern: Annotated[
        str | None, typer.Option("--answer-pattern", help="Regular expression whose first group is the answer.")
    ] = None,
    max_rows: Annotated[int | None, typer.Option("--max-rows", min=1, help="Draw this many rows.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer; from the references when not given.")
    ] = None,
    columns: Columns = None,
    format: Annotated[str, typer.Option("--format", help="auto, or a format of docs/formats.md.")] = "auto",
    skip_bad_rows: SkipBadRows = False,
    minimum: Annotated[
        list[str] | None, typer.Option("--min", help="A gate, e.g. accuracy=0.8; exit code 9 below it.")
    ] = None,
    maximum: Annotated[
        list[str] | None, typer.Option("--max", help="The same where lower is better, e.g. perplexity=20.")
    ] = None,
    rows: Annotated[Path | None, typer.Option("--rows", help="Write every row's result here (JSONL).")] = None,
    task: Task = None,
    base: BaseOf = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Generate and score every row; metrics follow from the kind of task, each with a bootstrap interval."""
    from tailor.data.dataset import ReadSettings
    from tailor.evaluation.evaluate import EvalSettings
    from tailor.evaluation.report import render as render_report
    from tailor.inference.backend import SamplingParams
    from tailor.inference.load import load
    from tailor.recipes.evaluate import Gates
    from tailor.recipes.evaluate import evaluate as run_evaluate

    settings = EvalSettings(
        metrics=tuple(metrics) if metrics else "auto",
        answer_pattern=answer_pattern,
        max_rows=max_rows,
        sampling=SamplingParams(max_new_tokens=max_new_tokens) if max_new_tokens else None,
    )
    reading = ReadSettings(format=format, columns=pairs(columns, "--columns"), skip_bad_rows=skip_bad_rows)
    gates = Gates(numbers(minimum, "--min"), numbers(maximum, "--max"))
    gates.check_names(settings.metrics)
    with stages(quiet) as progress:
        customized = load(name, base, task=task, device=device, dtype=dtype, quantize=quantize)
        evaluation = run_evaluate(customized, data, settings=settings, reading=reading, progress=progress)
    if rows is not None:
        evaluation.write(rows)
        say(f"rows: {rows}")
    emit({"name": name, **evaluation.to_dict()}, as_json, lambda console: draw(console, render_report(evaluation)))
    gates.check(evaluation)
