"""The probes of a comparison: what customizations cost in use, whether they share a batch, what they forgot."""

from __future__ import annotations

import gc
import hashlib
import json
import shutil
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
from tailor.models.base import Base, dtype_name, load_base
from tailor.models.files import is_hosted
from tailor.models.slots import Slot
from tailor.recipes.compare_cells import Comparison, takes_its_row
from tailor.recipes.tune_settings import BaseSettings
from tailor.store import write_json
from tailor.text.messages import Message

NUM_PROMPTS = 8
"""Test prompts that the probes ask, evenly spread over the test rows."""

MERGED = "merged"
"""In a comparison's folder, for as long as it is measured: a customization folded into a copy of the base."""

NUM_TOKENS = 16
"""New tokens of each request that is timed."""

SHARED = "time_to_first_shared"

Prompts = Sequence[tuple[Message, ...]]


def probe(comparison: Comparison) -> list[dict[str, Any]]:
    """Probe every base and its kept customizations; what is on disk already is not measured again."""
    if not comparison.recipe.save:
        return []
    found = []
    for number, settings in enumerate(comparison.recipe.base, 1):
        if is_hosted(settings.name):
            continue  # its speed is its network's; what it cost stands in the notes of its rows
        digest = hashlib.sha256(settings.name.encode()).hexdigest()[:8]
        path = comparison.folder / "probes" / f"{number}-{digest}.json"
        if not path.is_file():
            comparison.progress("probes", number, len(comparison.recipe.base))
            write_json(path, _probe(comparison, settings))
        found.append(json.loads(path.read_text("utf-8")))
    return found


def _probe(comparison: Comparison, settings: BaseSettings) -> dict[str, Any]:
    """Everything about one base. A probe that fails leaves its message and takes nothing else with it."""
    found: dict[str, Any] = {"base": settings.name, "latency": {}, "merged": {}, "mixed_batch": None}
    found |= {"forgetting": {}, "errors": {}}
    kept = _kept(comparison, settings.name, found)
    texts = passages(comparison.recipe.general_text)
    base = load_base(settings.name, settings.device, settings.dtype, settings.quantize)
    slots, prompts = _together(found, kept, base, _spread([prompt_of(r) for r in comparison.rows.test]), texts)
    with _noted(found, "latency"):
        found["latency"] = {
            "base": latency(LocalBackend(base), [None], prompts, max_new_tokens=NUM_TOKENS)[None].to_dict()
        }
        _time_alone(found, slots, base, settings, prompts)
    for name, artifact in kept.items():
        with _noted(found, name):
            if artifact.is_base:
                _owned(found, name, artifact, base, settings, prompts, texts)
            elif name in slots and all(technique.traits.merges for technique in artifact.techniques):
                _merged(found, name, artifact, base, prompts, comparison.folder / MERGED)
    return found


def _together(
    found: dict[str, Any], kept: Mapping[str, Artifact], base: Base, prompts: Prompts, texts: Sequence[str]
) -> tuple[dict[str, Artifact], Prompts]:
    """What is measured with all slots on the base; returns those that go there, and the prompts with room for all."""
    backend = LocalBackend(base)
    for name, artifact in kept.items():
        if not artifact.is_base:
            with _noted(found, name):
                backend.slots[name] = attach(base, artifact)
    names: list[str | None] = [None, *backend.slots]
    with _noted(found, "mixed batch"):
        found["mixed_batch"] = mixed_batch(backend, list(backend.slots), prompts).to_dict() if backend.slots else None
    with _noted(found, "forgetting"):
        found["forgetting"] = _named(forgetting(backend, names, texts))
    room = {name: base.room(backend.slot(name)) - NUM_TOKENS for name in names}
    fit = [p for p in prompts if all(len(backend.rendering(name).prompt(p)) <= room[name] for name in names)]
    for slot in backend.slots.values():
        base.host.detach(slot)
    return {name: kept[name] for name in backend.slots}, fit or prompts


