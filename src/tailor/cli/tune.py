"""`tailor tune`: rows in, a working customization out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailor.cli.output import AsJson, Columns, Device, Dtype, Quiet, emit, pairs, say

if TYPE_CHECKING:
    from tailor.recipes.tune import TuneRecipe

Source = Annotated[str, typer.Argument(help="A data file, or a recipe (.yaml).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings, e.g. technique.rank=8 train.num_epochs=3 ~data.validation")
]
Technique = Annotated[str | None, typer.Option("--technique", "-t", help="Technique for a data file.")]
Base = Annotated[str | None, typer.Option("--base", "-b", help="tailor-nano, a local folder, or a hub id.")]
Validation = Annotated[str | None, typer.Option("--validation", help="A validation file; else 10 % is set aside.")]

app = typer.Typer(add_completion=False)


@app.command()
def tune(
    source: Source,
    overrides: Overrides = None,
    technique: Technique = None,
    base: Base = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="The artifact's name.")] = None,
    validation: Validation = None,
    columns: Columns = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact of that name.")] = False,
    verify: Annotated[bool, typer.Option(help="Prove at the end that what was trained is what is served.")] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tune a base on your rows and save the result under a name.

    Ctrl-C saves a checkpoint; `tailor resume` goes on. Every setting has a default measured for the technique.
    """
    from tailor.recipes.tune import tune as run_tune

    given = {
        "technique": technique,
        "base.name": base,
        "data.validation": validation,
        "output.name": name,
        "base.device": device if device != "auto" else None,
        "base.dtype": dtype if dtype != "auto" else None,
        "output.force": "true" if force else None,
        "output.verify": None if verify else "false",
    }
    recipe = recipe_from(source, given, columns, overrides or ())
    show(run_tune(recipe, quiet=quiet), as_json)


def recipe_from(
    source: str, given: Mapping[str, str | None], columns: list[str] | None, overrides: Sequence[str]
) -> TuneRecipe:
    """The recipe of that name, or one for a data file, with the flags that were `given` and then the overrides."""
    from tailor.config import load_recipe
    from tailor.recipes.tune import TuneRecipe

    flags = [f"{key}={value}" for key, value in given.items() if value is not None]
    flags += [f"data.columns.{ours}={theirs}" for ours, theirs in pairs(columns, "--columns").items()]
    is_recipe = source.endswith((".yaml", ".yml"))
    defaults: dict[str, Any] = {}
    if not is_recipe:
        stem = Path(source).name.split(".")[0] or "data"
        kind = given["technique"] or "lora"
        defaults = {"data": {"train": source}, "technique": kind, "output": {"name": f"{stem}-{kind}"}}
    return load_recipe(source if is_recipe else None, TuneRecipe, [*flags, *overrides], defaults).recipe


def show(result: Any, as_json: bool) -> None:
    """Print what a finished run came to. Raises QualityError when the artifact failed its parity check."""
    from rich.console import Console

    from tailor.errors import QualityError

    artifact = result.artifact
    facts = artifact.manifest
    metrics, parity = facts.get("metrics", {}), facts.get("parity")

    def render(console: Console) -> None:
        line = partial(console.print, soft_wrap=True)
        line(artifact.name, style="bold")
        line(f"{artifact.kind} on {facts['base']['name']}, saved in {artifact.folder}")
        line(f"rows: {facts['data']['num_train']} trained, {facts['data']['num_validation']} set aside")
        line(f"trainable parameters: {facts['num_parameters']:,}")
        if metrics:
            stopped = f" ({metrics['stopped']})" if metrics["stopped"] else ""
            line(f"steps: {metrics['num_steps']}{stopped}, best at {metrics['best_step']}")
            if metrics["validation_loss"] is not None:
                line(f"validation loss: {metrics['validation_loss']:.4f}")
            line(f"time: {metrics['seconds']:.1f} s, peak memory {metrics['peak_memory'] / 2**30:.2f} GiB")
        if parity and parity["passed"] is None:
            line(f"parity: could not be checked ({parity['error']}); try `tailor verify {artifact.name}`")
        elif parity:
            hops = ", ".join(hop["name"] for hop in parity["hops"])
            floor = "none" if parity["noise_floor"] is None else f"{parity['noise_floor']:.1e}"
            line(f"parity: {'passed' if parity['passed'] else 'FAILED'} ({hops}); noise {floor}")

    for note in facts.get("notes", []):
        say(f"note: {note}")
    emit({"artifact": artifact.name, "folder": str(artifact.folder), **facts}, as_json, render)
    if parity and parity["passed"] is False:
        raise QualityError(
            f"{artifact.name} is saved, but it does not answer as it did in training",
            hint=f"tailor verify {artifact.name}",
        )
    if not as_json:
        say(f'next: tailor generate {artifact.name} "…"   or   tailor eval {artifact.name} FILE')
