"""Whether an artifact belongs to the base that is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tailor.errors import ConflictError
from tailor.models.base import Base, dtype_name

if TYPE_CHECKING:
    from tailor.artifacts.manifest import Artifact


def check_base(base: Base, artifact: Artifact) -> None:
    """Raises ConflictError when the artifact was made on other weights, or on the same ones kept otherwise."""
    expected = artifact.manifest["base"].get("fingerprint")
    if expected and base.fingerprint and expected != base.fingerprint:
        raise ConflictError(
            f"artifact {artifact.name!r} was made on base {artifact.manifest['base']['name']!r} "
            f"(fingerprint {expected[:8]}…), but {base.name!r} has other weights ({base.fingerprint[:8]}…)",
            hint="load the base it was made on",
        )
    trained_on = artifact.manifest["base"].get("quantize")
    if expected and trained_on != base.quantize:
        raise ConflictError(
            f"artifact {artifact.name!r} was trained on {_as_loaded(trained_on)}, "
            f"but {base.name!r} is loaded as {_as_loaded(base.quantize)}: the weights differ",
            hint=f"load it with --quantize {trained_on}, or merge the artifact: that gives a model of full precision"
            if trained_on
            else "load the base without --quantize",
        )


def describe_base(base: Base) -> dict[str, str]:
    """What `tailor.json` says of the base. The fingerprint is that of its files, quantised or not."""
    facts = {"name": base.name, "fingerprint": base.fingerprint, "dtype": dtype_name(base.dtype)}
    return facts if base.quantize is None else {**facts, "quantize": base.quantize}


def _as_loaded(quantize: str | None) -> str:
    return f"the base quantised to {quantize}" if quantize else "the base as it is"
