"""`tailor plan`: does it fit, how long will it take, what will it write, before anything is loaded."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from tailor.cli.output import AsJson, Columns, Device, Dtype, emit, say
from tailor.cli.tune import Base, Overrides, Source, Technique, Validation, recipe_from

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from tailor.recipes.plan import RunPlan

app = typer.Typer(add_completion=False)

UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
STYLES = {"fits": "bold green", "tight": "bold yellow", "does not fit": "bold red"}


@app.command()
def plan(
    source: Source,
    overrides: Overrides = None,
    technique: Technique = None,
    base: Base = None,
    validation: Validation = None,
    columns: Columns = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory: Annotated[
        str | None, typer.Option("--memory", help="Plan for a machine with so much free memory, e.g. 8GiB.")
    ] = None,
    measure: Annotated[bool, typer.Option(help="Measure this machine's speed, which takes a few seconds.")] = True,
    as_json: AsJson = False,
) -> None:
    """Memory, time and disk of a tuning run, and whether it fits. Nothing of the base's weights is loaded.

    Takes what `tailor tune` takes. Exit code 5, with what would help, when it does not fit.
    """
    from tailor.recipes.plan import plan as run_plan

    given = {
        "technique": technique,
        "base.name": base,
        "data.validation": validation,
        "base.device": device if device != "auto" else None,
        "base.dtype": dtype if dtype != "auto" else None,
    }
    free = None if memory is None else num_bytes(memory)
    recipe = recipe_from(source, given, columns, overrides or ())
    found = run_plan(recipe, memory=free, measure=measure)
    for note in found.notes:
        say(f"note: {note}")
    emit(found.to_dict(), as_json, lambda console: _show(found, console))
    found.check()


def num_bytes(text: str) -> int:
    """`8GiB`, `8G`, `512 MB` or a plain number as bytes. Raises a usage error for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", text, re.IGNORECASE)
    factor = (UNITS | BINARY_UNITS).get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise typer.BadParameter(f"--memory wants a size such as 8GiB or 24G, got {text!r}")
    return int(float(match[1]) * factor)


def _show(found: RunPlan, console: Console) -> None:
    from tailor.evaluation.drawing.quantities import count, size
    from tailor.models.base import dtype_name
    from tailor.recipes.plan import MEMORY_ERROR

    sketch, estimate = found.sketch, found.estimate
    kind = "+".join(technique.type for technique in sketch.techniques)
    dtype = dtype_name(sketch.base.dtype)
    console.print(f"{kind} on {sketch.recipe.base.name}", style="bold", soft_wrap=True)
    trained = sketch.slot.num_parameters
    share = f" ({trained / sketch.base.num_parameters:.2%})" if trained else ""
    parameters = f"{count(sketch.base.num_parameters)} parameters, {count(trained)} trained{share}"
    console.print(f"{parameters}, {dtype} on {sketch.device}", soft_wrap=True)
    _show_work(found, console)
    console.print(_memory_table(found))
    if estimate.needs.on_gpu:
        console.print(f"main memory: {size(estimate.host)} of {_or_unknown(found.room.host)} free", soft_wrap=True)
    _show_disk(found, console)
    about = f"about {size(estimate.peak.bytes)} (±{MEMORY_ERROR:.0%}) at the highest, in {estimate.peak.name}"
    told = f"{found.verdict}: {about}; {_or_unknown(found.room.memory)} free"
    console.print(told, style=STYLES.get(found.verdict), soft_wrap=True)


def _memory_table(found: RunPlan) -> Table:
    """A column per moment of the run."""
    from rich.table import Table

    from tailor.evaluation.drawing.quantities import size

    moments, peak = found.estimate.moments, found.estimate.peak
    held = [{component.name: component.bytes for component in moment.components} for moment in moments]
    table = Table("memory")
    for moment in moments:
        table.add_column(moment.name, justify="right", style="bold" if moment is peak else None)
    for name in dict.fromkeys(name for one in held for name in one):
        table.add_row(name, *(size(one[name]) if one.get(name) else "" for one in held))
    table.add_section()
    table.add_row("sum", *(size(moment.bytes) for moment in moments))
    return table


def _show_work(found: RunPlan, console: Console) -> None:
    from tailor.evaluation.drawing.quantities import count, duration, operations
    from tailor.recipes.plan import SECONDS_ERROR

    sketch, work, resolved = found.sketch, found.estimate.work, found.sketch.resolved
    about = "about " if sketch.sampled else ""
    rows = f"{about}{sketch.num_train:,} rows to train on, {about}{sketch.num_validation:,} set aside"
    if work is None or resolved is None:
        console.print(f"{rows}; nothing is trained", soft_wrap=True)
        return
    steps = f"{resolved.num_steps:,} steps of {resolved.batch_size} rows"
    console.print(f"{rows}; {steps}, {count(work.num_tokens)} tokens, {operations(found.flops)}", soft_wrap=True)
    if found.seconds is not None:
        told = f"about {duration(found.seconds)} (±{SECONDS_ERROR:.0%})"
        console.print(f"time: {told} of training with validation on this machine, as busy as it is now", soft_wrap=True)


def _show_disk(found: RunPlan, console: Console) -> None:
    from tailor.evaluation.drawing.quantities import size

    disk = found.estimate.disk
    parts = {
        "download": disk.download,
        "artifact": disk.artifact,
        "checkpoint": disk.checkpoint,
        "while it runs": disk.temporary,
    }
    told = ", ".join(f"{name} {size(part)}" for name, part in parts.items() if part)
    console.print(f"disk: {told or 'next to nothing'}; {size(found.room.disk)} free", soft_wrap=True)


def _or_unknown(value: int | None) -> str:
    from tailor.evaluation.drawing.quantities import size

    return "unknown" if value is None else size(value)