def _time_alone(
    found: dict[str, Any], slots: Mapping[str, Artifact], base: Base, settings: BaseSettings, prompts: Prompts
) -> None:
    """Each customization with the base to itself, beside a plain copy: wrapped layers are slower for everybody."""
    plain = LocalBackend(base)
    if slots and base.num_parameters < MAX_TWIN_PARAMETERS:
        plain = LocalBackend(load_base(settings.name, settings.device, settings.dtype, settings.quantize))
    for name, artifact in slots.items():
        with _noted(found, name), _attached(base, artifact) as slot:
            found["latency"][name] = _paired(found, LocalBackend(base, {name: slot}), name, plain, prompts)


@contextmanager
def _attached(base: Base, artifact: Artifact) -> Iterator[Slot]:
    slot = attach(base, artifact)
    try:
        yield slot
    finally:
        base.host.detach(slot)


@contextmanager
def _noted(found: dict[str, Any], name: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not takes_its_row(error):
            raise
        found["errors"][name] = f"{type(error).__name__}: {error}"


def _kept(comparison: Comparison, base: str, found: dict[str, Any]) -> dict[str, Artifact]:
    """The artifacts of the largest size, by their entry's name."""
    cells = [cell for cell in comparison.cells() if cell["base"] == base and cell["main"] and cell["artifact"]]
    order = [entry.title for entry in comparison.recipe.techniques]
    kept: dict[str, Artifact] = {}
    for cell in sorted(cells, key=lambda c: order.index(c["name"])):
        with _noted(found, cell["name"]):
            kept[cell["name"]] = find(cell["artifact"])
    return kept


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
    gc.collect()  # of the model before: it and its slot host refer to each other
    own = LocalBackend(load_base(artifact.folder, settings.device, dtype_name(base.dtype)))
    found["forgetting"][name] = forgetting(own, [None], texts)[None].to_dict()
    if found["latency"]:
        found["latency"][name] = _paired(found, own, None, LocalBackend(base), prompts)


def _merged(found: dict[str, Any], name: str, artifact: Artifact, base: Base, prompts: Prompts, folder: Path) -> None:
    """The customization folded into a copy of the base, which is written to `folder` and removed again."""
    if base.num_parameters >= MAX_TWIN_PARAMETERS or not found["latency"]:
        return
    gc.collect()
    shutil.rmtree(folder, ignore_errors=True)  # left by a kill
    folder.mkdir()
    try:
        with _attached(base, artifact) as slot:
            write_merged(base, slot, artifact.techniques, folder)
        own = LocalBackend(load_base(folder, str(base.device), dtype_name(base.dtype)))
        found["merged"][name] = _paired(found, own, None, LocalBackend(base), prompts)
    finally:
        shutil.rmtree(folder)


def _paired(
    found: Mapping[str, Any], own: LocalBackend, name: str | None, plain: LocalBackend, prompts: Prompts
) -> dict[str, Any]:
    """A customization's speed in the units of the base's first measurement: both are timed anew, taking turns.

    A machine's speed drifts over minutes by more than two models of one shape differ.
    """
    timed = latency(own, [name], prompts, models={"base": plain}, max_new_tokens=NUM_TOKENS)
    now, then, before = timed[name].to_dict(), timed["base"].to_dict(), found["latency"]["base"]
    scaled: tuple[str, ...] = ("time_to_first_token", "seconds_per_token", "seconds_per_request")
    if None not in (now[SHARED], then[SHARED], before[SHARED]):
        scaled = (*scaled, SHARED)
    return {**now, **{key: now[key] / then[key] * before[key] for key in scaled}}


def _spread(prompts: Prompts) -> Prompts:
    step = max(1, len(prompts) // NUM_PROMPTS)
    return prompts[::step][:NUM_PROMPTS]


def passages(path: str | None) -> Sequence[str]:
    """Text that is not the task: the user's, one passage per line, or tailor's own. Raises DataError."""
    if path is None:
        return general_texts()
    try:
        lines = [line.strip() for line in Path(path).read_text("utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: {error}") from None
    if not any(lines):
        raise DataError(f"{path}: there is no text in it")
    return [line for line in lines if line]
