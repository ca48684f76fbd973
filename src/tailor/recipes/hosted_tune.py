"""Let a provider tune its own model: rows up, a job, its end, and an artifact that answers with the result."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from tailor.artifacts.artifact import Artifact, check_free, find, made_by, save_hosted
from tailor.config import Strict
from tailor.data.dataset import Dataset, DataSettings, load_dataset
from tailor.data.records import Comparison, Conversation, PromptCompletion, Record
from tailor.errors import DataError
from tailor.inference.hosted_endpoint import Endpoint, hosted_endpoint
from tailor.recipes.hosted_jobs import POLL_SECONDS, Say, chat_rows, follow, remember, remembered
from tailor.recipes.tune_save import labels_of

Number = Literal["auto"]

FEW_ROWS = 10
"""Rows below which OpenAI refuses a file."""


class HostedTuneRecipe(Strict):
    """A tuning run at a provider. What is `auto` its provider decides."""

    base: str = Field(description="openai:MODEL@URL")
    data: DataSettings
    name: str = Field(description="the artifact's name")
    method: Literal["supervised", "dpo"] = Field("supervised", description="supervised, or dpo on preferences")
    suffix: str | None = Field(None, max_length=64, description="in the model's name; the artifact's when not given")
    n_epochs: int | Number = Field("auto", description="passes over the rows")
    batch_size: int | Number = Field("auto", description="rows per step")
    learning_rate_multiplier: float | Number = Field("auto", description="of the provider's own learning rate")
    beta: float | Number | None = Field(None, description="of dpo: how near it stays to the base")
    seed: int = Field(0, ge=0, description="of the split, and of the job")
    force: bool = Field(False, description="replace an artifact of that name")

    @model_validator(mode="after")
    def _beta_is_of_dpo(self) -> Self:
        if self.beta is not None and self.method != "dpo":
            raise ValueError("beta is a setting of dpo: with supervised it has no effect")
        return self

    def hyperparameters(self) -> dict[str, Any]:
        """Those of the job."""
        found = {name: getattr(self, name) for name in ("n_epochs", "batch_size", "learning_rate_multiplier")}
        return found if self.beta is None else {**found, "beta": self.beta}


def hosted_tune(recipe: HostedTuneRecipe, *, say: Say, poll: float = POLL_SECONDS) -> Artifact:
    """Upload, create a job, follow it, register the result. Raises what `start` and `finish` raise."""
    return finish(start(recipe, say=say), say=say, poll=poll)


def start(recipe: HostedTuneRecipe, *, say: Say) -> str:
    """Upload the rows and create the job; returns its id, under which it is remembered.

    Raises ConflictError when the artifact's name is taken, DataError for rows that the method cannot use, AuthError,
    NotFoundError for a model or a place that is not there.
    """
    check_free(recipe.name, recipe.force)
    endpoint = hosted_endpoint(recipe.base)
    dataset = load_dataset(recipe.data, recipe.seed)
    _check_kinds(recipe, dataset)
    for note in dataset.notes:
        say(f"note: {note}")
    if len(dataset.train) < FEW_ROWS:
        say(f"note: {len(dataset.train)} training rows: OpenAI takes {FEW_ROWS} and more")
    client = endpoint.client()
    files = {
        "training_file": _upload(client, endpoint, f"{recipe.name}-train.jsonl", dataset.train, say),
        "validation_file": _upload(client, endpoint, f"{recipe.name}-validation.jsonl", dataset.validation, say),
    }
    with endpoint.errors():
        job = client.fine_tuning.jobs.create(
            model=endpoint.model,
            **files,
            seed=recipe.seed,
            suffix=recipe.suffix or recipe.name[:64],
            method={"type": recipe.method, recipe.method: {"hyperparameters": recipe.hyperparameters()}},
            # a create that is sent again after a broken connection must not train twice, where the endpoint honours it
            extra_headers={"Idempotency-Key": f"tailor-{secrets.token_hex(16)}"},
        )
    labels = labels_of(dataset.train) if recipe.method == "supervised" else None
    data = {"num_train": len(dataset.train), "num_validation": len(dataset.validation)}
    facts = {
        "base": endpoint.name,
        "recipe": recipe.model_dump(mode="json"),
        "files": files,
        "data": {"content_hash": dataset.content_hash, **data},
        "labels": labels,
    }
    remember(str(job.id), facts)
    say(f"job {job.id} at {endpoint.url}")
    return str(job.id)


def finish(
    job: str,
    *,
    say: Say,
    base: str | None = None,
    name: str | None = None,
    force: bool = False,
    poll: float = POLL_SECONDS,
) -> Artifact:
    """Follow a job to its end and register its model as an artifact; one that is registered already is returned.

    `base` and `name` are for a job that was not begun here. Raises what `follow` raises, and ConflictError.
    """
    facts = _facts(job, base, name, force)
    recipe = facts["recipe"]
    if made_by(recipe["name"], job):
        return find(recipe["name"])
    endpoint = hosted_endpoint(facts["base"])
    check_free(recipe["name"], recipe["force"])
    ended = follow(endpoint, job, say, poll=poll)
    trained = getattr(ended, "trained_tokens", None)
    own = {
        "techniques": [],
        "kind": "hosted",
        "model": str(ended.fine_tuned_model),
        "run": job,
        "objective": "dpo" if recipe.get("method") == "dpo" else "sft",
        "hyperparameters": _resolved(ended),
        "trained_tokens": trained,
        **{key: facts[key] for key in ("recipe", "files", "data", "labels") if key in facts},
    }
    if trained:
        say(f"{trained:,} tokens trained")
    return save_hosted(recipe["name"], facts["base"], own, force=recipe["force"])


def cancel(job: str, *, base: str | None = None) -> str:
    """Cancel a job; returns its state. Raises NotFoundError, ConflictError for one that has ended."""
    endpoint = hosted_endpoint(base or remembered(job)["base"])
    with endpoint.errors():
        return str(endpoint.client().fine_tuning.jobs.cancel(job).status)


def _facts(job: str, base: str | None, name: str | None, force: bool) -> Mapping[str, Any]:
    if base is None or name is None:
        facts = remembered(job)
        recipe = facts["recipe"]
        changes = {"name": name or recipe["name"], "force": force or recipe["force"]}
        return {**facts, "base": base or facts["base"], "recipe": {**recipe, **changes}}
    return {"base": hosted_endpoint(base).name, "recipe": {"name": name, "force": force}, "data": {}}


def _check_kinds(recipe: HostedTuneRecipe, dataset: Dataset) -> None:
    wanted: tuple[type[Record], ...] = (Comparison,) if recipe.method == "dpo" else (PromptCompletion, Conversation)
    for record in (*dataset.train, *dataset.validation):
        if not isinstance(record, wanted):
            what = "preferences (chosen and rejected)" if recipe.method == "dpo" else "prompts with completions"
            hint = "--method dpo learns from preferences" if isinstance(record, Comparison) else None
            raise DataError(f"{record.source}: {recipe.method} takes {what}, not a {type(record).__name__}", hint=hint)


def _upload(client: Any, endpoint: Endpoint, name: str, records: Any, say: Say) -> str:
    content = chat_rows(records)
    with endpoint.errors():
        found = client.files.create(file=(name, content), purpose="fine-tune")
    say(f"{name}: {len(records)} rows, {len(content):,} bytes, uploaded as {found.id}")
    return str(found.id)


def _resolved(job: Any) -> dict[str, Any]:
    """The job's hyperparameters as it came to use them."""
    found: Any = getattr(job, "hyperparameters", None)
    values: dict[str, Any] = found.model_dump() if hasattr(found, "model_dump") else dict(found or {})
    return values
