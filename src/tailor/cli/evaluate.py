"""`tailor eval`: scores with intervals on rows the model has not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tailor.cli.output import AsJson, Columns, Device, Dtype, Quiet, emit, pairs, say, stages

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
    skip_bad_rows: Annotated[
        bool, typer.Option("--skip-bad-rows", help="Go on without rows that cannot be used.")
    ] = False,
    minimum: Annotated[
        list[str] | None, typer.Option("--min", help="A gate, e.g. accuracy=0.8; exit code 9 below it.")
    ] = None,
    rows: Annotated[Path | None, typer.Option("--rows", help="Write every row's result here (JSONL).")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Generate and score every row; metrics follow from the kind of task, each with a bootstrap interval."""
    from tailor.data.dataset import ReadSettings
    from tailor.evaluation.evaluate import EvalSettings
    from tailor.evaluation.report import render as render_report
    from tailor.inference.backend import SamplingParams
    from tailor.recipes.evaluate import check_gates
    from tailor.recipes.evaluate import evaluate as run_evaluate

    settings = EvalSettings(
        metrics=tuple(metrics) if metrics else "auto",
        answer_pattern=answer_pattern,
        max_rows=max_rows,
        sampling=SamplingParams(max_new_tokens=max_new_tokens) if max_new_tokens else None,
    )
    gates = {key: float(value) for key, value in pairs(minimum, "--min").items()}
    with stages(quiet) as progress:
        evaluation = run_evaluate(
            name,
            data,
            progress=progress,
            settings=settings,
            reading=ReadSettings(format=format, columns=pairs(columns, "--columns"), skip_bad_rows=skip_bad_rows),
            device=device,
            dtype=dtype,
        )
    if rows is not None:
        evaluation.write(rows)
        say(f"rows: {rows}")
    emit({"name": name, **evaluation.to_dict()}, as_json, lambda console: console.print(render_report(evaluation)))
    check_gates(evaluation, gates)
