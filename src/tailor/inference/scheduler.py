"""Which sequences a pass holds: fair between slots, within the memory for keys and values."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from tailor.data.packing import common_length
from tailor.errors import TailorError
from tailor.inference.backend import FinishReason, SamplingParams, TokenLogprob
from tailor.inference.prefix_cache import MIN_KEPT, PrefixCache
from tailor.inference.structured import Constraint
from tailor.models.kv_cache import KVPool, RowCache
from tailor.models.slots import Slot


@dataclass(eq=False)
class Running:
    """One sequence: its prompt, what has been sampled so far, and its keys and values.

    `num_cached` tokens of the prompt were computed for another request before. `ended` is asked after every token.
    With `echoes`, `prompt_tokens` gets the logprobs of the prompt's words but the first by place. `error` is why
    it ended without an answer.
    """

    prompt_ids: Sequence[int]
    slot: int
    sampling: SamplingParams
    ended: Callable[[Sequence[int]], bool] = lambda sampled: False
    token_ids: list[int] = field(default_factory=list)
    tokens: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    cache: RowCache | None = None
    num_cached: int = 0
    echoes: bool = False
    prompt_tokens: dict[int, TokenLogprob] = field(default_factory=dict)
    constraint: Constraint | None = None
    error: TailorError | None = None
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.sampling.seed)

    @property
    def pending(self) -> Sequence[int]:
        """Tokens the cache has not seen: the prompt at first, later the last sampled token."""
        done = self.cache.length if self.cache is not None else 0
        if done >= len(self.prompt_ids):
            return self.token_ids[done - len(self.prompt_ids) :]
        return [*self.prompt_ids[done:], *self.token_ids]

    @property
    def num_pending(self) -> int:
        """How many those are."""
        done = self.cache.length if self.cache is not None else 0
        return len(self.prompt_ids) + len(self.token_ids) - done

    @property
    def logprobs(self) -> list[float]:
        """Of the sampled tokens."""
        return [token.logprob for token in self.tokens]

    @property
    def ended_at_all(self) -> bool:
        """Whether nothing more comes of it."""
        return self.finish_reason is not None or self.error is not None


class Scheduler:
    """Sequences that wait and sequences that run.

    Of those that wait, the next is the first of the slot with the fewest that run: nobody's crowd keeps others out.
    When memory is used up, the one that came last gives its row back and waits again; what it said stands.
    """

    def __init__(
        self,
        pool: KVPool,
        prefixes: PrefixCache,
        slot_of: Callable[[Running], Slot | None],
        max_sequences: int,
        chunk_size: int,
    ) -> None:
        self.pool = pool
        self.prefixes = prefixes
        self.max_sequences = max_sequences
        self.chunk_size = chunk_size
        self.waiting: list[Running] = []
        self.active: list[Running] = []
        self._slot_of = slot_of

    def add(self, sequence: Running) -> None:
        """Let a sequence wait."""
        self.waiting.append(sequence)

    def remove(self, sequence: Running, *, broken: bool = False) -> None:
        """Take a sequence out, waiting or running. `broken`: its keys and values may not be finite."""
        for held in (self.waiting, self.active):
            if sequence in held:
                held.remove(sequence)
        if sequence.cache is not None:
            # nobody has looked yet at the numbers of one that leaves before its first token
            sequence.cache.release(wipe=broken or not sequence.token_ids)
            sequence.cache = None

    def keep(self, sequence: Running) -> None:
        """Keep what was computed of a prompt, now that it is whole, for later prompts that begin with it."""
        assert sequence.cache is not None
        num = len(sequence.prompt_ids)
        new = num - sequence.num_cached
        # a question behind known shots is asked once: a copy of it all would cost more than it will ever save
        worthwhile = not sequence.num_cached or new >= max(4 * MIN_KEPT, num // 8)
        if worthwhile and not sequence.echoes:
            self.prefixes.keep(self._slot_of(sequence), sequence.prompt_ids, sequence.cache)

    def next_pass(self, budget: int, most_tokens: Callable[[Running], int]) -> list[tuple[Running, int]]:
        """Sequences with how many of their pending tokens to compute: at most `budget` tokens together.

        Those that wait for their next token all take part; a prompt takes at most `most_tokens` of its sequence.
        """
        chosen: list[tuple[Running, int]] = []
        for sequence in [s for s in self.active if s.num_pending == 1]:
            if sequence in self.active and self._make_room(sequence):
                chosen.append((sequence, 1))
        chosen = [(s, num) for s, num in chosen if s in self.active]
        left = budget - len(chosen)
        if chosen:
            left = min(left, self.chunk_size)
        taking = {id(s) for s, _ in chosen}
        for sequence in self._prefilling(taking):
            if left <= 0:
                break
            num = min(sequence.num_pending, left, most_tokens(sequence))
            chosen.append((sequence, num))
            left -= num
        return chosen

    def _prefilling(self, taken: set[int]) -> Iterator[Running]:
        """Running sequences whose prompts are not whole yet, then those that may enter."""
        yield from [s for s in self.active if id(s) not in taken and s.num_pending > 1]
        held_back: set[int] = set()
        running = Counter(s.slot for s in self.active)
        while len(self.active) < self.max_sequences:
            candidates = [s for s in self.waiting if id(s) not in held_back]
            if not candidates:
                return
            sequence = min(candidates, key=lambda s: running[s.slot])
            if self._follows_another(sequence):
                held_back.add(id(sequence))
            elif self._enter(sequence):
                running[sequence.slot] += 1
                yield sequence
            else:
                return

    def _enter(self, sequence: Running) -> bool:
        """Give a waiting sequence a row, with what is known of its prompt; False when memory does not allow it now."""
        slot = self._slot_of(sequence)
        total = len(sequence.prompt_ids) + len(sequence.token_ids) + (slot.num_prefix if slot else 0)
        cache = RowCache(self.pool)
        if not self.pool.ensure(cache, total + 1):
            return False
        self.waiting.remove(sequence)
        self.active.append(sequence)
        sequence.cache = cache
        if not sequence.echoes:
            known, length = self.prefixes.find(slot, sequence.prompt_ids)
            if known is not None:
                cache.take(known, length)
            if not sequence.token_ids:
                sequence.num_cached = length
        return True

    def _follows_another(self, sequence: Running) -> bool:
        """Whether to wait for a prompt that is being computed and begins alike, further than what is known already."""
        if self.prefixes.max_bytes <= 0 or sequence.echoes:
            return False
        slot, own = self._slot_of(sequence), tuple(sequence.prompt_ids)
        shared = [
            common_length(tuple(other.prompt_ids), own)
            for other in self.active
            if other.slot == sequence.slot and not other.token_ids and not other.echoes
        ]
        most = max(shared, default=0)
        return most >= MIN_KEPT and most >= self.prefixes.longest(slot, own) + MIN_KEPT

    def _make_room(self, sequence: Running) -> bool:
        """Room for one token more; those that came last wait again when there is none. False: it had to itself."""
        assert sequence.cache is not None
        while not self.pool.ensure(sequence.cache, sequence.cache.end + 1):
            last = self.active[-1]
            self.remove(last)
            self.waiting.insert(0, last)
            if last is sequence:
                return False
        return True
