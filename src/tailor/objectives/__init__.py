"""OBJECTIVES: what is optimised. One file and one line per objective."""

from __future__ import annotations

from tailor.objectives.objective import Objective, Scored
from tailor.objectives.sft import SFT

OBJECTIVES: dict[str, type[SFT]] = {
    "sft": SFT,
}

__all__ = ["OBJECTIVES", "Objective", "Scored"]
