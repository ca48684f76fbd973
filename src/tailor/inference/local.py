"""The local backend: a loaded base and the customizations attached to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tailor.data.examples import Example, Rendering
from tailor.data.packing import Placed, pack
from tailor.errors import DataError, NotFoundError, nearest
from tailor.inference.backend import Completion, Request
from tailor.inference.engine import Engine, Running
from tailor.metrics.answers import extract_answer
from tailor.models.base import Base
from tailor.models.plan import Plan
from tailor.models.slots import BASE_SLOT, Slot
from tailor.text.messages import Message, user


class LocalBackend:
    """Generates and scores on one base; requests for different customizations share their passes."""

    def __init__(self, base: Base, slots: dict[str, Slot] | None = None, *, max_sequences: int = 64) -> None:
        self.base = base
        self.slots = dict(slots or {})
        self.engine = Engine(base, base.renderer.stop, max_sequences)

    def slot(self, artifact: str | None) -> Slot | None:
        """The attached customization. Raises NotFoundError when there is none of that name."""
        if artifact is None:
            return None
        if artifact not in self.slots:
            raise NotFoundError(f"no customization {artifact!r} is attached", hint=nearest(artifact, self.slots))
        return self.slots[artifact]

    def rendering(self, artifact: str | None, task: str | None = None) -> Rendering:
        """How prompts become tokens for this customization, or for one of its tasks."""
        return self.base.rendering(self.slot(artifact), task=task)

    def generate(self, requests: Sequence[Request], progress: Callable[[int], None] | None = None) -> list[Completion]:
        """One completion per request, in order; `progress` is told how many are complete."""
        running = [self._running(request) for request in requests]
        self.engine.run(running, progress)
        return [self._completion(request, sequence) for request, sequence in zip(requests, running, strict=True)]

    def _running(self, request: Request) -> Running:
        slot = self.slot(request.artifact)
        rendering = self.rendering(request.artifact, request.task)
        prompt_ids = rendering.prompt(request.messages, request.tools, request.sampling.max_new_tokens)
        stop = request.sampling.stop
        parse = rendering.renderer.parse
        ended = (lambda ids: _first_stop(parse(ids).content, stop) is not None) if stop else (lambda ids: False)
        return Running(prompt_ids, slot.number if slot else BASE_SLOT, request.sampling, ended)

    def _completion(self, request: Request, sequence: Running) -> Completion:
        text = self.rendering(request.artifact, request.task).renderer.parse(sequence.token_ids).content
        cut = _first_stop(text, request.sampling.stop)
        text = text if cut is None else text[:cut]
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
        )

    def logprobs(self, requests: Sequence[Request], completions: Sequence[str]) -> list[Tensor]:
        """Logprobs of the completions' tokens, end-of-turn included; prompts that requests share are computed once."""
        groups: dict[str, int] = {}
        placed = []
        for index, (request, completion) in enumerate(zip(requests, completions, strict=True)):
            slot = self.slot(request.artifact)
            rendering = self.rendering(request.artifact, request.task)
            rendered = rendering.answered(request.messages, Message("assistant", completion), request.tools)
            asked = (request.artifact, request.task, request.messages, request.tools)
            group = groups.setdefault(repr(asked), len(groups))
            example = Example(rendered.token_ids, rendered.loss_mask, group)
            placed.append(Placed(example, slot.number if slot else BASE_SLOT, index))
        scores: list[Tensor] = [torch.empty(0)] * len(placed)
        for batch in pack(placed, self.engine.tokens_per_pass, share_prefixes=True):
            for segment, logprobs in zip(batch.segments, self.base.score_by_segment(batch), strict=True):
                if segment.index >= 0:
                    scores[segment.index] = logprobs
        return scores

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """(num_texts, hidden) unit vectors: the mean of the base's last hidden states over each text's tokens.

        Raises DataError for a text without tokens (an empty one, on a base that adds nothing to it).
        """
        prompts = [self.base.renderer.prompt([user(text)]) for text in texts]
        if not all(prompts):
            raise DataError(f"text {prompts.index([])} has no tokens, so it has no embedding")
        examples = [Example(ids, [0] * len(ids)) for ids in prompts]
        # OPT projects its last hidden states to another width, the head's
        vectors = torch.empty(len(texts), self.base.head.weight.shape[1])
        for batch in pack([Placed(e, BASE_SLOT, k) for k, e in enumerate(examples)], self.engine.tokens_per_pass):
            plan = Plan.of_batch(batch)
            with self.base.host.run(plan):
                device = self.base.device
                hidden = self.base.hidden(plan, batch.input_ids.to(device), batch.position_ids.to(device)).float().cpu()
            for segment in batch.segments:
                vectors[segment.index] = hidden[segment.start : segment.end].mean(dim=0)
        return torch.nn.functional.normalize(vectors, dim=1)


def _first_stop(text: str, stop: Sequence[str]) -> int | None:
    """Where the first of the stop texts begins."""
    places = [at for at in (text.find(s) for s in stop) if at >= 0]
    return min(places) if places else None
