"""`tailor sweep`: which settings suit these rows best, searched."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailor.cli.output import AsJson, Columns, Device, Dtype, Quiet, SkipBadRows, emit, pairs, say
from tailor.data.progress import stages

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(add_completion=False)

YAML = (".yaml", ".yml")
SHOWN_TRIALS = 10

Source = Annotated[str, typer.Argument(help="A data file, or a recipe (.yaml).")]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings, e.g. search.lora.rank=[4,8] train.num_steps=200 pruner=none")
]
Techniques = Annotated[
    list[str] | None, typer.Option("--technique", "-t", help="Choose among these, each with its own space; repeatable.")
]
Base = Annotated[str | None, typer.Option("--base", "-b", help="tailor-nano, a local folder, or a hub id.")]
Trials = Annotated[int | None, typer.Option("--trials", min=1, help="Trials in all; more than before goes on.")]
Parallel = Annotated[int | None, typer.Option("--in-parallel", "-k", min=1, help="Trials trained in one pass.")]
Seed = Annotated[int | None, typer.Option("--seed", min=0, help="Of the draws.")]
Name = Annotated[str | None, typer.Option("--name", "-n", help="The sweep's name, and its artifact's.")]
Validation = Annotated[str | None, typer.Option("--validation", help="A validation file; else 10 % is set aside.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a sweep of that name.")]


@app.command()
def sweep(
    source: Source,
    overrides: Overrides = None,
    technique: Techniques = None,
    base: Base = None,
    trials: Trials = None,
    in_parallel: Parallel = None,
    seed: Seed = None,
    name: Name = None,
    validation: Validation = None,
    columns: Columns = None,
    skip_bad_rows: SkipBadRows = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Search settings and techniques on your rows: trials of one base side by side, the hopeless given up early.

    The same command goes on where an interrupted one stopped. It writes report.html, report.json and best.yaml, which
    `tailor tune` runs, and saves the best trial's weights. Needs the extra `hpo`.
    """
    from tailor.config import load_recipe
    from tailor.recipes.sweep import sweep as run_sweep
    from tailor.recipes.sweep_settings import SweepRecipe

    chosen = technique or []
    flags = {
        "technique": chosen[0] if len(chosen) == 1 else None,
        "search.technique": chosen if len(chosen) > 1 else None,
        "base.name": base,
        "base.device": device if device != "auto" else None,
        "base.dtype": dtype if dtype != "auto" else None,
        "num_trials": trials,
        "in_parallel": in_parallel,
        "seed": seed,
        "name": name,
        "data.validation": validation,
        "data.skip_bad_rows": skip_bad_rows or None,
        **{f"data.columns.{ours}": theirs for ours, theirs in pairs(columns, "--columns").items()},
    }
    given = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flags.items() if value is not None]
    is_recipe = source.endswith(YAML)
    defaults: dict[str, Any] = {}
    if not is_recipe:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).name.split(".")[0]).strip("-._") or "data"
        defaults = {"name": f"{stem}-sweep", "data": {"train": source}}
    loaded = load_recipe(source if is_recipe else None, SweepRecipe, [*given, *(overrides or [])], defaults)
    command = shlex.join(["tailor", *sys.argv[1:]])
    with stages(quiet) as progress:
        tell = (lambda text: None) if quiet else say
        result = run_sweep(loaded.recipe, command=command, force=force, progress=progress, say=tell)
    show(result, as_json)
    result.check()


def show(result: Any, as_json: bool) -> None:
    """Print what a sweep came to, and where its files are."""
    from tailor.evaluation.drawing.sweep_page import best_sentence, trials_table
    from tailor.evaluation.drawing.terminal import drawn_table

    report, folder = result.report, result.folder

    def render(console: Console) -> None:
        console.print(best_sentence(report), style="bold", soft_wrap=True)
        console.print(drawn_table(trials_table(report, SHOWN_TRIALS)))
        for key, share in report["importance"].items():
            console.print(f"importance of {key}: {share:.0%}", soft_wrap=True)

    emit({**report, "folder": str(folder)}, as_json, render)
    if not as_json:
        say(f"report: {folder / 'report.html'}  (also report.json)")
        if result.best_recipe is not None:
            saved = f", saved as {report['artifact']}" if report["artifact"] else ""
            say(f"next: tailor tune {result.best_recipe}  repeats the best trial{saved}")
