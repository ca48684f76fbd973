"""`tailor tune`: rows in, a working customization out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tailor.cli.output import AsJson, Columns, Device, Dtype, Quantize, Quiet, emit, pairs, say
from tailor.errors import ConfigError, QualityError, TailorError

if TYPE_CHECKING:
    from rich.console import Console

    from tailor.artifacts.artifact import Artifact
    from tailor.recipes.tune_save import TuneResult
    from tailor.recipes.tune_settings import TuneRecipe
    from tailor.recipes.tune_together import TunedTogether
    from tailor.recipes.tune_train import Outcome

Source = Annotated[str, typer.Argument(help="A data file, or a recipe (.yaml).")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="More recipes of the same base, to be trained in the same passes; then settings (for all of them), "
        "e.g. technique.rank=8 train.num_epochs=3 ~data.validation"
    ),
]
Technique = Annotated[
    str | None, typer.Option("--technique", "-t", help="Technique for a data file; several as adapter+p_tuning.")
]
Base = Annotated[str | None, typer.Option("--base", "-b", help="tailor-nano, a local folder, or a hub id.")]
Validation = Annotated[str | None, typer.Option("--validation", help="A validation file; else 10 % is set aside.")]

AddTokens = Annotated[
    list[str] | None,
    typer.Option("--add-tokens", help="Words to make tokens of, trained beside the technique: '<sku>,<order>'."),
]

app = typer.Typer(add_completion=False)


@app.command()
def tune(
    source: Source,
    overrides: Overrides = None,
    technique: Technique = None,
    base: Base = None,
    name: Annotated[str | None, typer.Option("--name", "-n", help="The artifact's name.")] = None,
    task: Annotated[str | None, typer.Option("--task", help="The task's name, of a soft prompt in a table.")] = None,
    add: Annotated[bool, typer.Option("--add", help="Add the task to the prompt table of that name.")] = False,
    validation: Validation = None,
    columns: Columns = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    quantize: Quantize = None,
    add_tokens: AddTokens = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an artifact of that name.")] = False,
    verify: Annotated[bool, typer.Option(help="Prove at the end that what was trained is what is served.")] = True,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Tune a base on your rows and save the result under a name.

    Ctrl-C saves a checkpoint; `tailor resume` goes on. Every setting has a default measured for the technique. Several
    recipes are trained side by side on one copy of the base, each to the result it has alone.
    """
    from tailor.models.files import is_hosted
    from tailor.recipes.hosted_prompting import prompt_hosted
    from tailor.recipes.tune import tune as run_tune
    from tailor.recipes.tune_together import tune_many

    given = {
        "technique": technique,
        "technique.task": task,
        "output.add": "true" if add else None,
        "base.name": base,
        "data.validation": validation,
        "output.name": name,
        "base.device": device if device != "auto" else None,
        "base.dtype": dtype if dtype != "auto" else None,
        "base.quantize": quantize,
        "output.force": "true" if force else None,
        "output.verify": None if verify else "false",
    }
    others = [text for text in overrides or () if is_recipe(text)]
    settings = [text for text in overrides or () if not is_recipe(text)]
    if not others:
        recipe = with_new_tokens(recipe_from(source, given, columns, settings), add_tokens)
        if is_hosted(recipe.base.name):
            _show_artifact(prompt_hosted(recipe, quiet=quiet), as_json)
            return
        show(run_tune(recipe, quiet=quiet), as_json)
        return
    if add_tokens:
        raise typer.BadParameter("--add-tokens is for one recipe: of several, write new_tokens into each")
    if not is_recipe(source):
        raise typer.BadParameter(f"several are recipes (.yaml), and {source} is not: write one with `tailor init`")
    if name is not None:
        raise typer.BadParameter(f"--name {name} cannot be the name of {len(others) + 1} artifacts (output.name is)")
    show_many(tune_many([source, *others], [*_flags(given, columns), *settings], quiet=quiet), as_json)


def is_recipe(text: str) -> bool:
    """Whether an argument is a recipe's path: not a data file, nor a setting (`data.train=x.yaml`)."""
    return text.endswith((".yaml", ".yml")) and not re.match(r"~?[\w.-]+=", text)


def recipe_from(
    source: str, given: Mapping[str, str | None], columns: list[str] | None, overrides: Sequence[str]
) -> TuneRecipe:
    """The recipe of that name, or one for a data file, with the flags that were `given` and then the overrides."""
    from tailor.config import load_recipe
    from tailor.recipes.tune_settings import TuneRecipe

    defaults: dict[str, Any] = {}
    if not is_recipe(source):
        kind = given["technique"] or "lora"
        stem = Path(source).name.split(".")[0] or "data"
        name = f"{stem}-{kind.replace('+', '-')}"
        defaults = {"data": {"train": source}, "technique": kind, "output": {"name": name}}
    settings = [*_flags(given, columns), *overrides]
    return load_recipe(source if is_recipe(source) else None, TuneRecipe, settings, defaults).recipe


