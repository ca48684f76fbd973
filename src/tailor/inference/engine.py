"""Token ids in, token ids out: continuous batching, any mixture of slots in one pass.

The engine knows nothing of text. A pass is one packed row: one token of every sequence that is being answered, and
pieces of the prompts of those that have just come. Sequences enter when there is room, leave when they end, and give
their memory back at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from pydantic import Field
from torch import Tensor

from tailor.config import Strict
from tailor.data.packing import Segment
from tailor.errors import ConfigError, DataError, OverloadedError, QualityError, ResourceError, TailorError
from tailor.inference.backend import SamplingParams, TokenLogprob
from tailor.inference.prefix_cache import PrefixCache
from tailor.inference.sampling import choose, describe, is_plain
from tailor.inference.scheduler import Running, Scheduler
from tailor.models.base import Base
from tailor.models.kv_cache import KVPool
from tailor.models.plan import Plan
from tailor.models.slots import BASE_SLOT, Slot
from tailor.text.tokenizer import VIRTUAL

ECHO_NUMBERS = 1 << 24
"""Logits that a piece of an echoed prompt may have: each of its tokens needs a row of them."""


class EngineSettings(Strict):
    """What an engine may use."""

    max_sequences: int = Field(64, ge=1, description="sequences that run at once")
    tokens_per_pass: int = Field(4096, ge=1, description="tokens of one pass")
    chunk_size: int = Field(512, ge=1, description="tokens of prompts in a pass in which others get their next token")
    max_kv_bytes: int | None = Field(None, ge=0, description="memory for keys and values; none: what is asked for")
    max_prefix_bytes: int = Field(2**28, ge=0, description="memory for beginnings that prompts share; 0 keeps none")
    max_waiting: int | None = Field(None, ge=0, description="sequences that may wait before others are refused")
    int8: bool = Field(
        False, description="decode with weights in 8 bits, on a CPU: quicker for large bases, a little less exact"
    )


class Engine:
    """Runs sequences to their end: `add` them and call `step` until it is `idle`, or `run` a list of them.

    What prompts begin with in common is computed once and kept in `prefixes`.
    """

    def __init__(
        self,
        base: Base,
        stop_ids: Sequence[int],
        settings: EngineSettings | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        self.settings = settings = settings or EngineSettings()
        layers, heads, size = base.host.kv_shape
        self.base = base
        self.stop_ids = frozenset(stop_ids)
        self.prefixes = PrefixCache(settings.max_prefix_bytes) if prefixes is None else prefixes
        self.pool = KVPool(2 * layers * heads * size * base.dtype.itemsize, settings.max_kv_bytes)
        limits = settings.max_sequences, settings.chunk_size
        self.scheduler = Scheduler(self.pool, self.prefixes, self._slot, *limits)
        self.tokens_per_pass = settings.tokens_per_pass
        self.max_waiting = settings.max_waiting
        self.num_prefilled = 0
        self.num_generated = 0
        if settings.int8:
            self._try_int8()

    def _try_int8(self) -> None:
        """Take a step with weights in 8 bits. Raises ConfigError when this base's decoder has none."""
        probe = Running([1, 3, 2, 5, 8, 4], BASE_SLOT, SamplingParams(max_new_tokens=2, ignore_stop=True))
        self.run([probe])
        if self.base.stepper.step is None:
            reason = self.base.stepper.reason or "there is no memory for a copy of its weights"
            raise ConfigError(f"int8: decoding in 8 bits is not there for {self.base.name}: {reason}")

    @property
    def max_sequences(self) -> int:
        """Sequences that run at once."""
        return self.scheduler.max_sequences

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self.scheduler.active and not self.scheduler.waiting

    def add(self, sequence: Running) -> None:
        """Let a sequence wait for its turn.

        Raises ResourceError for a prompt that fills the context or the memory for keys and values, DataError for one
        without tokens, and OverloadedError when too many wait.
        """
        num, room = len(sequence.prompt_ids), self._context(sequence)
        if not num:
            raise DataError("a prompt has no tokens: there is nothing to continue", hint="write at least one word")
        if num >= room:
            raise ResourceError(
                f"a prompt of {num} tokens leaves no room in the base's context of {room}",
                hint="shorten the prompt, or use fewer shots",
            )
        longest = min(num + sequence.sampling.max_new_tokens, room) + self._num_prefix(sequence)
        if not self.pool.fits(longest):
            raise ResourceError(
                f"{longest} tokens need more memory for keys and values than there is ({self.pool.max_bytes} bytes)",
                hint="ask for fewer new tokens, or give the server more memory",
            )
        if self.max_waiting is not None and len(self.scheduler.waiting) >= self.max_waiting:
            raise OverloadedError(f"{self.max_waiting} requests wait already", hint="try again in a moment")
        self.scheduler.add(sequence)

    @torch.inference_mode()
    def cancel(self, sequence: Running) -> None:
        """Forget a sequence, wherever it is; its memory is free at once. Not during a step."""
        self.scheduler.remove(sequence)

    def run(self, sequences: Sequence[Running], progress: Callable[[int], None] | None = None) -> None:
        """Generate until every sequence has a `finish_reason`, or an `error` of its own.

        Raises as `add` does, before anything is computed.
        """
        try:
            for sequence in sequences:
                self.add(sequence)
            done = 0
            while not self.idle:
                done += sum(sequence.ended_at_all for sequence in self.step())
                if progress is not None:
                    progress(done)
        except BaseException:
            for sequence in sequences:
                self.cancel(sequence)
            raise

    @torch.inference_mode()
    def step(self) -> list[Running]:
        """One pass. Returns the sequences that got a token, or ended, in it."""
        chosen = self.scheduler.next_pass(self.tokens_per_pass, self._most_tokens)
        if not chosen:
            return self._stuck()
        chosen.sort(key=lambda pair: pair[0].slot)
        logits = self._forward(chosen)
        moved, rows, row = [], [], 0
        for sequence, num in chosen:
            count = self._num_logits(sequence, num)
            whole = num == sequence.num_pending
            if sequence.echoes:
                self._echo(sequence, logits[row : row + count], num)
            if whole:
                moved.append(sequence)
                rows.append(row + count - 1)
            row += count
            assert sequence.cache is not None
            sequence.cache.advance(num)
            self.num_prefilled += num if not sequence.token_ids else 0
        if moved:
            self._take(moved, logits[rows] if len(rows) < len(logits) else logits)
        return moved

    def _stuck(self) -> list[Running]:
        """Nothing can be computed: when nothing runs either, the first that waits never will, and ends."""
        if self.scheduler.active or not self.scheduler.waiting:
            return []
        sequence = self.scheduler.waiting[0]
        sequence.error = ResourceError("there is not enough memory for the keys and values of this request")
        self.scheduler.remove(sequence)
        return [sequence]

    def _most_tokens(self, sequence: Running) -> int:
        """How much of a prompt one pass may take of this sequence."""
        width = self.base.head.num_logits
        return max(1, ECHO_NUMBERS // width) if sequence.echoes else self.tokens_per_pass

    def _num_logits(self, sequence: Running, num: int) -> int:
        """Rows of logits that `num` pending tokens of a sequence need."""
        return num if sequence.echoes else int(num == sequence.num_pending)

    def _forward(self, chosen: Sequence[tuple[Running, int]]) -> Tensor:
        """(n, V) logits that the sequences need after so many of their pending tokens each."""
        segments: list[Segment] = []
        ids: list[int] = []
        positions: list[int] = []
        places: list[int] = []
        for sequence, num in chosen:
            assert sequence.cache is not None
            position0, start = sequence.cache.length, len(ids)
            ids += sequence.pending[:num]
            positions += range(position0, position0 + num)
            segments.append(Segment(start, len(ids), sequence.slot, position0=position0))
            places += range(len(ids) - self._num_logits(sequence, num), len(ids))
        plan = Plan.of(segments, caches=[sequence.cache for sequence, _ in chosen])
        device = self.base.device
        self.base.stepper.use_int8(self.settings.int8)  # another engine of the base may have other settings
        with self.base.host.run(plan):
            hidden = self.base.hidden(plan, torch.tensor(ids, device=device), torch.tensor(positions, device=device))
            return self.base.logits_at(plan, hidden, torch.tensor(places, device=device, dtype=torch.long))

    def _echo(self, sequence: Running, logits: Tensor, num: int) -> None:
        """Logprobs of the prompt's tokens that follow the `num` of this pass."""
        assert sequence.cache is not None
        first = sequence.cache.length + 1
        for row, token in enumerate(sequence.prompt_ids[first : first + num]):
            if first + row in sequence.prompt_tokens or token >= VIRTUAL:  # told before it had to make room, or no word
                continue
            told = describe(logits[row], token, sequence.sampling.num_top_logprobs)
            sequence.prompt_tokens[first + row] = told

    def _take(self, sequences: Sequence[Running], logits: Tensor) -> None:
        """One more token for each of the sequences, from its row of (n, V) logits."""
        highest, places = logits.max(dim=1)  # several times as quick as argmax, and as logsumexp for few rows
        totals = (logits - highest[:, None]).exp_().sum(dim=1).log_().add_(highest)
        best = places.tolist()
        tokens = [
            best[row] if is_plain(s.sampling) else self._choose(s, logits[row]) for row, s in enumerate(sequences)
        ]
        picked = logits.gather(1, torch.tensor(tokens, device=logits.device)[:, None])[:, 0] - totals
        for row, (sequence, token, logprob) in enumerate(zip(sequences, tokens, picked.tolist(), strict=True)):
            if math.isnan(logprob):
                sequence.error = QualityError(
                    "the answer's logits are not numbers: the weights of the base or the customization are broken"
                )
            if sequence.error is not None:
                self.scheduler.remove(sequence, broken=True)
                continue
            if not sequence.token_ids:
                self.scheduler.keep(sequence)  # not before its numbers are known to be some
            num_top = sequence.sampling.num_top_logprobs
            sequence.tokens.append(describe(logits[row], token, num_top) if num_top else TokenLogprob(token, logprob))
            sequence.token_ids.append(token)
            self.num_generated += 1
            self._end(sequence, token)

    def _choose(self, sequence: Running, logits: Tensor) -> int:
        """A token by the request's own settings; what is wrong with them ends this sequence alone."""
        constraint = sequence.constraint
        try:
            token = choose(
                logits.cpu(),
                sequence.sampling,
                sequence.generator,
                prompt_ids=sequence.prompt_ids,
                sampled_ids=sequence.token_ids,
                allowed=None if constraint is None else constraint.mask(logits.shape[0]),
                stop_ids=tuple(self.stop_ids),
            )
            if constraint is not None:
                constraint.accept(token)
        except TailorError as error:
            sequence.error = error
            return 0
        return token

    def _end(self, sequence: Running, token: int) -> None:
        """Say how a sequence ends, if this token ended it, and free its memory."""
        sampling = sequence.sampling
        total = len(sequence.prompt_ids) + len(sequence.token_ids)
        stopped = token in self.stop_ids and not sampling.ignore_stop
        complete = sequence.constraint is not None and sequence.constraint.finished
        if stopped or complete or sequence.ended(sequence.token_ids):
            sequence.finish_reason = "stop"
        elif len(sequence.token_ids) >= sampling.max_new_tokens or total >= self._context(sequence):
            sequence.finish_reason = "length"
        if sequence.finish_reason is not None:
            self.scheduler.remove(sequence)

    def _slot(self, sequence: Running) -> Slot | None:
        """Whose parameters decide what the sequence meets: those of a full fine-tune are the base's own."""
        return self.base.host.slots.get(sequence.slot, self.base.host.owner)

    def _num_prefix(self, sequence: Running) -> int:
        slot = self._slot(sequence)
        return slot.num_prefix if slot else 0

    def _context(self, sequence: Running) -> int:
        return self.base.room(self._slot(sequence))
