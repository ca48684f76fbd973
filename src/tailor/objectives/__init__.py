"""OBJECTIVES: what is optimised. One file and one line per objective."""

from __future__ import annotations

from collections.abc import Sequence

from tailor.data.records import Record
from tailor.errors import ConfigError, DataError, nearest
from tailor.objectives.objective import Objective, Scored
from tailor.objectives.sft import SFT

OBJECTIVES: dict[str, type[SFT]] = {
    "sft": SFT,
}


def find_objective(name: str) -> Objective:
    """The objective of that name in recipes. Raises ConfigError for a name that is unknown."""
    if name not in OBJECTIVES:
        raise ConfigError(f"objective {name!r} is unknown", hint=nearest(name, OBJECTIVES))
    return OBJECTIVES[name]()


def check_consumed(objective: Objective, *sides: Sequence[Record]) -> None:
    """Raise DataError when rows are not of a kind that the objective consumes. The rows of a side are all of one."""
    for record in (side[0] for side in sides if side):
        if not isinstance(record, objective.consumes):
            wanted = " or ".join(kind.__name__ for kind in objective.consumes)
            raise DataError(
                f"{record.source}: a {type(record).__name__}, but objective {objective.type} wants {wanted}",
                hint="tailor recommend says what these rows are good for",
            )


__all__ = ["OBJECTIVES", "Objective", "Scored", "check_consumed", "find_objective"]
