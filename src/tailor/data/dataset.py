"""The `data` block of a recipe, and the records it names: training rows, and validation rows that share no prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from pydantic import Field

from tailor.config import Strict
from tailor.data.examples import Truncation
from tailor.data.formats import FORMATS
from tailor.data.prepare import leakage, split
from tailor.data.progress import Progress, silent
from tailor.data.readers import Reading, read_rows
from tailor.data.records import Record
from tailor.data.task_rows import FIELDS, with_templates
from tailor.text.render import TrainedTurns
from tailor.text.template import Templates

NO_TEMPLATES: Templates = MappingProxyType({})


class ReadSettings(Strict):
    """How a file of rows is read."""

    format: str = Field("auto", description="auto, or one of the formats of docs/formats.md")
    columns: dict[str, str] = Field(
        {}, description="our name → the file's column, e.g. {prompt: text, completion: label}"
    )
    skip_bad_rows: bool = Field(False, description="go on without the rows that cannot be used (they are listed)")


class DataSettings(ReadSettings):
    """The `data` block."""

    train: str = Field(description="the training file: JSONL, JSON, CSV, TSV, Parquet, .gz, .zst")
    validation: str | None = Field(None, description="the validation file; split off the training file when not given")
    validation_fraction: float = Field(0.1, gt=0, lt=1, description="share of the prompts that the split sets aside")
    max_rows: int | None = Field(None, ge=1, description="use only the first rows of the training split")
    max_seq_len: int | None = Field(
        None, ge=8, description="longest sequence in tokens; the base's context when not given"
    )
    truncation: Truncation = Field(
        "error", description="rows that do not fit: error, prompt (drop its start), drop (the row)"
    )
    trained_turns: TrainedTurns = Field("all", description="assistant turns in the loss: all, or last")


@dataclass(frozen=True)
class Dataset:
    """Records ready for a run. `notes` says what a person should know: skipped rows, prompts on both sides."""

    train: Sequence[Record]
    validation: Sequence[Record]
    content_hash: str
    notes: tuple[str, ...]


def load_dataset(
    settings: DataSettings, seed: int, progress: Progress = silent, templates: Templates = NO_TEMPLATES
) -> Dataset:
    """Read and split. Raises DataError, NotFoundError. A seeded split keeps each prompt on one side.

    `templates` of the tasks that are trained say what fields their rows have.
    """
    reading = read(settings.train, settings, progress, templates, training=True)
    notes = skipped_notes(reading)
    if settings.validation is None:
        train, validation = split(
            reading.records, validation_fraction=settings.validation_fraction, seed=seed, progress=progress
        )
        digest = reading.content_hash
    else:
        other = read(settings.validation, settings, progress, templates, training=True)
        notes += skipped_notes(other)
        train, validation = reading.records, other.records
        digest = f"{reading.content_hash}+{other.content_hash}"
        leaked = leakage(train, validation)
        if both := {row for row, _ in (*leaked.exact, *leaked.normalised)}:
            notes.append(f"{len(both)} validation rows have a prompt that also stands in the training file")
    return Dataset(train[: settings.max_rows], validation, digest, tuple(notes))


def read(
    path: str,
    settings: ReadSettings,
    progress: Progress = silent,
    templates: Templates = NO_TEMPLATES,
    *,
    training: bool = False,
) -> Reading:
    """The records of one file. Raises NotFoundError, DataError.

    With a template whose fields are not `prompt` and `completion` alone, rows are read as its fields unless the
    settings name another format.
    """
    formats = with_templates(FORMATS, templates, training=training)
    return read_rows(
        path,
        formats,
        format=FIELDS if settings.format == "auto" and FIELDS in formats else settings.format,
        columns=settings.columns,
        skip_bad_rows=settings.skip_bad_rows,
        progress=progress,
    )


def skipped_notes(reading: Reading) -> list[str]:
    """What a person should know of a file that was read without its bad rows; nothing when it had none."""
    if not reading.bad_rows:
        return []
    lines = ", ".join(str(row.line) for row in reading.bad_rows[:10])
    more = "" if len(reading.bad_rows) <= 10 else ", …"
    return [f"{reading.path}: {len(reading.bad_rows)} bad rows were skipped (lines {lines}{more})"]
