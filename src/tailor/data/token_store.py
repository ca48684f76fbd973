"""Bundles as columns of numbers, on disk or in memory: packed in pieces, and made anew at each look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import index as as_index
from typing import overload

import numpy as np

from tailor.data.columns import Columns, Numbers, span
from tailor.data.examples import Bundle, Example
from tailor.data.records import Source

PER_TOKEN, PER_EXAMPLE = "columns.", "values."
"""How the names of an objective's own columns begin."""

Piece = dict[str, Numbers]
Append = Callable[[str, Numbers], None]


class TokenStore(Sequence[Bundle]):
    """The sequences of many rows of one file. A token takes 5 bytes, a row about 24.

    Columns: `token_ids` and `loss_mask` have an entry per token; `ends` (in tokens), `groups` and `lines` one per
    example; `bundle_ends` (in examples) one per bundle; `dropped` has the places of the rows that gave none.
    """

    def __init__(self, columns: Columns, path: str) -> None:
        self.columns = columns
        self.path = path
        self._per_token = {n.removeprefix(PER_TOKEN): c for n, c in columns.by_name.items() if n.startswith(PER_TOKEN)}
        self._per_example = {
            n.removeprefix(PER_EXAMPLE): c for n, c in columns.by_name.items() if n.startswith(PER_EXAMPLE)
        }
        assert {len(c) for c in self._per_token.values()} <= {self.num_tokens}, "some examples lack a column of others"
        assert {len(c) for c in self._per_example.values()} <= {len(columns["ends"])}, "some lack a value of others"

    @property
    def dropped(self) -> Numbers:
        """Places of the rows that are in no bundle."""
        column = self.columns["dropped"]
        return column[0 : len(column)]

    @property
    def num_tokens(self) -> int:
        """Of all rows."""
        return len(self.columns["token_ids"])

    def __len__(self) -> int:
        return len(self.columns["bundle_ends"])

    @overload
    def __getitem__(self, place: int) -> Bundle: ...
    @overload
    def __getitem__(self, place: slice) -> list[Bundle]: ...
    def __getitem__(self, place: int | slice) -> Bundle | list[Bundle]:
        places = range(len(self))[place if isinstance(place, slice) else as_index(place)]
        if isinstance(places, range):
            return [self[k] for k in places]
        first, last = span(self.columns["bundle_ends"], places)
        return tuple(self._example(k) for k in range(first, last))

    def _example(self, k: int) -> Example:
        start, stop = span(self.columns["ends"], k)
        return Example(
            self.columns["token_ids"][start:stop].tolist(),
            self.columns["loss_mask"][start:stop].tolist(),
            int(self.columns["groups"][k : k + 1][0]),
            {name: column[start:stop].tolist() for name, column in self._per_token.items()},
            {name: float(column[k : k + 1][0]) for name, column in self._per_example.items()},
            Source(self.path, int(self.columns["lines"][k : k + 1][0])),
        )


def pack_piece(bundles: Sequence[Bundle]) -> Piece:
    """Some rows as columns, with lengths where the whole has ends; an empty bundle is a row that was dropped."""
    examples = [example for bundle in bundles for example in bundle]
    piece = {
        "token_ids": _flat([e.token_ids for e in examples], np.uint32),
        "loss_mask": _flat([e.loss_mask for e in examples], np.uint8),
        "lengths": np.array([len(e.token_ids) for e in examples], np.int64),
        "groups": np.array([e.group for e in examples], np.int32),
        "lines": np.array([e.source.line for e in examples], np.uint32),
        "sizes": np.array([len(bundle) for bundle in bundles], np.uint32),
    }
    for name in dict.fromkeys(name for e in examples for name in e.columns):
        piece[PER_TOKEN + name] = _flat([e.columns[name] for e in examples], np.float64)
    for name in dict.fromkeys(name for e in examples for name in e.values):
        piece[PER_EXAMPLE + name] = np.array([e.values[name] for e in examples], np.float64)
    return piece


def join_pieces(pieces: Iterable[Piece], append: Append) -> None:
    """Append the pieces, in order, to the columns of a TokenStore."""
    num_rows = num_examples = num_tokens = 0
    for piece in pieces:
        lengths, sizes = piece.pop("lengths"), piece.pop("sizes")
        kept = sizes[sizes > 0]
        append("ends", num_tokens + np.cumsum(lengths))
        append("bundle_ends", (num_examples + np.cumsum(kept)).astype(np.uint32))
        append("dropped", (num_rows + np.flatnonzero(sizes == 0)).astype(np.uint32))
        for name, numbers in piece.items():
            append(name, numbers)
        num_rows += len(sizes)
        num_examples += len(lengths)
        num_tokens += int(lengths.sum())


def _flat(parts: Iterable[Sequence[float]], dtype: type[np.generic]) -> Numbers:
    return np.fromiter(chain.from_iterable(parts), dtype)
