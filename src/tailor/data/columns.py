"""Long columns of numbers in the files of a folder: written piece by piece, read where needed, checked by hash."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from tailor.store import file_hash, write_json

INDEX = "columns.json"
Numbers = np.ndarray[Any, np.dtype[Any]]


class FileColumn:
    """A column that stays in its file: `column[start:stop]` reads that part.

    It is read, not mapped: mapped pages count as the memory of the process that touched them, and a run that draws
    its rows at random touches all of them.
    """

    def __init__(self, path: Path, dtype: str) -> None:
        self._dtype = np.dtype(dtype)
        self._file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._file)

    def __len__(self) -> int:
        return os.fstat(self._file).st_size // self._dtype.itemsize

    def __getitem__(self, part: slice) -> Numbers:
        start, size = part.start * self._dtype.itemsize, (part.stop - part.start) * self._dtype.itemsize
        return np.frombuffer(os.pread(self._file, size, start), self._dtype)


Column = FileColumn | Numbers
"""Has a length, and `column[start:stop]`."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns by name, and the facts that were written beside them."""

    by_name: Mapping[str, Column]
    facts: Mapping[str, Any]

    def __getitem__(self, name: str) -> Column:
        return self.by_name[name]


class ColumnWriter:
    """Appends to columns in a folder; the first piece of a column decides its type. `close` makes the folder whole."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, BinaryIO] = {}
        self._hashes: dict[str, Any] = {}
        self._dtypes: dict[str, str] = {}

    def append(self, name: str, piece: Numbers) -> None:
        """Write more of the column of that name."""
        if name not in self._files:
            self._files[name] = open(self.folder / name, "xb")  # noqa: SIM115 - `close` closes it
            self._hashes[name] = hashlib.sha256()
            self._dtypes[name] = piece.dtype.str
        assert self._dtypes[name] == piece.dtype.str, f"column {name} is {self._dtypes[name]}, not {piece.dtype.str}"
        content = piece.tobytes()
        self._files[name].write(content)
        self._hashes[name].update(content)

    def written(self) -> Columns:
        """The columns as far as they are written."""
        for file in self._files.values():
            file.flush()
        return Columns({name: FileColumn(self.folder / name, dtype) for name, dtype in self._dtypes.items()}, {})

    def close(self, facts: Mapping[str, Any] | None) -> None:
        """Close the files. Only with `facts` can the folder be opened."""
        for file in self._files.values():
            file.close()
        if facts is not None:
            columns = {name: [self._dtypes[name], self._hashes[name].hexdigest()] for name in self._files}
            write_json(self.folder / INDEX, {"columns": columns, "facts": facts})


def open_columns(folder: Path) -> Columns | None:
    """The columns of a folder; None when it is not there or not as it was written (all of it is read and hashed)."""
    try:
        index = json.loads((folder / INDEX).read_bytes())
        columns: dict[str, tuple[str, str]] = index["columns"]
        if any(file_hash(folder / name) != digest for name, (_, digest) in columns.items()):
            return None
        found = {name: FileColumn(folder / name, dtype) for name, (dtype, _) in columns.items()}
        return Columns(found, index["facts"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def span(ends: Column, k: int) -> tuple[int, int]:
    """(start, stop) of item k of those that stand side by side and end at `ends`."""
    around = ends[max(k - 1, 0) : k + 1]
    return int(around[0]) if k else 0, int(around[-1])