def with_new_tokens(recipe: TuneRecipe, words: Sequence[str] | None) -> TuneRecipe:
    """The recipe with a `new_tokens` in front of its techniques, for words that may be joined by commas."""
    if not words:
        return recipe
    from pydantic import ValidationError

    from tailor.explain import explain

    found = [word.strip() for text in words for word in text.split(",") if word.strip()]
    techniques = [{"type": "new_tokens", "tokens": found}, *(one.model_dump() for one in recipe.technique)]
    data = {**recipe.model_dump(), "technique": techniques}
    try:
        return type(recipe).model_validate(data)
    except ValidationError as error:
        told = [f"--add-tokens: {'.'.join(path)}: {problem}" for path, problem in explain(error, type(recipe), data)]
        raise ConfigError("\n".join(told)) from None


def _flags(given: Mapping[str, str | None], columns: list[str] | None) -> list[str]:
    """The flags as overrides of a recipe."""
    kind = given["technique"]
    if kind is not None and "+" in kind:  # as a list, so that overrides can follow: technique.0.dropout=0.1
        given = {**given, "technique": f"[{kind.replace('+', ', ')}]"}
    flags = [f"{key}={value}" for key, value in given.items() if value is not None]
    return flags + [f"data.columns.{ours}={theirs}" for ours, theirs in pairs(columns, "--columns").items()]


def show(result: TuneResult, as_json: bool) -> None:
    """Print what a finished run came to. Raises QualityError when the artifact failed its parity check."""
    _show_artifact(result.artifact, as_json)


def _show_artifact(artifact: Artifact, as_json: bool) -> None:
    for note in artifact.manifest.get("notes", []):
        say(f"note: {note}")
    emit(_facts(artifact), as_json, lambda console: _render(console, artifact))
    _check_parity([artifact])
    if not as_json:
        say(f'next: tailor generate {artifact.name} "…"   or   tailor eval {artifact.name} FILE')


def show_many(tuned: TunedTogether, as_json: bool) -> None:
    """Print what several runs came to, those that failed included. Raises their error, or QualityError as `show`."""
    artifacts = [outcome.result.artifact for outcome in tuned.outcomes if outcome.result is not None]
    for artifact in artifacts:
        for note in artifact.manifest.get("notes", []):
            say(f"note: {artifact.name}: {note}")

    def render(console: Console) -> None:
        for artifact in artifacts:
            _render(console, artifact)
            console.print()

    emit({"runs": [_outcome(outcome) for outcome in tuned.outcomes]}, as_json, render)
    tuned.check()
    _check_parity(artifacts)
    if not as_json:
        say("next: " + "   and   ".join(f"tailor eval {artifact.name} FILE" for artifact in artifacts))


def _outcome(outcome: Outcome) -> dict[str, Any]:
    if outcome.result is not None:
        return {"name": outcome.name, "status": "finished", **_facts(outcome.result.artifact)}
    failed = outcome.error if isinstance(outcome.error, TailorError) else TailorError(repr(outcome.error))
    error = {"code": failed.code, "message": failed.message, "hint": failed.hint}
    return {"name": outcome.name, "status": "failed", "error": error}


def _facts(artifact: Artifact) -> dict[str, Any]:
    return {"artifact": artifact.name, "folder": str(artifact.folder), **artifact.manifest}


def _render(console: Console, artifact: Artifact) -> None:
    facts = artifact.manifest
    metrics, parity = facts.get("metrics", {}), facts.get("parity")
    line = partial(console.print, soft_wrap=True)
    line(artifact.name, style="bold")
    line(f"{artifact.kind} on {facts['base']['name']}, saved in {artifact.folder}")
    line(f"rows: {facts['data']['num_train']} trained, {facts['data']['num_validation']} set aside")
    trained, kept = facts["num_trained"], facts["num_parameters"]
    line(f"trainable parameters: {trained:,}" + ("" if trained == kept else f", saved as {kept:,}"))
    if metrics:
        stopped = f" ({metrics['stopped']})" if metrics["stopped"] else ""
        line(f"steps: {metrics['num_steps']}{stopped}, best at {metrics['best_step']}")
        if metrics["validation_loss"] is not None:
            line(f"validation loss: {metrics['validation_loss']:.4f}")
        others = metrics["shared_with"]
        shared = f", in passes shared with {', '.join(others)}" if others else ""
        line(f"time: {metrics['seconds']:.1f} s{shared}, peak memory {metrics['peak_memory'] / 2**30:.2f} GiB")
    if parity and parity["passed"] is None:
        line(f"parity: could not be checked ({parity['error']}); try `tailor verify {artifact.name}`")
    elif parity:
        hops = ", ".join(hop["name"] for hop in parity["hops"])
        floor = "none" if parity["noise_floor"] is None else f"{parity['noise_floor']:.1e}"
        line(f"parity: {'passed' if parity['passed'] else 'FAILED'} ({hops}); noise {floor}")


def _check_parity(artifacts: Sequence[Artifact]) -> None:
    failed = [a.name for a in artifacts if (parity := a.manifest.get("parity")) and parity["passed"] is False]
    if len(failed) == 1:
        told = f"{failed[0]} is saved, but it does not answer as it did in training"
        raise QualityError(told, hint=f"tailor verify {failed[0]}")
    if failed:
        told = f"{', '.join(failed)} are saved, but do not answer as they did in training"
        raise QualityError(told, hint=f"tailor verify {failed[0]}")
