"""Reports of made-up comparisons, as `report.json` holds them. Each is built once; every call gives a copy."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from typing import Any

from comparison_cases import BASES, SIZES, make_cells, make_manifest, make_probes
from tailor.evaluation.comparison import build_report


def make_report(
    num_bases: int = 1,
    num_seeds: int = 1,
    *,
    failed: str | None = None,
    sizes: Sequence[int] = SIZES,
    metric: str = "accuracy",
) -> dict[str, Any]:
    """The report over `sizes`; the technique called `failed` has no result at the largest."""
    report: dict[str, Any] = json.loads(_built(num_bases, num_seeds, failed, tuple(sizes), metric))
    return report


@cache
def _built(num_bases: int, num_seeds: int, failed: str | None, sizes: tuple[int, ...], metric: str) -> str:
    bases = BASES[:num_bases]
    cells = make_cells(bases, num_seeds, failed, sizes)
    manifest = make_manifest(bases, num_seeds, sizes=list(sizes), metric=metric)
    return json.dumps(build_report(manifest, cells, make_probes(bases, failed)))


def empty_report() -> dict[str, Any]:
    """The report of a comparison that was interrupted before anything was measured."""
    return build_report(make_manifest(status="interrupted"), [], [])
