"""From what a job is asked for to a recipe of ours, and the names of what it makes. What cannot be is said by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from tailor.artifacts import artifact as artifacts
from tailor.config import Strict
from tailor.errors import DamageError, TailorError, nearest
from tailor.explain import explain
from tailor.objectives import OBJECTIVES
from tailor.recipes.tune_settings import BaseSettings, TuneRecipe
from tailor.server.errors import ApiError, invalid, unsupported, without_paths
from tailor.server.protocol_jobs import CreateJob, DpoHyperparameters, Hyperparameters
from tailor.store import text_hash

Bases = Callable[[], Mapping[str, BaseSettings]]
"""The bases that jobs may tune: the name that people ask for → the `base` block of a recipe."""

DATA_SETTINGS = (
    *("format", "columns", "skip_bad_rows", "validation_fraction", "max_rows", "max_seq_len", "truncation"),
    "trained_turns",
)
"""What a job may set of a recipe's `data` block: everything but which files are read."""
BLOCKS = ("data", "train", "objective", "notes")
"""The parts of a recipe that a job may set. The others name files, or what is written."""

NUMBERS = {
    "n_epochs": "num_epochs",
    "batch_size": "batch_size",
    "learning_rate_multiplier": "learning_rate_multiplier",
}
_ENVIRONMENT = "${env:"

KEPT_EPOCHS = 3
"""The last states at the ends of epochs that a job's checkpoints are, as many as OpenAI keeps."""


class FineTuningSettings(Strict):
    """How jobs are taken."""

    min_rows: int = Field(10, ge=1, description="fewest training rows of a job")
    organization: str = Field("local", pattern=r"[A-Za-z0-9._-]{1,40}", description="the middle of models' names")
    technique: str = Field("lora", description="the technique of jobs that name none")


@dataclass(frozen=True)
class Start:
    """What a job begins with: a base, and the artifact of it that training goes on from."""

    base: BaseSettings
    artifact: artifacts.Artifact | None = None


def starting_point(model: str, bases: Bases, artifact_of: Callable[[str], str | None]) -> Start:
    """The base or customization that a job names as its model. Raises ApiError."""
    served = bases()
    if model in served:
        return Start(served[model])
    try:
        artifact = artifacts.find(artifacts.check_name(artifact_of(model) or model))
    except DamageError:
        raise
    except TailorError:
        raise _no_model(model, served) from None
    if artifact.is_base:
        return Start(BaseSettings(name=artifact.name))
    base = next((base for base in served.values() if base.absolute().name == artifact.base_name), None)
    if base is None:
        raise _no_model(model, served)
    if artifact.tasks or "prompting" in artifact.kind:
        raise invalid("model", f"{model} is {artifact.kind}: there is no training to go on from.")
    return Start(base, artifact)


def _no_model(model: str, served: Mapping[str, BaseSettings]) -> ApiError:
    message = f"The model {model[:200]!r} does not exist or cannot be fine-tuned; {nearest(model, served)}."
    return ApiError(404, message, code="model_not_found", param="model")


def method_of(request: CreateJob) -> tuple[str, Hyperparameters]:
    """(the method's type, its numbers). Raises ApiError for methods that are not there yet."""
    method = request.method
    if method is None:
        return "supervised", request.hyperparameters or Hyperparameters()
    if request.hyperparameters is not None:
        raise invalid("hyperparameters", "'hyperparameters' and 'method' are both given: put them into the method.")
    others = {"supervised", "dpo", "reinforcement"} - {method.type}
    if strange := sorted(name for name in others if getattr(method, name) is not None):
        raise invalid(f"method.{strange[0]}", f"the method's type is {method.type!r}, not {strange[0]!r}.")
    if method.type == "reinforcement":
        raise _no_method("reinforcement")
    if method.type == "dpo":
        if "dpo" not in OBJECTIVES:
            raise _no_method("dpo")
        numbers = (method.dpo.hyperparameters if method.dpo else None) or DpoHyperparameters()
        if numbers.beta != "auto":
            raise unsupported("method.dpo.hyperparameters.beta", "only 'auto', the objective's own, is supported.")
        return "dpo", numbers
    given = method.supervised.hyperparameters if method.supervised else None
    return "supervised", given or Hyperparameters()


def _no_method(name: str) -> ApiError:
    known = [method for method in ("supervised", "dpo") if method == "supervised" or method in OBJECTIVES]
    message = f"The method {name!r} is not supported by this server; supported: {', '.join(known)}."
    return ApiError(400, message, code="unsupported_value", param="method.type")


def check_integrations(request: CreateJob) -> None:
    """Raises ApiError: nothing is sent to other services."""
    if request.integrations:
        reason = "metrics are in the job's events and in its results file; nothing is sent to wandb."
        raise unsupported("integrations", reason)


