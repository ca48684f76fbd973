"""Which customizations in memory are those on disk still: other servers and programs may delete and replace them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from tailor.artifacts.artifact import MANIFEST, Artifact

Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class _Version:
    """What was loaded: the hash of its content, and when its `tailor.json` was last seen to have it."""

    manifest: Path
    content: str | None
    stamp: Stamp | None


class Freshness:
    """Remembers what was loaded. To ask costs a look at one file's date, as long as nothing has changed."""

    def __init__(self) -> None:
        self._loaded: dict[str, _Version] = {}

    def note(self, name: str, artifact: Artifact) -> None:
        """This was loaded under a name."""
        self._loaded[name] = _Version(artifact.folder / MANIFEST, _content(artifact.manifest), None)

    def forget(self, name: str) -> None:
        """It is in memory no more."""
        self._loaded.pop(name, None)

    def outdated(self) -> list[str]:
        """The names whose artifact was deleted or replaced."""
        return [name for name in list(self._loaded) if not self.is_current(name)]

    def is_current(self, name: str) -> bool:
        """Whether what was loaded under a name was neither deleted nor replaced. True for what was never noted.

        New facts about the same content (a score, say) change nothing, and damage to the files nothing to what is in
        memory.
        """
        version = self._loaded.get(name)
        if version is None:
            return True
        stamp = _stamp(version.manifest)
        if stamp is None:
            return False
        if stamp != version.stamp:
            try:
                now = json.loads(version.manifest.read_text("utf-8"))
            except FileNotFoundError:
                return False
            except (OSError, ValueError):
                return True
            if isinstance(now, dict) and _content(now) != version.content:
                return False
            self._loaded[name] = _Version(version.manifest, version.content, stamp)
        return True


def _content(manifest: object) -> str | None:
    found = manifest.get("content_hash") if isinstance(manifest, dict) else None
    return found if isinstance(found, str) else None


def _stamp(path: Path) -> Stamp | None:
    """What changes when a file is written anew; None when it is not there."""
    try:
        facts = path.stat()
    except OSError:
        return None
    return facts.st_ino, facts.st_mtime_ns, facts.st_size
