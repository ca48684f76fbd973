"""Bring the rows of an OpenAI fine-tuning job home: its files, checked, in our formats, and a recipe to tune here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor.config import dump_yaml
from tailor.data.readers import Reading, read_records
from tailor.data.records import Comparison, Conversation, PromptCompletion, Record
from tailor.data.writers import write_records
from tailor.errors import NotFoundError, TailorError
from tailor.inference.hosted_endpoint import Endpoint, hosted_endpoint
from tailor.objectives import OBJECTIVES
from tailor.recipes.check import check
from tailor.recipes.tune_settings import TuneRecipe
from tailor.store import atomic_folder, write_bytes, write_json, write_text

SIDES = ("train", "validation")


@dataclass(frozen=True)
class Imported:
    """What came home. `recipe` is None when this tailor cannot train on such rows; `notes` say why, and all else."""

    folder: Path
    job: Mapping[str, Any]
    sides: Mapping[str, int]
    format: str
    recipe: Path | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return {
            "folder": str(self.folder),
            "job": dict(self.job),
            "rows": dict(self.sides),
            "format": self.format,
            "recipe": None if self.recipe is None else str(self.recipe),
            "notes": list(self.notes),
        }


def import_openai(
    job: str,
    folder: str | Path,
    *,
    place: str = "openai:any",
    base: str = "tailor-nano",
    technique: str = "lora",
    force: bool = False,
) -> Imported:
    """Download a job's training and validation file into `folder`, as they were and as rows of ours, with a recipe.

    `place` is `openai:MODEL@URL` of any model there. Rows of one question and one answer become prompt/completion, all
    others stay chats; what cannot be read is reported by line and kept in the original. Raises NotFoundError for a job
    or file that is not there, AuthError, BadRowsError when no row can be read, ConflictError for a folder in use.
    """
    endpoint = hosted_endpoint(place)
    client = endpoint.client()
    with endpoint.errors():
        found = client.fine_tuning.jobs.retrieve(job)
    folder = Path(folder).expanduser().absolute()
    notes: list[str] = []
    readings: dict[str, Reading] = {}
    with atomic_folder(folder, force=force) as draft:
        for side in SIDES:
            key = getattr(found, "training_file" if side == "train" else "validation_file", None)
            if key:
                path = draft / f"original-{side}.jsonl"
                write_bytes(path, _content(client, endpoint, str(key)))
                readings[side] = read_records(path, skip_bad_rows=True)
                notes += _bad_rows(readings[side])
        if "train" not in readings:
            raise NotFoundError(f"job {job} names no training file")
        kind = _write_rows(draft, readings)
        facts = _facts(found)
        write_json(draft / "job.json", facts)
        recipe = _recipe(folder, facts, readings, base, technique, notes)
        if recipe is not None:
            write_text(draft / "recipe.yaml", dump_yaml(recipe.model_dump(mode="json")))
    notes += _findings(folder, "validation" in readings)
    imported = Imported(
        folder,
        facts,
        {side: len(reading.records) for side, reading in readings.items()},
        kind,
        folder / "recipe.yaml" if recipe is not None else None,
        tuple(notes),
    )
    write_json(folder / "import.json", imported.to_dict())
    return imported


def _content(client: Any, endpoint: Endpoint, key: str) -> bytes:
    try:
        with endpoint.errors():
            return bytes(client.files.content(key).read())
    except NotFoundError as error:
        raise NotFoundError(
            f"file {key} of the job is no longer at {endpoint.url}: {error.message}",
            hint="files can be deleted there after a job; look for a copy of your own and `tailor tune` with it",
        ) from error


def _bad_rows(reading: Reading) -> list[str]:
    return [f"{reading.path.name}:{row.line}: left out: {row.reason}" for row in reading.bad_rows]


def _write_rows(folder: Path, readings: Mapping[str, Reading]) -> str:
    """Write each side in the simplest format that holds all rows of both; returns its name."""
    records = [record for reading in readings.values() for record in reading.records]
    if any(isinstance(record, Comparison) for record in records):
        for side, reading in readings.items():  # our readers know the format as it is
            bad = {row.line for row in reading.bad_rows}
            lines = reading.path.read_bytes().splitlines(keepends=True)
            kept = [line for number, line in enumerate(lines, 1) if number not in bad]
            write_bytes(folder / f"{side}.jsonl", b"".join(kept))
        return "preferences (OpenAI)"
    pairs = [_pair(record) for record in records]
    plain = all(pair is not None for pair in pairs)
    for side, reading in readings.items():
        rows: Sequence[Record] = [(_pair(r) if plain else None) or r for r in reading.records]
        write_records(folder / f"{side}.jsonl", rows)
    return "prompt and completion" if plain else "chat"


def _pair(record: Record) -> Record | None:
    """One question and one answer without anything else; None for what only a chat can hold."""
    if isinstance(record, PromptCompletion):
        return record
    if (
        not isinstance(record, Conversation)
        or record.tools
        or [m.role for m in record.messages] != ["user", "assistant"]
    ):
        return None
    question, answer = record.messages
    if answer.tool_calls or answer.weight is not None or question.name or answer.name:
        return None
    return PromptCompletion(prompt=question.content, completion=answer.content, source=record.source)


def _facts(job: Any) -> dict[str, Any]:
    """What is worth keeping of a job."""
    names = ("id", "model", "fine_tuned_model", "status", "training_file", "validation_file", "seed", "trained_tokens")
    method = _plain(getattr(job, "method", None))
    kind = method.get("type") or "supervised"
    own = (method.get(kind) or {}).get("hyperparameters") or {}
    given = _plain(getattr(job, "hyperparameters", None)) | {k: v for k, v in _plain(own).items() if v is not None}
    return {**{name: getattr(job, name, None) for name in names}, "method": kind, "hyperparameters": given}


def _plain(value: Any) -> dict[str, Any]:
    found: dict[str, Any] = value.model_dump(mode="json") if hasattr(value, "model_dump") else dict(value or {})
    return found


def _recipe(
    folder: Path,
    facts: Mapping[str, Any],
    readings: Mapping[str, Reading],
    base: str,
    technique: str,
    notes: list[str],
) -> TuneRecipe | None:
    """A tuning run here with the job's numbers, as far as they mean the same here. Adds what does not to the notes."""
    given = facts["hyperparameters"]
    objective = "sft" if facts["method"] == "supervised" else str(facts["method"])
    if objective not in OBJECTIVES:
        notes.append(f"no recipe: this tailor has no objective {objective!r}; known: {', '.join(OBJECTIVES)}")
        return None
    epochs, batch_size = given.get("n_epochs"), given.get("batch_size")
    multiplier = given.get("learning_rate_multiplier")
    if isinstance(multiplier, int | float):
        notes.append(
            f"learning_rate_multiplier {multiplier:g} is relative to a rate that OpenAI does not tell: the recipe "
            "leaves the learning rate to the technique's measured default"
        )
    train = {
        "num_epochs": epochs if isinstance(epochs, int | float) else None,
        "batch_size": batch_size if isinstance(batch_size, int) else None,
        "seed": seed if isinstance(seed := facts["seed"], int) and seed >= 0 else 0,
    }
    paths = {side: str(folder / f"{side}.jsonl") for side in readings}
    return TuneRecipe.model_validate(
        {
            "base": base,
            "data": paths,
            "technique": technique,
            "objective": objective,
            "train": train,
            "output": {"name": "".join(c if c.isalnum() or c in "._-" else "-" for c in f"{folder.name}-{technique}")},
            "notes": [f"rows of {facts['id']}, which tuned {facts['model']}"],
        }
    )


def _findings(folder: Path, validated: bool) -> list[str]:
    """What `tailor data check` says of the rows, in the tokens of the embedded base."""
    try:
        report = check(folder / "train.jsonl", validation=folder / "validation.jsonl" if validated else None)
    except TailorError as error:
        return [error.message]
    return [f"{Path(finding.path).name}: {finding.message}" for finding in report.findings]
