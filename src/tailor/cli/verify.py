"""`tailor verify`: proof that what was trained is what is served."""

from __future__ import annotations

from typing import Annotated

import typer

from tailor.cli.output import AsJson, Device, Dtype, emit

app = typer.Typer(add_completion=False)


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="An artifact.")],
    data: Annotated[
        str | None, typer.Option("--data", help="Rows to compare on; the run's held-out rows when not given.")
    ] = None,
    num_rows: Annotated[int, typer.Option(min=1, help="How many rows.")] = 8,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> None:
    """Compare token logprobs between trainer, cached generation, reloaded artifact, merged weights and PEFT export.

    Prints the noise floor and each hop's largest difference; exit code 9 when a hop is off.
    """
    from rich.console import Console

    from tailor.evaluation.report import render as render_report
    from tailor.recipes.verify import verify as run_verify

    parity = run_verify(name, data=data, num_rows=num_rows, device=device, dtype=dtype)

    def render(console: Console) -> None:
        console.print(render_report(parity))

    emit({"artifact": name, **parity.to_dict()}, as_json, render)
    parity.check()
