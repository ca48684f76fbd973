"""The bases of a comparison: how they spell the rows, loaded when first needed, the same ones after an interruption."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

from tailor.data.examples import Rendering
from tailor.errors import ConfigError, ConflictError
from tailor.models.base import Base, dtype_name, load_base, pick_device, pick_dtype
from tailor.models.files import fingerprint, is_hosted, weight_files
from tailor.recipes.base_facts import base_facts
from tailor.recipes.compare_settings import CompareRecipe
from tailor.recipes.tune_settings import BaseSettings
from tailor.store import write_json

LOADED = "bases.json"
"""In a comparison's folder: the weights, device and precision that each base was first loaded with."""


def renderings(recipe: CompareRecipe) -> dict[str, Rendering]:
    """How each base spells the rows, known without its weights; nothing of a hosted one.

    Raises ConfigError for a context that it lacks.
    """
    found = {}
    for settings in recipe.base:
        if is_hosted(settings.name):
            continue  # its endpoint knows how it spells them, and what is too long
        facts = base_facts(settings.name)
        longest = recipe.data.max_seq_len or facts.max_seq_len
        if longest > facts.max_seq_len:
            raise ConfigError(
                f"data.max_seq_len {longest} is beyond the context of {settings.name}, {facts.max_seq_len} tokens"
            )
        turns = recipe.data.trained_turns
        found[settings.name] = Rendering(facts.renderer, longest, trained_turns=turns, truncation="drop")
    return found


def machine_facts(recipe: CompareRecipe) -> dict[str, str]:
    """Where the bases run, and in which precision. Raises ConfigError for a device that is not there."""
    found = [_precision(settings) for settings in recipe.base]
    return {key: ", ".join(dict.fromkeys(one[key] for one in found)) for key in ("device", "dtype")}


def _precision(settings: BaseSettings) -> dict[str, str]:
    if is_hosted(settings.name):
        return {"device": "hosted", "dtype": "hosted"}
    device = pick_device(settings.device)
    dtype = dtype_name(pick_dtype(settings.dtype, device))
    return {"device": device.type, "dtype": dtype}


def check_unchanged(recipe: CompareRecipe, folder: Path) -> None:
    """A comparison goes on with the bases it began with. Raises ConflictError for other weights, device, precision."""
    known = _loaded(folder)
    for settings in recipe.base:
        if (was := known.get(settings.name)) is None:
            continue
        now = _precision(settings)
        if weight_files(weights := base_facts(settings.name).folder):  # a hub base may have to be downloaded again
            now["fingerprint"] = fingerprint(weights)
        if changed := [f"{key} was {was[key]}, is {value}" for key, value in now.items() if was[key] != value]:
            raise ConflictError(
                f"base {settings.name} is not what it was when the comparison began ({', '.join(changed)})",
                hint="restore it, or start anew with --force",
            )


def _loaded(folder: Path) -> dict[str, Any]:
    path = folder / LOADED
    return dict(json.loads(path.read_text("utf-8"))) if path.is_file() else {}


class LoadedBase:
    """A base that is loaded when it is first needed: a resumed comparison may not need it at all."""

    def __init__(self, settings: BaseSettings, folder: Path) -> None:
        self.settings = settings
        self._folder = folder
        self._base: Base | None = None

    def get(self) -> Base:
        """The copy that slots share."""
        if self._base is None:
            self._base = self.fresh()
        return self._base

    def fresh(self) -> Base:
        """Another copy of its own, for whoever changes the weights."""
        base = load_base(self.settings.name, self.settings.device, self.settings.dtype, self.settings.quantize)
        known = _loaded(self._folder)
        if base.name not in known:
            dtype = dtype_name(base.dtype)
            known[base.name] = {"fingerprint": base.fingerprint, "device": base.device.type, "dtype": dtype}
            write_json(self._folder / LOADED, known)
        return base

    def drop(self) -> None:
        """Let go of the shared copy and give back what nobody holds: model and slot host refer to each other."""
        self._base = None
        gc.collect()
