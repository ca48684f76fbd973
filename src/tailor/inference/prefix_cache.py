"""Keys and values of beginnings that requests have in common: a system text, shots, virtual tokens, a document.

They are computed for the first request and copied for every later one. An entry belongs to the slot it was computed
with, as that slot's parameters were then: a slot that is trained on, or another, never meets it. What the plain base
alone decides belongs to all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from tailor.data.packing import common_length
from tailor.models.kv_cache import KVCache, RowCache
from tailor.models.slots import Slot
from tailor.text.tokenizer import VIRTUAL

MIN_KEPT = 16
"""Tokens that a beginning must have: a pass over fewer costs less than looking after them."""

MAX_ENTRIES = 64
"""Prompts that are kept: each new one is compared with all of them."""

Key = tuple[object, ...]
"""What the keys and values of some tokens follow from: the slot's parameters as they were, and the tokens."""


class PrefixCache:
    """At most `max_bytes` of keys and values, of the MAX_ENTRIES prompts used last. 0 keeps nothing."""

    def __init__(self, max_bytes: int = 2**28) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._entries: OrderedDict[tuple[Key, Key], KVCache] = OrderedDict()

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self.num_bytes = 0

    def longest(self, slot: Slot | None, prompt_ids: Sequence[int]) -> int:
        """How many of the prompt's first tokens are known: all but the last at most, whose logits are asked for."""
        return self._find(*_key(slot, prompt_ids))[0]

    def find(self, slot: Slot | None, prompt_ids: Sequence[int]) -> tuple[KVCache | None, int]:
        """Keys and values that begin with what is known of the prompt, and how many of its tokens that are."""
        length, key = self._find(*_key(slot, prompt_ids))
        if key is None:
            return None, 0
        self._entries.move_to_end(key)
        return self._entries[key], length

    def keep(self, slot: Slot | None, prompt_ids: Sequence[int], cache: RowCache) -> None:
        """Keep a prompt's keys and values (`cache` may be further already); the least recently used make room."""
        key = _key(slot, prompt_ids)
        num = len(prompt_ids)
        if num < MIN_KEPT or key in self._entries or self._find(*key)[0] >= num - 1:
            return
        if cache.bytes_of(num) > self.max_bytes:
            return
        self._entries[key] = cache.copy(num)
        self.num_bytes += self._entries[key].num_bytes
        while self.num_bytes > self.max_bytes or len(self._entries) > MAX_ENTRIES:
            self.num_bytes -= self._entries.popitem(last=False)[1].num_bytes

    def _find(self, owner: Key, wanted: Key) -> tuple[int, tuple[Key, Key] | None]:
        """The longest common beginning with an entry of the owner, and that entry; (0, None) below MIN_KEPT tokens."""
        best: tuple[int, tuple[Key, Key] | None] = (0, None)
        for key in self._entries:
            if key[0] == owner:
                length = min(common_length(key[1], wanted), len(wanted) - 1)
                if length >= MIN_KEPT and length > best[0]:
                    best = (length, key)
        return best


def _key(slot: Slot | None, prompt_ids: Sequence[int]) -> tuple[Key, Key]:
    """Whose keys and values these are, and of which tokens.

    A slot that changes nothing but words of its own (virtual tokens) shares with the plain base what stands before
    them, and all of it when there are none: prompting.
    """
    if slot is None:
        return (), tuple(prompt_ids)
    state = (slot.number, slot.epoch)
    if slot.deltas or slot.blocks or slot.prefix or slot.new_rows or slot.owns_base:
        return state, tuple(prompt_ids)
    return (), tuple((state, token) if token >= VIRTUAL else token for token in prompt_ids)
