"""The local backend: a loaded base and the customizations attached to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from tailor.data.examples import Example, Rendering
from tailor.data.packing import Placed, pack
from tailor.errors import NotFoundError, ResourceError, nearest
from tailor.inference.backend import Completion, Request, TokenLogprob
from tailor.inference.engine import Engine, EngineSettings
from tailor.inference.scheduler import Running
from tailor.inference.structured import compiled
from tailor.inference.text_stream import TextStream, answer_text
from tailor.inference.votes import generate_with_votes
from tailor.metrics.answers import extract_answer
from tailor.metrics.votes import Votes
from tailor.models.base import Base
from tailor.models.slots import BASE_SLOT, Slot
from tailor.models.text_vectors import prompt_vectors
from tailor.text.messages import Message, user
from tailor.text.render import ChatRenderer
from tailor.text.tokenizer import VIRTUAL


class LocalBackend:
    """Generates and scores on one base; requests for different customizations share their passes."""

    def __init__(
        self,
        base: Base,
        slots: dict[str, Slot] | None = None,
        settings: EngineSettings | None = None,
    ) -> None:
        self.base = base
        self.slots = dict(slots or {})
        self.engine = Engine(base, base.renderer.stop, settings)

    def slot(self, artifact: str | None) -> Slot | None:
        """The attached customization. Raises NotFoundError when there is none of that name."""
        if artifact is None:
            return None
        if artifact not in self.slots:
            raise NotFoundError(f"no customization {artifact!r} is attached", hint=nearest(artifact, self.slots))
        return self.slots[artifact]

    def composes(self, artifact: str | None) -> bool:
        """Whether a customization rewrites prompts."""
        slot = self.slot(artifact)
        return slot is not None and slot.compose is not None

    def rendering(self, artifact: str | None, task: str | None = None) -> Rendering:
        """How prompts become tokens for this customization, or for one of its tasks."""
        return self.base.rendering(self.slot(artifact), task=task)

    def takes_effort(self, artifact: str | None) -> bool:
        """Whether the chat template has a switch for thinking first."""
        return _at_effort(self.rendering(artifact), "low") is not None

    def _asked(self, request: Request) -> Rendering:
        """How this request's prompt becomes tokens. Without a switch its effort changes nothing."""
        rendering = self.rendering(request.artifact, request.task)
        switched = None if request.effort is None else _at_effort(rendering, request.effort)
        return rendering if switched is None else switched

    def generate(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Completion]:
        """One completion per request, in order; `progress` is told how many are complete.

        Raises as `Engine.add` does, and QualityError for a customization whose weights are broken.
        """
        return generate_with_votes(self._generate, requests, self.votes, progress)

    def votes(self, request: Request) -> Votes | None:
        """How many answers are sampled for this request, of which the majority's is returned."""
        slot = self.slot(request.artifact)
        return slot.votes if slot is not None and request.prompt is None else None

    def _generate(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Completion]:
        running = [self.running(request) for request in requests]
        self.engine.run(running, progress)
        for request, sequence in zip(requests, running, strict=True):
            if (error := sequence.error) is not None:
                raise type(error)(f"{request.artifact or 'the base'}: {error.message}", hint=error.hint) from error
        return [self.completion(request, sequence) for request, sequence in zip(requests, running, strict=True)]

    def running(self, request: Request, text: TextStream | None = None) -> Running:
        """The sequence that answers a request; `text`, if given, is told its tokens and ends it at its stop texts."""
        slot = self.slot(request.artifact)
        rendering = self._asked(request)
        sampling = request.sampling
        if request.prompt is not None:
            prompt_ids = rendering.continued(request.prompt)
        else:
            prompt_ids = rendering.prompt(request.messages, request.tools, sampling.max_new_tokens)
        running = Running(prompt_ids, slot.number if slot else BASE_SLOT, sampling, echoes=request.echo)
        if text is None and sampling.stop:
            text = self.text_stream(request)
        if text is not None:
            running.ended = text.ends
        if sampling.structure is not None:
            running.constraint = compiled(sampling.structure, rendering.renderer.tokenizer, rendering.renderer.stop)
        return running

    def text_stream(self, request: Request) -> TextStream:
        """What makes text of the tokens that answer a request."""
        return TextStream(self._asked(request).renderer, request.sampling.stop)

    def completion(self, request: Request, sequence: Running) -> Completion:
        """The answer of a sequence that has ended."""
        renderer = self._asked(request).renderer
        text = answer_text(renderer, sequence.token_ids, request.sampling.stop)
        slot = self.slot(request.artifact)
        pattern = slot.answer_pattern if slot else None
        answer = text if pattern is None else extract_answer(text, pattern) or ""
        assert sequence.finish_reason is not None
        return Completion(
            text,
            tuple(sequence.token_ids),
            tuple(sequence.logprobs),
            sequence.finish_reason,
            len(sequence.prompt_ids),
            answer,
            num_cached_tokens=sequence.num_cached,
            tokens=tuple(sequence.tokens),
            prompt_tokens=self.echoed(sequence) if request.echo else (),
        )

    def echoed(self, sequence: Running) -> tuple[TokenLogprob | None, ...]:
        """The words of the prompt; the first follows nothing, or virtual tokens only: it has no logprob."""
        words = [place for place, token in enumerate(sequence.prompt_ids) if token < VIRTUAL]
        return (None, *(sequence.prompt_tokens[place] for place in words[1:]))

    def logprobs(self, requests: Sequence[Request], completions: Sequence[str]) -> list[Tensor]:
        """Logprobs of the completions' tokens, end-of-turn included; prompts that requests share are computed once."""
        groups: dict[str, int] = {}
        placed = []
        for index, (request, completion) in enumerate(zip(requests, completions, strict=True)):
            slot = self.slot(request.artifact)
            rendering = self._asked(request)
            rendered = rendering.answered(request.messages, Message("assistant", completion), request.tools)
            asked = (request.artifact, request.task, request.effort, request.messages, request.tools)
            group = groups.setdefault(repr(asked), len(groups))
            example = Example(rendered.token_ids, rendered.loss_mask, group)
            placed.append(Placed(example, slot.number if slot else BASE_SLOT, index))
        scores: list[Tensor] = [torch.empty(0)] * len(placed)
        for batch in pack(placed, self.engine.tokens_per_pass, share_prefixes=True):
            for segment, logprobs in zip(batch.segments, self.base.score_by_segment(batch), strict=True):
                if segment.index >= 0:
                    scores[segment.index] = logprobs
        return scores

    def embed(self, texts: Sequence[str]) -> Tensor:
        """(num_texts, hidden) unit vectors: the mean of the base's last hidden states over each text's tokens.

        Raises DataError for a text without tokens (an empty one, on a base that adds nothing to it).
        """
        return self.embed_inputs(texts)[0]

    def embed_inputs(self, inputs: Sequence[str | Sequence[int]]) -> tuple[Tensor, int]:
        """As `embed`, of texts or token ids as they are, and how many tokens were read.

        Raises ResourceError for one that is longer than the base's context.
        """
        plain = self.rendering(None)
        prompts = [
            plain.prompt([user(given)]) if isinstance(given, str) else plain.continued(given) for given in inputs
        ]
        longest, context = max(map(len, prompts), default=0), self.base.max_seq_len
        if longest > context:
            raise ResourceError(
                f"a text of {longest} tokens exceeds the base's context of {context}", hint="embed it in parts"
            )
        vectors = prompt_vectors(self.base.host, prompts, self.engine.tokens_per_pass)
        return vectors, sum(map(len, prompts))


def _at_effort(rendering: Rendering, effort: str) -> Rendering | None:
    renderer = rendering.renderer.at_effort(effort) if isinstance(rendering.renderer, ChatRenderer) else None
    return None if renderer is None else replace(rendering, renderer=renderer)
