"""What a server can be asked for by name: bases, and the customizations made on them; loaded when they are asked for.

A base is loaded once for all its customizations. Models of their own (full fine-tunes, merged) are further bases; when
the memory for bases is used up, the one that was asked for longest ago makes room.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from torch import Tensor

from tailor.artifacts.artifact import Artifact, attach, find, survey
from tailor.artifacts.files import damage_told, read_state
from tailor.artifacts.integrity import intact
from tailor.errors import ConflictError, NotFoundError, OverloadedError, ResourceError, nearest
from tailor.inference.engine import Engine, EngineSettings
from tailor.inference.freshness import Freshness
from tailor.inference.local import LocalBackend
from tailor.models.base import Base, load_base

Loading = tuple[LocalBackend, str | None]
"""What answers for a name, and the artifact's name on it."""


@dataclass(frozen=True)
class ModelCard:
    """One name that can be asked for. `base` is what it was made on, None for a base; `root` is where it is.

    `artifact` is its name on disk, where `id` may be another name of the same.
    """

    id: str
    artifact: str | None
    base: str | None
    kind: str
    status: str
    created: int
    root: str


@dataclass(eq=False)
class Loaded:
    """A base in memory, with the backend that answers for it and its customizations."""

    name: str
    backend: LocalBackend
    used: float = field(default_factory=time.monotonic)
    pinned: bool = False

    @property
    def base(self) -> Base:
        """The base."""
        return self.backend.base

    @property
    def num_bytes(self) -> int:
        """Memory of its weights."""
        model = self.base.model
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


