"""Which entries of a comparison share a pass: as many as memory holds, decided once per draw and kept for a resume."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

import torch

from tailor.machine import memory
from tailor.models.base import Base
from tailor.recipes.compare_bases import LoadedBase
from tailor.recipes.compare_cells import Comparison, choices, takes_its_row
from tailor.recipes.compare_rows import Draw
from tailor.recipes.compare_settings import Entry
from tailor.store import write_json
from tailor.training.estimate import slot_bytes

GROUPS = "groups.json"


def groups_of(
    comparison: Comparison, loaded: LoadedBase, entries: Sequence[Entry], draw: Draw, key: str
) -> list[list[Entry]]:
    """Entries that are trained in the same pass: as many as half of the free memory holds.

    A resumed comparison trains the same groups as before.
    """
    known = _read(comparison.folder)
    if key not in known:
        known[key] = _that_fit(comparison, loaded.get(), entries, draw)
        write_json(comparison.folder / GROUPS, known)
    return [[entry for entry in entries if entry.title in titles] for titles in known[key]]


def split_off(folder: Path, key: str, titles: Collection[str]) -> None:
    """From now on these entries are trained apart from the others of their groups."""
    known = _read(folder)
    if key not in known:
        return
    parts = [[[t for t in group if t not in titles], [t for t in group if t in titles]] for group in known[key]]
    known[key] = [part for pair in parts for part in pair if part]
    write_json(folder / GROUPS, known)


def _read(folder: Path) -> dict[str, list[list[str]]]:
    path = folder / GROUPS
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


def _that_fit(comparison: Comparison, base: Base, entries: Sequence[Entry], draw: Draw) -> list[list[str]]:
    room = _room(base)
    groups: list[list[str]] = [[]]
    used = 0
    for entry in entries:
        needs = slot_bytes(_num_parameters(comparison, base, entry, draw))
        if groups[-1] and used + needs > room:
            groups.append([])
            used = 0
        groups[-1].append(entry.title)
        used += needs
    return groups


def _room(base: Base) -> int:
    """Half of what is free where the base is."""
    if base.device.type == "cuda":
        return int(torch.cuda.mem_get_info(base.device)[0]) // 2
    free = memory()
    return free[0] // 2 if free is not None else 2**31


def _num_parameters(comparison: Comparison, base: Base, entry: Entry, draw: Draw) -> int:
    """Of all the entry's trials together; 0 when it cannot be attached, which its own turn will report."""
    try:
        slot = base.host.attach(tuple(technique.prepare(draw.train, 0) for technique in entry.technique))
    except Exception as error:
        if not takes_its_row(error):
            raise
        return 0
    base.host.detach(slot)
    return slot.num_parameters * len(choices(entry, comparison.recipe))
