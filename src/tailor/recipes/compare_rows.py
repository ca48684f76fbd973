"""The rows of a comparison: one test side for everybody, and nested draws of the others for the learning curves."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tailor.data.dataset import Dataset, DataSettings, load_dataset, read, skipped_notes
from tailor.data.examples import Rendering
from tailor.data.prepare import leakage, split
from tailor.data.readers import Reading
from tailor.data.record_store import select
from tailor.data.records import Record
from tailor.data.writers import write_records
from tailor.errors import DataError
from tailor.evaluation.task import answered
from tailor.objectives import check_consumed
from tailor.objectives.objective import Objective
from tailor.recipes.compare_settings import CompareSettings

SPLIT_SEED = 0
"""The test side is the same whatever the comparison's seeds."""

MIN_VALIDATION = 16
"""Validation rows that even the smallest training size gets (if there are so many)."""


@dataclass(frozen=True)
class Draw:
    """What may be learned from at one size with one seed."""

    train: Sequence[Record]
    validation: Sequence[Record]


@dataclass(frozen=True)
class Rows:
    """The three sides of a comparison. No prompt stands on two of them unless the user's own files say so."""

    train: Sequence[Record]
    validation: Sequence[Record]
    test: Sequence[Record]
    content_hash: str
    notes: tuple[str, ...]

    def draw(self, size: int, seed: int) -> Draw:
        """`size` training rows and a share of the validation rows: smaller draws of a seed are part of larger ones."""
        if size >= len(self.train):
            return Draw(self.train, self.validation)
        wanted = max(MIN_VALIDATION, round(size * len(self.validation) / len(self.train)))
        return Draw(_first(self.train, size, seed), _first(self.validation, wanted, seed))

    def describe(self, settings: CompareSettings) -> dict[str, Any]:
        """The manifest's `data` block."""
        return {
            "train": settings.train,
            "validation": settings.validation,
            "test": settings.test,
            "content_hash": self.content_hash,
            "num_rows": len(self.train) + len(self.validation) + len(self.test),
            "num_train": len(self.train),
            "num_validation": len(self.validation),
            "num_test": len(self.test),
            "notes": list(self.notes),
        }


def read_rows(settings: CompareSettings, objective: Objective) -> Rows:
    """Read and split. Raises DataError, NotFoundError."""
    reading = read(settings.train, settings)
    notes = skipped_notes(reading)
    digests, rest = [reading.content_hash], reading.records
    if settings.test is None:
        rest, test = split(rest, validation_fraction=settings.test_fraction, seed=SPLIT_SEED)
    else:
        test = _other(settings.test, settings, digests, notes)
    if settings.validation is None:
        train, validation = split(rest, validation_fraction=settings.validation_fraction, seed=SPLIT_SEED)
    else:
        train, validation = rest, _other(settings.validation, settings, digests, notes)
    test = answered(_drawn(test, settings.max_test_rows, notes))
    check_consumed(objective, train, validation, test)
    notes += _leaks("test", test, "training", train)
    notes += _leaks("test", test, "validation", validation)
    notes += _leaks("validation", validation, "training", train)
    return Rows(train[: settings.max_rows], validation, test, "+".join(digests), tuple(notes))


def _other(path: str, settings: CompareSettings, digests: list[str], notes: list[str]) -> Sequence[Record]:
    reading: Reading = read(path, settings)
    digests.append(reading.content_hash)
    notes += skipped_notes(reading)
    return reading.records


def _leaks(side: str, rows: Sequence[Record], what: str, others: Sequence[Record]) -> list[str]:
    leaked = leakage(others, rows)
    both = {row for row, _ in (*leaked.exact, *leaked.normalised)}
    return [f"{len(both)} of {len(rows)} {side} rows have a prompt that also stands in the {what} rows"] if both else []


def _drawn(records: Sequence[Record], limit: int, notes: list[str]) -> Sequence[Record]:
    if len(records) <= limit:
        return records
    notes.append(f"{limit} of {len(records)} test rows, drawn once (data.max_test_rows)")
    return _first(records, limit, SPLIT_SEED)


def _first(records: Sequence[Record], number: int, seed: int) -> Sequence[Record]:
    """The first rows of a seeded order, in the order of the file."""
    order = list(range(len(records)))
    random.Random(f"draw/{seed}").shuffle(order)
    return select(records, np.array(sorted(order[:number])))


RESERVE = 64
"""Tokens of the context that are left for what techniques add in front of every row (virtual tokens, say)."""


def that_fit(rows: Rows, renderings: Mapping[str, Rendering], settings: CompareSettings) -> Rows:
    """The rows that every base can take with RESERVE tokens to spare: all techniques are measured on the same ones.

    With `truncation: prompt` training rows are cut instead. Raises DataError when a side loses all of its rows.
    """
    sides = {"train": rows.train, "validation": rows.validation, "test": rows.test}
    notes = list(rows.notes)
    for name, records in sides.items():
        if name != "test" and settings.truncation == "prompt":
            continue
        kept = [r for r in records if all(_fits(r, rendering) for rendering in renderings.values())]
        if not kept:
            raise DataError(
                f"none of the {len(records)} {name} rows fits into the base's context with {RESERVE} tokens to spare",
                hint="a base with a longer context, or shorter rows",
            )
        if len(kept) < len(records):
            out = len(records) - len(kept)
            notes.append(f"{out} of {len(records)} {name} rows are longer than the context: left out for everybody")
        sides[name] = kept
    return Rows(sides["train"], sides["validation"], sides["test"], rows.content_hash, tuple(notes))


def _fits(record: Record, rendering: Rendering) -> bool:
    example = rendering.example(record)
    return example is not None and len(example.token_ids) + RESERVE <= rendering.max_seq_len


def does_not_fit(records: Sequence[Record], rendering: Rendering) -> Record | None:
    """The first row that is too long for this rendering (shots, virtual tokens), None when all fit."""
    one = replace(rendering, truncation="drop")
    return next((record for record in records if one.example(record) is None), None)


def sizes_of(wanted: Sequence[int | Literal["all"]], num_train: int) -> tuple[list[int], list[str]]:
    """The sizes as ascending numbers, and a note on those that are larger than the training rows."""
    beyond = [size for size in wanted if size != "all" and size > num_train]
    note = [f"sizes {', '.join(map(str, beyond))}: there are {num_train} training rows"] if beyond else []
    return sorted({num_train if size == "all" else min(size, num_train) for size in wanted}), note


def write_sides(rows: Rows, draw: Draw, folder: Path) -> Dataset:
    """Write what the kept customizations learn from, and the test rows, so that anybody can repeat and verify them."""
    write_records(folder / "train.jsonl", draw.train)
    write_records(folder / "validation.jsonl", draw.validation)
    write_records(folder / "test.jsonl", rows.test)
    return load_dataset(
        DataSettings(train=str(folder / "train.jsonl"), validation=str(folder / "validation.jsonl")), SPLIT_SEED
    )