def recipe_of(
    request: CreateJob, start: Start, settings: FineTuningSettings, *, name: str, seed: int, files: Sequence[Path]
) -> TuneRecipe:
    """The recipe of a job; `files` are the rows to train on, and those to validate on if there are any.

    Raises ApiError that names what cannot be.
    """
    kind, numbers = method_of(request)
    given = _given(request)
    train: dict[str, Any] = {"seed": seed, **given.get("train", {})}
    for theirs, ours in NUMBERS.items():
        value = getattr(numbers, theirs)
        if value != "auto":
            if ours in given.get("train", {}) or (ours == "num_epochs" and "num_steps" in train):
                raise invalid(
                    f"tailor.recipe.train.{ours}", f"{theirs!r} and tailor.recipe.train say different things."
                )
            train[ours] = value
    if "num_epochs" in train and "num_steps" in train:
        raise invalid("tailor.recipe.train", "num_epochs and num_steps are both given: one would have no effect.")
    data = {
        "base": start.base.model_dump(mode="json"),
        "data": {**given.get("data", {}), "train": str(files[0])},
        "technique": _technique(request, start, settings),
        "objective": given.get("objective", "sft" if kind == "supervised" else kind),
        "train": train,
        "output": {"name": name, "force": True},  # the name is this job's alone: what is there is half of its work
        "notes": given.get("notes", ()),
    }
    if len(files) > 1:
        data["data"]["validation"] = str(files[1])
    if start.artifact is not None:
        data["start"] = start.artifact.name
    recipe = _checked(data)
    if not recipe.can_keep_checkpoints:  # a whole model for each would be a burden
        return recipe
    output = recipe.output.model_copy(update={"checkpoints": KEPT_EPOCHS})
    return recipe.model_copy(update={"output": output})


def _given(request: CreateJob) -> Mapping[str, Any]:
    """The parts of a recipe that came with the request."""
    asked = request.tailor
    if asked is None:
        return {}
    if any(_ENVIRONMENT in text for text in _texts([asked.technique, asked.recipe])):
        raise invalid("tailor", f"{_ENVIRONMENT}…}} reads the server's environment and cannot stand in a job.")
    given = asked.recipe or {}
    for key in given:
        if key not in BLOCKS:
            message = f"A job cannot set {key[:80]!r} of the recipe; {nearest(key, BLOCKS)}."
            raise invalid(f"tailor.recipe.{key[:80]}", message)
    for block in ("data", "train"):
        if not isinstance(given.get(block, {}), dict):
            raise invalid(f"tailor.recipe.{block}", f"{block} must be an object.")
    for key in dict(given.get("data", {})):  # type: ignore[arg-type]  # it is an object
        if key not in DATA_SETTINGS:
            message = f"A job cannot set data.{key[:80]}; {nearest(key, DATA_SETTINGS)}."
            raise invalid(f"tailor.recipe.data.{key[:80]}", message)
    return given


def _technique(request: CreateJob, start: Start, settings: FineTuningSettings) -> Any:
    """The technique that is asked for; that of the artifact, when training goes on from one."""
    asked = request.tailor.technique if request.tailor else None
    if start.artifact is None:
        return asked if asked is not None else settings.technique
    if asked is not None:
        raise invalid("tailor.technique", f"training goes on from {request.model}: its technique is the model's.")
    return [technique.model_dump(mode="json") for technique in start.artifact.techniques]


def _checked(data: dict[str, Any]) -> TuneRecipe:
    try:
        recipe = TuneRecipe.model_validate(data)
    except ValidationError as error:
        path, message = explain(error, TuneRecipe, data)[0]
        where = ".".join(path) if path and path[0] == "technique" else ".".join(("recipe", *path))
        raise invalid(f"tailor.{where}", f"{where}: {without_paths(message)}") from None
    except TailorError as error:
        raise invalid("tailor", without_paths(error.message)) from None
    if recipe.objective not in OBJECTIVES:
        message = f"objective {recipe.objective!r} is unknown; {nearest(recipe.objective, OBJECTIVES)}"
        raise invalid("tailor.recipe.objective", message)
    return recipe


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def names_of(model: str, start: Start, suffix: str | None, organization: str, tail: str) -> tuple[str, str]:
    """(the model's id, the artifact's name). `tail` makes both this job's alone.

    The id is one path segment: of a base's name the last part stays.
    """
    base = model.split(":")[1] if model.startswith("ft:") and model.count(":") >= 4 else model
    base = _slug(re.split(r"[/\\]", base)[-1]) or "base"
    ending = _slug(suffix or "")
    artifact = "-".join(part for part in ("ft", base[:32], ending[:32], tail) if part)
    return f"ft:{base}:{organization}:{ending}:{tail}", artifacts.check_name(artifact)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-")


def pool_of(recipe: TuneRecipe) -> str | None:
    """Jobs of one pool may be trained in one process; None: only alone."""
    if not all(technique.traits.frozen_base for technique in recipe.technique):
        return None
    return text_hash(recipe.base.absolute().model_dump_json())[:32]
