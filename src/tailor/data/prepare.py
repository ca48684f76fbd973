"""Split rows into training and validation without a shared prompt; find duplicates and leakage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import numpy as np

from tailor.data.cache import cache_key, cached
from tailor.data.columns import ColumnWriter, Numbers
from tailor.data.parallel import in_ranges
from tailor.data.progress import Progress, silent
from tailor.data.record_store import StoredRecords, select
from tailor.data.records import (
    Comparison,
    Document,
    Judged,
    Rated,
    Record,
    Retrieval,
    conversation,
    prompt_of,
)
from tailor.errors import ConfigError, DataError
from tailor.text.messages import Message

Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Indices = np.ndarray[Any, np.dtype[np.intp]]


class Split(NamedTuple):
    """Rows to train on and rows to validate on, each in the order of the source. Rows on disk stay there."""

    train: Sequence[Record]
    validation: Sequence[Record]


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Groups of row indices with the same content; `normalised` ignores case and the amount of white space."""

    exact: tuple[tuple[int, ...], ...]
    normalised: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Leakage:
    """Pairs (validation row, first training row with the same prompt); `normalised` ignores case and white space."""

    exact: tuple[tuple[int, int], ...]
    normalised: tuple[tuple[int, int], ...]


def split(
    records: Sequence[Record], *, validation_fraction: float = 0.1, seed: int = 0, progress: Progress = silent
) -> Split:
    """Put about `validation_fraction` of the rows aside; rows with the same (normalised) prompt stay together.

    Prompts are ranked by SHA-256 of (seed, prompt), so a prompt's rank does not depend on the other rows nor on
    their order. Down that ranking, whole prompts go to validation while they fit. Both sides get at least one row.
    Raises DataError when there are fewer than two different prompts. The split of rows on disk is kept with them.
    """
    if not 0 < validation_fraction < 1:
        raise ConfigError(f"validation_fraction is {validation_fraction}, it must be between 0 and 1")

    def build(writer: ColumnWriter) -> dict[str, Any]:
        writer.append("aside", _aside(records, validation_fraction, seed, progress))
        return {}

    columns = None
    if isinstance(records, StoredRecords):
        columns = cached("splits", cache_key("split", records.key, validation_fraction, seed), build)
    aside = columns["aside"][0 : len(records)] if columns else _aside(records, validation_fraction, seed, progress)
    return Split(select(records, np.flatnonzero(~aside)), select(records, np.flatnonzero(aside)))


def _aside(records: Sequence[Record], validation_fraction: float, seed: int, progress: Progress) -> Numbers:
    """Which rows go to validation."""
    ranks = _hashes(records, lambda record: f"{seed}\n{prompt_text(record, normalise=True)}", progress)
    num_prompts = sum(1 for _ in islice(_groups(ranks), 2))
    if num_prompts < 2:
        raise DataError(
            f"{len(records)} rows with {num_prompts} different prompts cannot be split: "
            "a prompt must not stand on both sides",
            hint="add rows with other prompts, or name a validation file",
        )
    target = min(max(1, round(validation_fraction * len(records))), len(records) - 1)
    aside = np.zeros(len(records), dtype=bool)
    size = 0
    for group in _groups(ranks):
        if size + len(group) <= target:
            aside[group] = True
            size += len(group)
            if size == target:
                break
    if not size:
        # Every prompt has more rows than are wanted: the smallest group exceeds the target least.
        aside[min(_groups(ranks), key=len)] = True
    return aside


def duplicates(records: Sequence[Record]) -> Duplicates:
    """Rows with the same content (all that is trained on; not source and meta)."""
    found = []
    for normalise in (False, True):
        hashes = _hashes(records, partial(content_text, normalise=normalise))
        repeated = (tuple(map(int, group)) for group in _groups(hashes) if len(group) > 1)
        found.append(tuple(sorted(repeated)))
    return Duplicates(*found)


def leakage(train: Sequence[Record], validation: Sequence[Record]) -> Leakage:
    """Validation rows whose prompt also stands in the training rows: their score shows memory, not skill."""
    found = []
    for normalise in (False, True):
        text = partial(prompt_text, normalise=normalise)
        hashes = np.concatenate([_hashes(train, text), _hashes(validation, text)])
        pairs = []
        for group in _groups(hashes):
            if group[0] < len(train):
                pairs += [(int(index) - len(train), int(group[0])) for index in group if index >= len(train)]
        found.append(tuple(sorted(pairs)))
    return Leakage(*found)


def _hashes(records: Sequence[Record], text: Callable[[Record], str], progress: Progress = silent) -> Hashes:
    """SHA-256 of each record's text, cut to 128 bits (16 bytes per row; two rows in 10⁹ meet with p ≈ 10⁻²¹)."""

    def digests(rows: range) -> bytes:
        return b"".join(hashlib.sha256(text(records[k]).encode()).digest()[:16] for k in rows)

    hashes, done = np.empty((len(records), 2), dtype=np.uint64), 0
    for piece in in_ranges(digests, len(records), "split rows", progress):
        some = np.frombuffer(piece, ">u8").reshape(-1, 2)
        hashes[done : done + len(some)] = some
        done += len(some)
    return hashes


def _groups(hashes: Hashes) -> Iterator[Indices]:
    """Indices of equal hashes, ascending within a group; groups ascend by hash. Views of one array, made one by one."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))
    changes = np.zeros(max(len(order) - 1, 0), dtype=bool)
    for column in (0, 1):
        ranked = hashes[order, column]
        changes |= ranked[1:] != ranked[:-1]
    start = 0
    for end in np.append(np.flatnonzero(changes) + 1, len(order)):
        if end > start:
            yield order[start:end]
        start = end


def prompt_text(record: Record, *, normalise: bool) -> str:
    """What is asked, as one text; `normalise` ignores case and white space. Equal texts are the same prompt."""
    return _text(_prompt(record), normalise=normalise)


def content_text(record: Record, *, normalise: bool) -> str:
    """The whole record as one text; equal texts are duplicates."""
    return _text(_content(record), normalise=normalise)


def _prompt(record: Record) -> tuple[object, ...]:
    if isinstance(record, Comparison | Judged | Rated):
        return record.prompt
    if isinstance(record, Document):
        return (record.text,)
    if isinstance(record, Retrieval):
        return (record.query,)
    return prompt_of(record)


def _content(record: Record) -> tuple[object, ...]:
    if isinstance(record, Comparison):
        return (*record.prompt, "chosen", *record.chosen, "rejected", *record.rejected)
    if isinstance(record, Judged):
        return (*record.prompt, *record.completion, str(record.label))
    if isinstance(record, Rated):
        return (*record.prompt, *record.completion, json.dumps(dict(record.attributes), sort_keys=True))
    if isinstance(record, Document):
        return (record.text,)
    if isinstance(record, Retrieval):
        return (record.query, record.positive, *record.negatives)
    return conversation(record)


def _text(parts: tuple[object, ...], *, normalise: bool) -> str:
    """Parts as one unambiguous string: a list in JSON, so that no two different rows read the same."""
    flat = list(_fields(parts))
    if normalise:
        flat = [" ".join(text.split()).casefold() for text in flat]
    return json.dumps(flat)


def _fields(parts: tuple[object, ...]) -> Iterator[str]:
    for part in parts:
        if isinstance(part, Message):
            yield part.role
            yield part.content
            for call in part.tool_calls:
                yield json.dumps(dict(call), sort_keys=True, default=str)
        else:
            yield str(part)
