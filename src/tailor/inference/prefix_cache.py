"""Keys and values of beginnings that requests have in common: a system text, shots, virtual tokens, a document.

They are computed for the first request and copied for every later one. An entry belongs to the slot it was computed
with, as that slot's parameters were then: a slot that is trained on, or another, never meets it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from tailor.data.packing import common_length
from tailor.models.attention import KVCache
from tailor.models.slots import BASE_SLOT, Slot

MIN_KEPT = 16
"""Tokens that a beginning must have: a pass over fewer costs less than looking after them."""

MAX_ENTRIES = 64
"""Prompts that are kept: each new one is compared with all of them."""

Key = tuple[int, tuple[int, ...]]


class PrefixCache:
    """At most `max_bytes` of keys and values, of the MAX_ENTRIES prompts used last. 0 keeps nothing."""

    def __init__(self, max_bytes: int = 2**28) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[tuple[Key, tuple[int, ...]], KVCache] = OrderedDict()

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.num_bytes = 0

    def longest(self, slot: Slot | None, prompt_ids: Sequence[int]) -> int:
        """How many of the prompt's first tokens are known: all but the last at most, whose logits are asked for."""
        return self._find(slot, prompt_ids)[0]

    def begin(self, slot: Slot | None, prompt_ids: Sequence[int]) -> KVCache:
        """A cache for a new sequence, holding what is known of its prompt."""
        length, key = self._find(slot, prompt_ids)
        if key is None:
            return KVCache()
        self._entries.move_to_end(key)
        return self._entries[key].fork(length)

    def keep(self, slot: Slot | None, prompt_ids: Sequence[int], cache: KVCache) -> None:
        """Keep a prompt's keys and values (`cache` may be further already); the least recently used make room."""
        tokens = tuple(prompt_ids)
        key = _key(slot), tokens
        if len(tokens) < MIN_KEPT or key in self._entries or self._find(slot, tokens)[0] >= len(tokens) - 1:
            return
        copy = cache.fork(len(tokens))
        if copy.num_bytes > self.max_bytes:
            return
        self._entries[key] = copy
        self.num_bytes += copy.num_bytes
        while self.num_bytes > self.max_bytes or len(self._entries) > MAX_ENTRIES:
            self.num_bytes -= self._entries.popitem(last=False)[1].num_bytes

    def _find(self, slot: Slot | None, prompt_ids: Sequence[int]) -> tuple[int, tuple[Key, tuple[int, ...]] | None]:
        """The longest common beginning with an entry of the slot, and that entry; (0, None) below MIN_KEPT tokens."""
        wanted, owner = tuple(prompt_ids), _key(slot)
        best: tuple[int, tuple[Key, tuple[int, ...]] | None] = (0, None)
        for key in self._entries:
            if key[0] == owner:
                length = min(common_length(key[1], wanted), len(wanted) - 1)
                if length >= MIN_KEPT and length > best[0]:
                    best = (length, key)
        return best


def _key(slot: Slot | None) -> Key:
    """The slot and the state of its parameters; the plain base has none."""
    if slot is None:
        return BASE_SLOT, ()
    return slot.number, (slot.revision, *(p._version for p in slot.parameters.values()))
