"""What vLLM must answer: a few questions, asked here greedily of the customization and of its base, with logprobs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

import torch

from tailor.artifacts.artifact import Artifact
from tailor.data.prompts import question_of
from tailor.data.records import tools_of
from tailor.errors import TailorError
from tailor.inference.backend import Completion, Request, SamplingParams
from tailor.inference.load import Customized
from tailor.recipes.hand_over_routes import Route
from tailor.recipes.verify import rows_for
from tailor.text.messages import Message, user
from tailor.text.render import PlainRenderer
from tailor.text.tokenizer import VIRTUAL

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Is this a question? Answer yes or no.",
)
"""Asked where the rows that a run held out are not at hand."""

NUM_TOKENS = 12
NUM_ROWS = 200
"""Held-out rows of which the shortest are asked."""

PROBED = SamplingParams(max_new_tokens=NUM_TOKENS, num_top_logprobs=2)


def make_probes(route: Route, customized: Customized) -> tuple[list[dict[str, Any]], bool | None]:
    """The probes of expected.json, and whether they tell the customization from its base.

    None where that is no question: the base's own weights answer, or there is no base beside a model of its own.
    """
    probes = [_probe(route, customized, question) for question in questions(route.artifact)]
    if route.weights == "model" or (route.weights == "base" and route.soft is None):
        return probes, None
    return probes, any(_differs(probe) for probe in probes)


def questions(artifact: Artifact) -> list[tuple[Message, ...]]:
    """The shortest questions of rows that the artifact's run held out, or else QUESTIONS."""
    try:
        records = [record for record in rows_for(artifact)[:NUM_ROWS] if not tools_of(record)]
        asked = list(dict.fromkeys(question_of(record) for record in records))
    except (TailorError, TypeError):  # the rows are gone, were never known, or ask nothing
        asked = []
    usable = [turns for turns in asked if all(turn.role in ("system", "user") and not turn.fields for turn in turns)]
    usable.sort(key=lambda turns: sum(len(turn.content) for turn in turns))
    return usable[: len(QUESTIONS)] or [(user(question),) for question in QUESTIONS]


def _probe(route: Route, customized: Customized, question: tuple[Message, ...]) -> dict[str, Any]:
    backend, base = customized.backend, customized.base
    name = customized.name
    rendering = backend.rendering(name)
    shown, ids = rendering.messages(question), rendering.prompt(question)
    words = [token for token in ids if token < VIRTUAL]
    plain = Request((), sampling=PROBED, prompt=tuple(words))
    own, base_own = backend.generate([Request(question, name, PROBED), plain])
    return {
        "messages": [turn.to_dict() for turn in shown],
        "text": _text(shown) if isinstance(base.renderer, PlainRenderer) else None,
        "prompt": words,
        "prompt_embeds": None if route.soft is None else _embedded(customized, words),
        **_told(own),
        "base": _told(base_own),
    }


def _text(shown: Sequence[Message]) -> str:
    """The turns as a base without a chat template reads them."""
    parts = [turn.content + ("" if turn.role == "user" else "\n\n") for turn in shown[:-1]]
    return "".join([*parts, shown[-1].content])


def _told(completion: Completion) -> dict[str, Any]:
    """An answer's tokens; `gaps` are how far the likeliest token was ahead of the next."""
    tops = [token.top for token in completion.tokens]
    return {
        "token_ids": list(completion.token_ids),
        "logprobs": list(completion.logprobs),
        "gaps": [top[0][1] - top[1][1] for top in tops],
    }


def _embedded(customized: Customized, words: Sequence[int]) -> str:
    """What vLLM takes as `prompt_embeds`: the virtual tokens' rows, then the words', saved by torch, in base64."""
    assert customized.slot is not None
    (virtual,) = customized.slot.virtual_tokens.values()
    base = customized.base
    rows = virtual.rows().detach().to(base.dtype)
    buffer = io.BytesIO()
    torch.save(torch.cat([rows, base.host.embed(words).to(base.dtype)]).cpu().clone(), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def _differs(probe: dict[str, Any]) -> bool:
    """Whether this answer is another than the base's, by more than rounding."""
    base = probe["base"]
    if base["token_ids"] != probe["token_ids"]:
        return True
    return any(abs(a - b) > 1e-2 for a, b in zip(base["logprobs"], probe["logprobs"], strict=True))
