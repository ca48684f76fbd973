"""Rows for tests: people say how they feel, and the mood is to be named."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> Path:
    """One JSON object per line."""
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_moods(folder: Path, column: str = "prompt", repeats: int = 0) -> Path:
    """24 rows, `I feel glad 0` and glad; with `repeats`, up to eight times so many words before the mood.

    Rows of different moods and numbers begin differently then, so that there is nothing to store once for them.
    """
    numbered = [(k, mood) for k in range(12) for mood in ("glad", "sad")]
    before = [f"{k} {mood}: " if repeats else "" for k, mood in numbered]
    said = [f"I feel {'so ' * (k % 9) * repeats}{mood} {k}" for k, mood in numbered]
    lines = [{column: b + s, "completion": m} for b, s, (_, m) in zip(before, said, numbered, strict=True)]
    return write_lines(folder / "moods.jsonl", lines)
