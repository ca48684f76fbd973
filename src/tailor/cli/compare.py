"""`tailor compare`: which technique is best for these rows, measured."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tailor.cli.output import AsJson, Columns, Device, Dtype, Quantize, Quiet, SkipBadRows, draw, emit, pairs, say
from tailor.data.progress import stages

app = typer.Typer(add_completion=False)

YAML = (".yaml", ".yml")

Source = Annotated[str, typer.Argument(help="A data file, or a recipe (.yaml); with --redraw a comparison.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings, e.g. train.num_steps=100 data.max_rows=2000")]
Bases = Annotated[list[str] | None, typer.Option("--base", "-b", help="tailor-nano, a folder, a hub id; repeatable.")]
Techniques = Annotated[str | None, typer.Option("--techniques", "-t", help="Names with commas between; else all.")]
Sizes = Annotated[str | None, typer.Option("--sizes", help="Training rows for learning curves: 8,64,512,all")]
Seeds = Annotated[int | None, typer.Option("--seeds", min=1, help="Repetitions with other rows and starts.")]
Tune = Annotated[bool, typer.Option("--tune", help="Try the same number of settings per technique (on validation).")]
Test = Annotated[str | None, typer.Option("--test", help="A test file; else a fifth of the prompts.")]
Validation = Annotated[str | None, typer.Option("--validation", help="A validation file; else a tenth.")]
MaxTestRows = Annotated[int | None, typer.Option("--max-test-rows", min=2, help="Test on at most so many rows.")]
Pattern = Annotated[
    str | None, typer.Option("--answer-pattern", help=r"Reads the label from the answer, e.g. '^Queue: (\w+)'")
]
MetricName = Annotated[str | None, typer.Option("--metric", "-m", help="What decides; else by the kind of task.")]
Rate = Annotated[float | None, typer.Option("--rate", help="What an hour of this machine costs, in dollars.")]
Name = Annotated[str | None, typer.Option("--name", "-n", help="The comparison's name; else the file's.")]
Redraw = Annotated[bool, typer.Option("--redraw", help="Only draw the report again, from its JSON.")]
Retry = Annotated[bool, typer.Option("--retry", help="Measure again what failed.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a comparison of that name.")]


@app.command()
def compare(
    source: Source,
    overrides: Overrides = None,
    base: Bases = None,
    techniques: Techniques = None,
    sizes: Sizes = None,
    seeds: Seeds = None,
    tune: Tune = False,
    test: Test = None,
    validation: Validation = None,
    max_test_rows: MaxTestRows = None,
    answer_pattern: Pattern = None,
    metric: MetricName = None,
    rate: Rate = None,
    name: Name = None,
    columns: Columns = None,
    skip_bad_rows: SkipBadRows = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    redraw: Redraw = False,
    retry: Retry = False,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Train and measure every technique on the same rows, and report which is best, and at what cost.

    The same command goes on where an interrupted one stopped. The report is written as HTML, Markdown and JSON.
    """
    if redraw:
        from tailor.recipes.compare import redraw as run_redraw

        show(run_redraw(source), as_json)
        return
    if source.endswith(YAML) and base is None and (device, dtype, quantize) != ("auto", "auto", None):
        raise typer.BadParameter(
            "--device, --dtype and --quantize go with --base; a recipe says them for each of its bases"
        )
    flags = {
        "base": _bases(base, device, dtype, quantize),
        "techniques": _parts(techniques),
        "sizes": _parts(sizes),
        "seeds": seeds,
        "tune": tune or None,
        "data.test": test,
        "data.validation": validation,
        "data.max_test_rows": max_test_rows,
        "data.skip_bad_rows": skip_bad_rows or None,
        "evaluation.answer_pattern": answer_pattern,
        "metric": metric,
        "rate": rate,
        "name": name,
        **{f"data.columns.{ours}": theirs for ours, theirs in pairs(columns, "--columns").items()},
    }
    _run(source, [*_as_overrides(flags), *(overrides or [])], force=force, retry=retry, as_json=as_json, quiet=quiet)


def _run(source: str, overrides: list[str], *, force: bool, retry: bool, as_json: bool, quiet: bool) -> None:
    from tailor.config import load_recipe
    from tailor.recipes.compare import compare as run_compare
    from tailor.recipes.compare_settings import CompareRecipe

    is_recipe = source.endswith(YAML)
    defaults: dict[str, Any] = {}
    if not is_recipe:
        stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(source).name.split(".")[0]).strip("-._") or "data"
        defaults = {"name": stem, "data": {"train": source}}
    loaded = load_recipe(source if is_recipe else None, CompareRecipe, overrides, defaults)
    command = shlex.join(["tailor", *sys.argv[1:]])
    tell = (lambda text: None) if quiet else say
    with stages(quiet) as progress:
        result = run_compare(loaded.recipe, command=command, force=force, retry=retry, progress=progress, say=tell)
    show(result, as_json)
    result.check()


def show(result: Any, as_json: bool) -> None:
    """Print a report, and where its files are."""
    from tailor.evaluation.drawing.terminal import render_comparison

    report, folder = result.report, result.folder
    emit({**report, "folder": str(folder)}, as_json, lambda console: draw(console, render_comparison(report)))
    if not as_json:
        say(f"\nreport: {folder / 'report.html'}  (also report.md, report.json)")


def _bases(names: list[str] | None, device: str, dtype: str, quantize: str | None) -> list[dict[str, str]] | None:
    if names is None and quantize is None and device == dtype == "auto":
        return None
    settings = {"device": device, "dtype": dtype} | ({} if quantize is None else {"quantize": quantize})
    return [{"name": name, **settings} for name in names or ["tailor-nano"]]


def _parts(text: str | None) -> list[Any] | None:
    if text is None:
        return None
    found = [part.strip() for part in text.split(",") if part.strip()]
    return [int(part) if part.isdecimal() else part for part in found]


def _as_overrides(flags: dict[str, Any]) -> list[str]:
    """Flags that were given, as settings in JSON, which YAML reads: a text stays one ('2024', '[AB]')."""
    return [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in flags.items() if value is not None]
