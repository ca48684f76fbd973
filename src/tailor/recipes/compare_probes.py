"""The probes of a comparison: what customizations cost in use, whether they share a batch, what they forgot."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tailor.artifacts.artifact import Artifact, attach, find, write_merged
from tailor.data.records import prompt_of
from tailor.errors import DataError
from tailor.evaluation.parity import MAX_TWIN_PARAMETERS
from tailor.evaluation.probes import forgetting, general_texts, latency, mixed_batch
from tailor.inference.local import LocalBackend
from tailor.models.base import Base, load_base
from tailor.recipes.compare_cells import Comparison, takes_its_row
from tailor.recipes.tune import BaseSettings
from tailor.runs import home
from tailor.store import write_json
from tailor.text.messages import Message

NUM_PROMPTS = 8
"""Test prompts that the probes ask, evenly spread over the test rows."""

Prompts = Sequence[tuple[Message, ...]]


def probe(comparison: Comparison) -> list[dict[str, Any]]:
    """Probe every base's kept customizations; what is on disk already is not measured again."""
    found = []
    for number, settings in enumerate(comparison.recipe.base, 1):
        digest = hashlib.sha256(settings.name.encode()).hexdigest()[:8]
        path = comparison.folder / "probes" / f"{number}-{digest}.json"
        if not path.is_file():
            comparison.progress("probes", number, len(comparison.recipe.base))
            write_json(path, _probe(comparison, settings))
        found.append(json.loads(path.read_text("utf-8")))
    return found


def _probe(comparison: Comparison, settings: BaseSettings) -> dict[str, Any]:
    """Everything about one base. A probe that fails leaves its message and takes nothing else with it."""
    kept = _kept(comparison, settings.name)
    prompts = _spread([prompt_of(record) for record in comparison.rows.test])
    texts = _texts(comparison.recipe.general_text)
    found: dict[str, Any] = {"base": settings.name, "latency": {}, "merged": {}, "mixed_batch": None}
    found |= {"forgetting": {}, "errors": {}}
    base = load_base(settings.name, settings.device, settings.dtype)
    backend = LocalBackend(base)
    for name, artifact in kept.items():
        if not artifact.is_base:
            with _noted(found, name):
                backend.slots[name] = attach(base, artifact)
    names: list[str | None] = [None, *backend.slots]
    with _noted(found, "latency"):
        found["latency"] = _named(latency(backend, names, prompts))
    with _noted(found, "mixed batch"):
        found["mixed_batch"] = mixed_batch(backend, list(backend.slots), prompts).to_dict() if backend.slots else None
    with _noted(found, "forgetting"):
        found["forgetting"] = _named(forgetting(backend, names, texts))
    for name, artifact in kept.items():
        with _noted(found, name):
            if artifact.is_base:
                _owned(found, name, artifact, base, settings, prompts, texts)
            elif all(technique.traits.merges for technique in artifact.techniques):
                _merged(found, name, artifact, backend, prompts)
    return found


@contextmanager
def _noted(found: dict[str, Any], name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not takes_its_row(error):
            raise
        found["errors"][name] = f"{type(error).__name__}: {error}"


def _kept(comparison: Comparison, base: str) -> dict[str, Artifact]:
    """The artifacts of the largest size, by their entry's name."""
    cells = [cell for cell in comparison.cells() if cell["base"] == base and cell["main"] and cell["artifact"]]
    order = [entry.title for entry in comparison.recipe.techniques]
    return {cell["name"]: find(cell["artifact"]) for cell in sorted(cells, key=lambda c: order.index(c["name"]))}


def _named(found: Mapping[str | None, Any]) -> dict[str, Any]:
    return {"base" if name is None else name: value.to_dict() for name, value in found.items()}


def _owned(
    found: dict[str, Any],
    name: str,
    artifact: Artifact,
    base: Base,
    settings: BaseSettings,
    prompts: Prompts,
    texts: Sequence[str],
) -> None:
    """A model of its own answers as a base does."""
    own = LocalBackend(load_base(artifact.folder, settings.device, str(base.dtype).removeprefix("torch.")))
    found["latency"][name] = _paired(own, LocalBackend(base), prompts, found["latency"]["base"])
    found["forgetting"][name] = forgetting(own, [None], texts)[None].to_dict()


def _merged(found: dict[str, Any], name: str, artifact: Artifact, backend: LocalBackend, prompts: Prompts) -> None:
    """The customization folded into a copy of the base."""
    base = backend.base
    if base.num_parameters >= MAX_TWIN_PARAMETERS:
        return
    with tempfile.TemporaryDirectory(dir=home(), prefix=".merged-") as folder:
        write_merged(base, backend.slots[name], artifact.techniques, Path(folder))
        own = LocalBackend(load_base(folder, str(base.device), str(base.dtype).removeprefix("torch.")))
        found["merged"][name] = _paired(own, LocalBackend(base), prompts, found["latency"]["base"])


def _paired(own: LocalBackend, base: LocalBackend, prompts: Prompts, before: Mapping[str, Any]) -> dict[str, Any]:
    """Another model's speed, in the units of the base's first measurement: both are timed anew, taking turns.

    A machine's speed drifts over minutes by more than two models of one shape differ.
    """
    timed = latency(base, [None], prompts, models={"own": own})
    now, then = timed["own"].to_dict(), timed[None].to_dict()
    scaled = ("time_to_first_token", "seconds_per_token", "seconds_per_request")
    return {**now, **{key: now[key] / then[key] * before[key] for key in scaled}}


def _spread(prompts: Prompts) -> Prompts:
    step = max(1, len(prompts) // NUM_PROMPTS)
    return prompts[::step][:NUM_PROMPTS]


def _texts(path: str | None) -> Sequence[str]:
    """Passages that are not the task: the user's, or tailor's own."""
    if path is None:
        return general_texts()
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    if not any(lines):
        raise DataError(f"{path}: there is no text in it")
    return [line for line in lines if line]
