"""A prompting artifact as a person wants to see it: what the base is shown for a question, and how two differ."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tailor.artifacts.artifact import Artifact, find
from tailor.errors import ConfigError, NotFoundError
from tailor.inference.load import find_or_none, load_local
from tailor.models.files import is_hosted
from tailor.models.slots import Compose
from tailor.models.text_vectors import text_vectors
from tailor.recipes.base_facts import base_facts
from tailor.techniques.prompting import Prompting
from tailor.techniques.prompting_shots import Shot
from tailor.text.messages import user
from tailor.text.render import Renderer

PLACE = "{prompt}"
"""Stands for the question when none is given."""


@dataclass(frozen=True)
class Turn:
    """A turn that the base is shown; `num_tokens` of its text are None where the tokenizer is not known (hosted)."""

    role: str
    content: str
    num_tokens: int | None


@dataclass(frozen=True)
class Shown:
    """All turns; `num_tokens` is what the base reads in all, `template_tokens` the part around the turns' texts."""

    turns: tuple[Turn, ...]
    num_tokens: int | None
    template_tokens: int | None
    votes: int


def prompting_of(name: str) -> tuple[Artifact, Prompting]:
    """An artifact and its prompting. Raises NotFoundError, and ConfigError for an artifact without."""
    if find_or_none(name) is None:
        raise NotFoundError(f"{name} is a base: it is shown what it is asked, and nothing around it")
    artifact = find(name)
    found = next((one for one in artifact.techniques if isinstance(one, Prompting)), None)
    if found is None:
        raise ConfigError(f"{name} is {artifact.kind}: it changes no text that could be shown")
    return artifact, found


def shown(name: str, prompt: str | None = None, base: str | None = None) -> Shown:
    """What the base of a prompting artifact is shown for a prompt (`{prompt}` stands for it when none is given).

    The base's weights are loaded only where shots are chosen by its embeddings.
    """
    artifact, prompting = prompting_of(name)
    where = base or artifact.base_name
    compose, renderer = _composer(prompting, where)
    turns = compose((user(PLACE if prompt is None else prompt),))
    if renderer is None:
        return Shown(tuple(Turn(m.role, m.content, None) for m in turns), None, None, prompting.votes)
    counted = tuple(Turn(m.role, m.content, len(renderer.tokenizer.encode(m.content, continues=True))) for m in turns)
    whole = len(renderer.prompt(turns))
    return Shown(counted, whole, whole - sum(turn.num_tokens or 0 for turn in counted), prompting.votes)


def _composer(prompting: Prompting, where: str) -> tuple[Compose, Renderer | None]:
    """What rewrites the prompt, and what turns it into tokens."""
    by_vectors = prompting.similarity == "embedding" and prompting.selection in ("nearest", "mmr")
    if is_hosted(where):
        if by_vectors:
            raise ConfigError(f"the shots are chosen by the embeddings of {where}: ask it with `tailor generate`")
        return prompting.composer(), None
    if not by_vectors:
        return prompting.composer(), base_facts(where).renderer
    base = load_local(where).base
    return prompting.composer(lambda texts: text_vectors(base.host, base.renderer, texts)), base.renderer


@dataclass(frozen=True)
class PromptDifference:
    """Settings that differ, by name: (of the first, of the second); `lines` is a unified diff of all their texts."""

    settings: dict[str, tuple[Any, Any]]
    lines: tuple[str, ...]


def difference(first: str, second: str) -> PromptDifference:
    """How two prompting artifacts differ."""
    one, other = prompting_of(first)[1], prompting_of(second)[1]
    own, its = (prompting.model_dump(mode="json") for prompting in (one, other))
    changed = {key: (own[key], its[key]) for key in own if own[key] != its[key]}
    if "examples" in changed:
        changed["examples"] = (len(one.examples), len(other.examples))
    lines = difflib.unified_diff(_texts(one), _texts(other), first, second, lineterm="")
    return PromptDifference(changed, tuple(lines))


def _texts(prompting: Prompting) -> list[str]:
    """A prompt's texts line by line, each part under a heading."""
    system = [("system", prompting.system)] if prompting.system else []
    parts = [*system, ("template", prompting.template), *_examples(prompting.examples)]
    return [line for name, text in parts for line in (f"[{name}]", *text.split("\n"))]


def _examples(examples: Sequence[Shot]) -> list[tuple[str, str]]:
    found = []
    for shot in examples:
        found.append(("example: user", shot.prompt))
        if shot.reasoning:
            found.append(("reasoning", shot.reasoning))
        found.append(("example: assistant", shot.completion))
    return found
