"""Records → bundles: many rows by several processes, kept under the home for the next run that wants the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from tailor.data.cache import cache_key, cached
from tailor.data.columns import Columns, ColumnWriter, Numbers
from tailor.data.examples import Bundle, Example, Rendering
from tailor.data.parallel import in_ranges
from tailor.data.progress import Progress, silent
from tailor.data.record_store import StoredRecords, select
from tailor.data.records import Record
from tailor.data.token_store import Piece, TokenStore, join_pieces, pack_piece

MakeExamples = Callable[[Record, Rendering], Sequence[Example]]
"""An objective's `examples`: the sequences of a record, none when the rendering drops it."""


def tokenise(
    records: Sequence[Record],
    make: MakeExamples,
    rendering: Rendering,
    *,
    made_by: Sequence[Any] | None = None,
    progress: Progress = silent,
) -> tuple[Sequence[Bundle], Sequence[Record]]:
    """The sequences of every record, and the records that `truncation: drop` left out.

    Those of records on disk are a TokenStore. It is kept for later runs when `made_by` names, in values that JSON
    knows, all that the sequences depend on beside records and rendering: the objective, and what `compose` does.
    Raises DataError naming file and line for the first row that cannot be rendered.
    """
    if not isinstance(records, StoredRecords) or not records:
        bundles = [tuple(make(record, rendering)) for record in records]
        dropped = [record for record, bundle in zip(records, bundles, strict=True) if not bundle]
        return [bundle for bundle in bundles if bundle], dropped

    def pack(rows: range) -> Piece:
        return pack_piece([tuple(make(records[k], rendering)) for k in rows])

    def build(writer: ColumnWriter) -> Mapping[str, Any]:
        join_pieces(in_ranges(pack, len(records), "tokenise rows", progress), writer.append)
        return {}

    key = _key(records, rendering, made_by)
    columns = cached("tokens", key, build) if key is not None else None
    if columns is None:
        columns = _in_memory(in_ranges(pack, len(records), "tokenise rows", progress))
    store = TokenStore(columns, records[0].source.path)
    return store, select(records, store.dropped)


def _in_memory(pieces: Iterable[Piece]) -> Columns:
    parts: dict[str, list[Numbers]] = {}
    join_pieces(pieces, lambda name, numbers: parts.setdefault(name, []).append(numbers))
    return Columns({name: np.concatenate(part) for name, part in parts.items()}, {})


def _key(records: StoredRecords, rendering: Rendering, made_by: Sequence[Any] | None) -> str | None:
    """None when something that the sequences depend on has no name."""
    tokenizer = rendering.renderer.tokenizer.fingerprint
    if made_by is None or tokenizer is None:
        return None
    limits = (rendering.max_seq_len, rendering.trained_turns, rendering.truncation, list(rendering.prefix_ids))
    tasks = [
        [name, list(prompt.ids), prompt.template and prompt.template.model_dump(mode="json")]
        for name, prompt in rendering.tasks.items()
    ]
    own = (*limits, tasks, rendering.task, rendering.training)
    return cache_key("tokens", records.key, type(rendering.renderer).__name__, tokenizer, *own, list(made_by))
