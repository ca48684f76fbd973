"""The error tree: what went wrong, where, and what to do about it.

    TailorError                 1   anything a person can act on
    ├── ConfigError             3   a recipe, setting or flag is wrong
    ├── DataError               4   a row, file or record is wrong (DamageError: what tailor wrote has changed)
    ├── ResourceError           5   not enough memory, disk or context (Overloaded-, UnavailableError: for now)
    ├── NotFoundError           6   no such artifact, run, base or file
    ├── AuthError               7   a gated model or a key that is missing
    ├── ConflictError           8   it exists already, or belongs to another base
    ├── QualityError            9   a gate failed: parity, or a score below what was asked
    ├── MissingDependencyError 10  an optional package is not installed
    └── InterruptedRunError   130   stopped by Ctrl-C (143: terminated); its checkpoint is saved

The number is the exit code of the command line. Every message says what, where and the nearest valid choice;
`assert` is for programmers, these are for people.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType
from typing import ClassVar


class TailorError(Exception):
    """The root. `hint` is the next thing to try, printed on its own line."""

    exit_code: ClassVar[int] = 1
    code: ClassVar[str] = "failed"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(TailorError):
    """A recipe, a setting or a flag is wrong."""

    exit_code = 3
    code = "config"


class DataError(TailorError):
    """A data file or some of its rows cannot be used."""

    exit_code = 4
    code = "data"


class DamageError(DataError):
    """Files of an artifact are not what they were when they were written."""

    code = "damaged"


class ResourceError(TailorError):
    """It does not fit: memory, disk, or the base's context."""

    exit_code = 5
    code = "resources"


class OverloadedError(ResourceError):
    """Too many requests wait already: the same one may be taken later."""

    code = "overloaded"


class UnavailableError(ResourceError):
    """Something that is needed does not answer for now, such as the database: it may later."""

    code = "unavailable"


class NotFoundError(TailorError):
    """There is no such artifact, run, base or file."""

    exit_code = 6
    code = "not_found"


class AuthError(TailorError):
    """A gated model, or a key that is missing or refused."""

    exit_code = 7
    code = "auth"


class ConflictError(TailorError):
    """It exists already, or it belongs to a different base."""

    exit_code = 8
    code = "conflict"


class QualityError(TailorError):
    """A quality gate failed."""

    exit_code = 9
    code = "quality"


class MissingDependencyError(TailorError):
    """An optional package is not installed."""

    exit_code = 10
    code = "missing_dependency"


class InterruptedRunError(TailorError):
    """A run was stopped by a signal after saving its checkpoint."""

    exit_code = 130
    code = "interrupted"


class TerminatedRunError(InterruptedRunError):
    """A run was stopped by SIGTERM after saving its checkpoint."""

    exit_code = 143
    code = "terminated"


def nearest(word: str, choices: Iterable[str]) -> str:
    """A did-you-mean clause: the closest choice when one is close, then all the choices.

    >>> nearest("lroa", ["full", "lora"])
    "did you mean 'lora'? choices: full, lora"
    """
    known = [str(choice) for choice in choices]
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    listed = "choices: " + ", ".join(known) if known else "there are none"
    return f"did you mean {close[0]!r}? {listed}" if close else listed


def require(module: str, extra: str) -> ModuleType:
    """Import an optional package, or raise MissingDependencyError with the line that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f"this needs the package {module.split('.')[0]!r}, which is not installed",
            hint=f'pip install "tailor-llm[{extra}]"',
        ) from error
