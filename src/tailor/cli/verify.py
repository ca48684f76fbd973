"""`tailor verify`: proof that what was trained is what is served."""

from __future__ import annotations

from typing import Annotated

import typer

from tailor.cli.output import AsJson, BaseOf, CompareOn, Device, Dtype, Task, draw, emit

app = typer.Typer(add_completion=False)


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="An artifact.")],
    data: CompareOn = None,
    base: BaseOf = None,
    num_rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 8,
    task: Task = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare token logprobs between trainer, cached generation, reloaded artifact, merged weights and PEFT export.

    Prints the noise floor and each hop's largest difference; exit code 9 when a hop is off.
    """
    from tailor.evaluation.report import render as render_report
    from tailor.recipes.verify import verify as run_verify

    parity = run_verify(name, data=data, base=base, num_rows=num_rows, task=task, device=device, dtype=dtype)

    emit({"artifact": name, **parity.to_dict()}, as_json, lambda console: draw(console, render_report(parity)))
    parity.check()
