"""Token ids in, token ids out: batched generation with a cache per sequence, any mixture of slots in one pass.

The engine knows nothing of text. Sequences enter when there is room and leave when they end; every pass is one packed
row over all that are running.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tailor.data.packing import Segment, common_length
from tailor.errors import DataError, ResourceError
from tailor.inference.backend import FinishReason, SamplingParams
from tailor.inference.prefix_cache import MIN_KEPT, PrefixCache
from tailor.inference.sampling import choose
from tailor.models.attention import KVCache
from tailor.models.base import Base
from tailor.models.plan import Plan
from tailor.models.slots import Slot


@dataclass(eq=False)
class Running:
    """One sequence: its prompt, what has been sampled so far, and its keys and values.

    `num_cached` tokens of the prompt were computed for another request before.
    """

    prompt_ids: Sequence[int]
    slot: int
    sampling: SamplingParams
    ended: Callable[[Sequence[int]], bool] = lambda sampled: False
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cache: KVCache = field(default_factory=KVCache)
    num_cached: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.sampling.seed)

    @property
    def pending(self) -> Sequence[int]:
        """Tokens the cache has not seen: the prompt at first, then the last sampled token."""
        return self.token_ids[-1:] or self.prompt_ids[self.num_cached :]


class Engine:
    """Runs sequences to their end. `max_sequences` run at once; a pass prefills at most `tokens_per_pass` tokens.

    What prompts begin with in common is computed once and kept in `prefixes`.
    """

    def __init__(
        self,
        base: Base,
        stop_ids: Sequence[int],
        max_sequences: int = 64,
        tokens_per_pass: int = 4096,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.prefixes = PrefixCache() if prefixes is None else prefixes
        self.base = base
        self.stop_ids = frozenset(stop_ids)
        self.max_sequences = max_sequences
        self.tokens_per_pass = tokens_per_pass

    @torch.inference_mode()
    def run(self, sequences: Sequence[Running], progress: Callable[[int], None] | None = None) -> None:
        """Generate until every sequence has a `finish_reason`.

        Raises ResourceError for a prompt that fills the context, DataError for one without tokens.
        """
        for sequence in sequences:
            if not sequence.prompt_ids:
                raise DataError("a prompt has no tokens: there is nothing to continue", hint="write at least one word")
            if len(sequence.prompt_ids) >= (room := self._context(sequence)):
                raise ResourceError(
                    f"a prompt of {len(sequence.prompt_ids)} tokens leaves no room in the base's context of {room}",
                    hint="shorten the prompt, or use fewer shots",
                )
        waiting = list(reversed(sequences))
        active: list[Running] = []
        while waiting or active:
            entering: list[Running] = []
            room = self.tokens_per_pass
            while waiting and len(active) + len(entering) < self.max_sequences:
                size = len(waiting[-1].prompt_ids)
                if entering and size > room:
                    break
                entering.append(waiting.pop())
                room -= size
            if entering:
                self._enter(entering)
            else:
                self._advance(active)
            active = [s for s in active + entering if s.finish_reason is None]
            if progress is not None:
                progress(len(sequences) - len(waiting) - len(active))

    def _enter(self, sequences: list[Running]) -> None:
        """Prefill. Of several that begin alike and with nothing known, one goes first and the others use its work."""
        leaders, followers = self._leaders(sequences)
        for group in (leaders, followers):
            for sequence in group:
                sequence.cache = self.prefixes.begin(self._slot(sequence), sequence.prompt_ids)
                sequence.num_cached = sequence.cache.length
            if group:
                kept = {id(s): s.cache for s in group}
                self._advance(group)
            for sequence in group:
                if sequence.num_cached < len(sequence.prompt_ids) // 2 or group is leaders:
                    self.prefixes.keep(self._slot(sequence), sequence.prompt_ids, kept[id(sequence)])

    def _leaders(self, sequences: list[Running]) -> tuple[list[Running], list[Running]]:
        """Those that must be computed in full, and those that can wait for one of them."""
        leaders: list[Running] = []
        followers: list[Running] = []
        for sequence in sequences:
            known = self.prefixes.longest(self._slot(sequence), sequence.prompt_ids)
            own = tuple(sequence.prompt_ids)
            shared = [common_length(tuple(o.prompt_ids), own) for o in leaders if o.slot == sequence.slot]
            waits = self.prefixes.max_bytes > 0 and max(shared, default=0) >= max(MIN_KEPT, known + MIN_KEPT)
            (followers if waits else leaders).append(sequence)
        return leaders, followers

    def _advance(self, sequences: list[Running]) -> None:
        """One pass: the sequences' pending tokens in, one more token each out."""
        ordered = sorted(sequences, key=lambda s: s.slot)
        logits = self._forward(ordered)
        logprobs = logits.log_softmax(dim=1)
        best = logits.argmax(dim=1).tolist()
        host_logits = logits.cpu() if any(s.sampling.temperature > 0 for s in ordered) else logits
        for row, sequence in enumerate(ordered):
            greedy = sequence.sampling.temperature == 0
            token = best[row] if greedy else choose(host_logits[row], sequence.sampling, sequence.generator)
            self._take(sequence, token, float(logprobs[row, token]))

    def _forward(self, ordered: Sequence[Running]) -> Tensor:
        """(num_sequences, V) logits after each sequence's pending tokens."""
        segments: list[Segment] = []
        ids: list[int] = []
        positions: list[int] = []
        for sequence in ordered:
            pending, start = sequence.pending, len(ids)
            position0 = sequence.cache.length
            ids += pending
            positions += range(position0, position0 + len(pending))
            segments.append(Segment(start, len(ids), sequence.slot, position0=position0))
        plan = Plan.of(segments, caches=[s.cache for s in ordered])
        device = self.base.device
        with self.base.host.run(plan):
            hidden = self.base.hidden(plan, torch.tensor(ids, device=device), torch.tensor(positions, device=device))
            return self.base.logits_at(plan, hidden, torch.tensor([s.end - 1 for s in segments], device=device))

    def _slot(self, sequence: Running) -> Slot | None:
        """Whose parameters decide what the sequence meets: those of a full fine-tune are the base's own."""
        return self.base.host.slots.get(sequence.slot, self.base.host.owner)

    def _context(self, sequence: Running) -> int:
        return self.base.room(self._slot(sequence))

    def _take(self, sequence: Running, token: int, logprob: float) -> None:
        sequence.token_ids.append(token)
        sequence.logprobs.append(logprob)
        total = len(sequence.prompt_ids) + len(sequence.token_ids)
        if token in self.stop_ids or sequence.ended(sequence.token_ids):
            sequence.finish_reason = "stop"
        elif len(sequence.token_ids) >= sequence.sampling.max_new_tokens or total >= self._context(sequence):
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            sequence.cache = KVCache()  # free the memory at once
