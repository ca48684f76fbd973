"""`tailor hosted`: let the provider of a hosted model tune it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from tailor.cli.output import AsJson, Columns, Quiet, SkipBadRows, emit, pairs, say

app = typer.Typer(
    add_completion=False, no_args_is_help=True, help="Tune hosted models: upload rows, follow the job, name the result."
)

HostedBase = Annotated[str | None, typer.Option("--base", "-b", help="openai:MODEL@URL, or openai:MODEL.")]


@app.command()
def tune(
    data: Annotated[str | None, typer.Argument(help="A data file; none with --follow.")] = None,
    base: HostedBase = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="The artifact's name; else the file's.")] = None,
    method: Annotated[
        Literal["supervised", "dpo"], typer.Option("--method", help="supervised, or dpo on preferences.")
    ] = "supervised",
    suffix: Annotated[str | None, typer.Option("--suffix", help="In the model's name; else the artifact's.")] = None,
    n_epochs: Annotated[int | None, typer.Option("--n-epochs", min=1, help="Else the provider decides.")] = None,
    batch_size: Annotated[int | None, typer.Option("--batch-size", min=1, help="Else the provider decides.")] = None,
    learning_rate_multiplier: Annotated[
        float | None, typer.Option("--learning-rate-multiplier", help="Of the provider's own rate.")
    ] = None,
    beta: Annotated[float | None, typer.Option("--beta", help="Of dpo: how near it stays to the base.")] = None,
    validation: Annotated[str | None, typer.Option("--validation", help="A validation file; else 10 %.")] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of the split, and of the job.")] = 0,
    columns: Columns = None,
    skip_bad_rows: SkipBadRows = False,
    follow: Annotated[str | None, typer.Option("--follow", help="A job that is under way already.")] = None,
    poll: Annotated[float, typer.Option("--poll", min=0.01, help="Seconds between two looks at the job.")] = 5.0,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact of that name.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Upload rows, create a fine-tuning job, follow it, and register the model as an artifact.

    Ctrl-C leaves the job running; `--follow JOB` goes on. The key is read from OPENAI_API_KEY, or from the variable
    that hosted.yaml in TAILOR_HOME names for the endpoint.
    """
    from tailor.recipes.hosted_tune import finish, hosted_tune

    tell = (lambda text: None) if quiet else say
    if follow is not None:
        if data is not None:
            raise typer.BadParameter("--follow takes no data: its rows are with the job")
        _show(finish(follow, say=tell, base=base, name=name, force=force, poll=poll), as_json)
        return
    if data is None or base is None:
        raise typer.BadParameter("give a data file and --base openai:MODEL@URL, or --follow JOB")
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).name.split(".")[0]).strip("-._") or "data"
    numbers = {
        "n_epochs": n_epochs,
        "batch_size": batch_size,
        "learning_rate_multiplier": learning_rate_multiplier,
        "beta": beta,
        "suffix": suffix,
    }
    given = {key: value for key, value in numbers.items() if value is not None}
    rows = {"train": data, "validation": validation, "skip_bad_rows": skip_bad_rows}
    settings = {"data": {**rows, "columns": pairs(columns, "--columns")}, "base": base, "method": method, **given}
    recipe = _recipe({**settings, "name": name or f"{stem}-hosted", "seed": seed, "force": force})
    _show(hosted_tune(recipe, say=tell, poll=poll), as_json)


@app.command()
def cancel(
    job: Annotated[str, typer.Argument(help="The job's id.")], base: HostedBase = None, as_json: AsJson = False
) -> None:
    """Cancel a fine-tuning job."""
    from tailor.recipes.hosted_tune import cancel as run_cancel

    status = run_cancel(job, base=base)
    emit({"job": job, "status": status}, as_json, lambda console: print(f"{job}: {status}"))


def _recipe(settings: dict[str, Any]) -> Any:
    from tailor.config import load_recipe
    from tailor.recipes.hosted_tune import HostedTuneRecipe

    return load_recipe(None, HostedTuneRecipe, defaults=settings).recipe


def _show(artifact: Any, as_json: bool) -> None:
    facts = {"artifact": artifact.name, "folder": str(artifact.folder), **artifact.manifest}
    emit(facts, as_json, lambda console: print(f"{artifact.name}: {artifact.manifest['model']}"))
    if not as_json:
        say(f'next: tailor generate {artifact.name} "…"   or   tailor eval {artifact.name} FILE')