class Library:
    """The bases that are served, by name, and the artifacts of TAILOR_HOME that were made on one of them.

    `names` restricts which artifacts are served (None: all). `settings` are those of every base's engine. `alias` finds
    the artifact behind a further name (that of a fine-tuning job's model), `aliases` lists all of them. Further bases
    stay within `max_base_bytes`, and are loaded with `device`, `dtype` (auto: as they were trained) and `quantize`.
    """

    def __init__(  # noqa: PLR0913 - what is served, and how further bases are loaded
        self,
        bases: Sequence[Base],
        *,
        names: Sequence[str] | None = None,
        settings: EngineSettings | None = None,
        max_base_bytes: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        alias: Callable[[str], str | None] = lambda name: None,
        aliases: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._settings = settings
        self._names = None if names is None else set(names)
        self._extra: dict[str, Artifact] = {}
        self._max_base_bytes = max_base_bytes
        self._device, self._dtype, self._quantize = device, dtype, quantize
        self._lock = threading.RLock()
        self._fresh = Freshness()
        self._alias = alias
        self._aliases = aliases
        self.started = int(time.time())
        self.loaded: dict[str, Loaded] = {}
        for base in bases:
            self._install(base.name, base, pinned=True)

    @property
    def engines(self) -> list[Engine]:
        """Those of all bases in memory."""
        with self._lock:
            return [loaded.backend.engine for loaded in self.loaded.values()]

    def cards(self) -> list[ModelCard]:
        """Everything that can be asked for, each once, bases first. What has a further name is listed by that."""
        own, others = self._named()
        told = {card.artifact for card in others}
        return [*(card for card in own if card.artifact is None or card.artifact not in told), *others]

    def _named(self) -> tuple[list[ModelCard], list[ModelCard]]:
        """Cards by the models' own names, and by further names."""
        with self._lock:
            bases = [
                ModelCard(name, None, None, "base", "loaded", self.started, str(loaded.base.folder))
                for name, loaded in self.loaded.items()
                if loaded.pinned
            ]
        made = {artifact.name: self._card(artifact) for artifact in self._artifacts()}
        others = [replace(made[name], id=other) for other, name in self._aliases().items() if name in made]
        return [*bases, *made.values()], others

    def card(self, name: str) -> ModelCard:
        """What is known of a name. Raises NotFoundError, and DamageError where `tailor.json` is damaged."""
        cards = {card.id: card for cards in self._named() for card in cards}
        if name not in cards:
            own = self._alias(name) or name
            if (damage := survey()[1].get(own)) is not None and (self._names is None or own in self._names):
                raise damage
            raise NotFoundError(f"there is no model {name!r}", hint=nearest(name, cards))
        return cards[name]

    def ready(self, name: str) -> Loading | None:
        """The backend and the artifact's name on it, when all is in memory already and was not deleted or replaced."""
        meant = name if self._is_in_memory(name) else self._alias(name) or name  # a query: not under the lock
        if not self._fresh.is_current(meant):
            return None
        with self._lock:
            if meant in self.loaded:
                return self._used(self.loaded[meant]), None
            for loaded in self.loaded.values():
                if meant in loaded.backend.slots:
                    return self._used(loaded), meant
        return None

    def outdated(self) -> list[str]:
        """What is in memory and was deleted or replaced on disk, by whomever: it is to be dropped."""
        return self._fresh.outdated()

    def fetch(self, name: str) -> Callable[[], Loading]:
        """Read what is needed for a name, beside running passes; what it returns must be called between passes.

        Raises NotFoundError for an unknown name, and DamageError for an artifact whose files are not those that were
        written (see `intact`).
        """
        card = self.card(name)
        if card.artifact is None:
            return lambda: (self._used(self.loaded[card.id]), None)
        own = card.artifact
        artifact = find(self._extra[own].folder if own in self._extra else own)
        with damage_told(artifact.name, artifact.folder):
            artifact = intact(artifact)
        if artifact.is_base:
            dtype = self._dtype if self._dtype != "auto" else str(artifact.manifest["base"].get("dtype", "auto"))
            with damage_told(artifact.name, artifact.folder):
                base = load_base(artifact.folder, self._device, dtype, self._quantize)
            return lambda: self._noted(own, artifact, self._install(own, base))
        with damage_told(artifact.name, artifact.folder):
            state = read_state(artifact.folder, artifact.techniques)
        return lambda: self._noted(own, artifact, self._attach(artifact, own, state))

    def add(self, name: str, folder: Path) -> None:
        """Serve an artifact that lies in a folder of its own.

        Raises ConflictError when the name is taken, be it by an artifact of TAILOR_HOME that is not served.
        """
        found, damaged = survey()
        kept = {artifact.name for artifact in found} | {artifact.folder.name for artifact in found} | set(damaged)
        if name in kept or any(card.id == name for cards in self._named() for card in cards):
            raise ConflictError(f"there is a model {name!r} already")
        artifact = find(folder)
        if artifact.is_base:
            raise ConflictError(f"{folder} is a model of its own, not an adapter")
        self._extra[name] = artifact

    def check_own(self, name: str) -> None:
        """Raise ConflictError for an artifact that was added from a folder: its files are not the library's."""
        if name in self._extra:
            raise ConflictError(
                f"{name} was loaded from a folder of its own: unload it, its files are not the server's"
            )

    def drop(self, name: str) -> None:
        """Detach an artifact, or unload a further base; between passes. What is on disk stays."""
        with self._lock:
            loaded = self.loaded.get(name)
            if loaded is not None and not loaded.pinned:
                del self.loaded[name]
            for other in self.loaded.values():
                slot = other.backend.slots.pop(name, None)
                if slot is not None:
                    other.base.host.detach(slot)
        self._extra.pop(name, None)
        self._fresh.forget(name)

    def _noted(self, name: str, artifact: Artifact, loaded: Loading) -> Loading:
        """Watch what was loaded from TAILOR_HOME."""
        if name not in self._extra:
            self._fresh.note(name, artifact)
        return loaded

    def _is_in_memory(self, name: str) -> bool:
        with self._lock:
            return name in self.loaded or any(name in loaded.backend.slots for loaded in self.loaded.values())

    def _artifacts(self) -> list[Artifact]:
        fingerprints = self._fingerprints()
        kept = [a for a in survey()[0] if self._names is None or a.name in self._names]
        found = [a for a in kept if a.is_base or a.manifest["base"].get("fingerprint") in fingerprints]
        return found + [Artifact(name, a.folder, a.manifest) for name, a in self._extra.items()]

    def _fingerprints(self) -> dict[str, Loaded]:
        with self._lock:
            return {loaded.base.fingerprint: loaded for loaded in self.loaded.values() if loaded.pinned}

    def _card(self, artifact: Artifact) -> ModelCard:
        created = artifact.manifest.get("created")
        stamp = int(datetime.fromisoformat(created).timestamp()) if created else self.started
        status = "loaded" if self._is_in_memory(artifact.name) else "available"
        base = str(artifact.manifest.get("base", {}).get("name", ""))
        return ModelCard(artifact.name, artifact.name, base, artifact.kind, status, stamp, str(artifact.folder))

    def _attach(self, artifact: Artifact, name: str, state: Mapping[str, Tensor]) -> Loading:
        """Attach an artifact, whose weights have been read, to the base it was made on, which is in memory."""
        fingerprint = artifact.manifest["base"].get("fingerprint")
        bases = self._fingerprints()
        loaded = bases.get(fingerprint) or next(iter(bases.values()))
        if name not in loaded.backend.slots:
            slot = attach(loaded.base, artifact, state)  # nobody else attaches: only names are under the lock
            with self._lock:
                loaded.backend.slots[name] = slot
        return self._used(loaded), name

    def _install(self, name: str, base: Base, *, pinned: bool = False) -> Loading:
        """Serve a base that has been loaded; the others that were used longest ago make room for it."""
        backend = LocalBackend(base, settings=self._settings)
        loaded = Loaded(name, backend, pinned=pinned)
        with self._lock:
            if name in self.loaded:
                return self._used(self.loaded[name]), None
            if not pinned and self._max_base_bytes is not None:
                self._make_room(loaded.num_bytes)
            self.loaded[name] = loaded
        return backend, None

    def _make_room(self, num_bytes: int) -> None:
        assert self._max_base_bytes is not None
        if num_bytes > self._max_base_bytes:  # before others make room in vain
            raise ResourceError(
                f"a model of {num_bytes} bytes is more than the server may hold ({self._max_base_bytes})",
                hint="give the server more memory for models",
            )
        others = sorted((loaded for loaded in self.loaded.values() if not loaded.pinned), key=lambda one: one.used)
        while others and sum(other.num_bytes for other in others) + num_bytes > self._max_base_bytes:
            oldest = next((other for other in others if other.backend.engine.idle), None)
            if oldest is None:
                raise OverloadedError("all models in memory are answering, and there is no room for another")
            others.remove(oldest)
            del self.loaded[oldest.name]

    def _used(self, loaded: Loaded) -> LocalBackend:
        loaded.used = time.monotonic()
        return loaded.backend
