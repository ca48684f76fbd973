"""Keys and values of sequences that are being generated: in buffers of their own, or in a pool with a byte budget.

L layers, G key/value heads, D head size. A pool hands out rows: a row holds one sequence of up to `size` tokens, and
rows of one size stand side by side in a `Block`, so that one attention call serves all sequences in it.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST = 64
"""Tokens of the smallest row; every further size is the double of the one before."""
BLOCK_TOKENS = 4096
"""Tokens of a block: many short rows, or few long ones."""


class KVCache:
    """Keys and values of one sequence, per layer (1, G, S, D), in buffers that double when they fill up.

    The first `num_prefix` positions are not the sequence's own: a slot's prefix put them there.
    """

    def __init__(self) -> None:
        self.num_prefix = 0
        self._keys: dict[int, Tensor] = {}
        self._values: dict[int, Tensor] = {}
        self._lengths: dict[int, int] = {}

    @property
    def length(self) -> int:
        """Tokens stored (of the first layer; all layers agree between passes), the prefix not counted."""
        return max(0, next(iter(self._lengths.values()), 0) - self.num_prefix)

    def begin(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put a prefix (1, G, P, D) in front, when nothing is stored for this layer yet."""
        if layer not in self._lengths:
            self.num_prefix = key.shape[2]
            self.append(layer, key, value)

    def layers(self) -> Tensor:
        """(L, 2, G, S, D): the keys and values of all that is stored, the prefix included."""
        kept = [(self._keys[k][0, :, :end], self._values[k][0, :, :end]) for k, end in sorted(self._lengths.items())]
        return torch.stack([torch.stack(pair) for pair in kept])

    @property
    def num_bytes(self) -> int:
        """Memory of the buffers."""
        return sum(t.nbytes for kept in (self._keys, self._values) for t in kept.values())

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Store k, v of shape (1, G, t, D) of new tokens and return those of the whole sequence so far."""
        length = self._lengths.get(layer, 0)
        total = length + key.shape[2]
        self._keys[layer] = _grown(self._keys.get(layer), key, length, total)
        self._values[layer] = _grown(self._values.get(layer), value, length, total)
        self._lengths[layer] = total
        return self._keys[layer][:, :, :total], self._values[layer][:, :, :total]

    def stored(self, end: int) -> list[tuple[int, Tensor, Tensor]]:
        """(layer, keys, values) (1, G, end, D) of the first `end` positions, the prefix counted."""
        return [(k, self._keys[k][:, :, :end], self._values[k][:, :, :end]) for k in self._keys]


def _grown(buffer: Tensor | None, new: Tensor, length: int, total: int) -> Tensor:
    if buffer is None or buffer.shape[2] < total:
        capacity = max(SMALLEST, 1 << (total - 1).bit_length())
        grown = new.new_empty(1, new.shape[1], capacity, new.shape[3])
        if buffer is not None:
            grown[:, :, :length] = buffer[:, :, :length]
        buffer = grown
    buffer[:, :, length:total] = new
    return buffer


class Block:
    """Rows of one size: per layer keys and values (num, G, size, D), taken from memory when they are first written."""

    def __init__(self, num: int, size: int) -> None:
        self.num = num
        self.size = size
        self.owners: list[RowCache | None] = [None] * num
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def layer(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The layer's buffers; `key` and `value` (1, G, t, D) say of what kind they are.

        They begin as zeros: attention masks what a row does not hold, and a mask does not stop a NaN.
        """
        if layer not in self.keys:
            self.keys[layer] = key.new_zeros(self.num, key.shape[1], self.size, key.shape[3])
            self.values[layer] = value.new_zeros(self.num, value.shape[1], self.size, value.shape[3])
        return self.keys[layer], self.values[layer]


class RowCache:
    """Keys and values of one sequence in a row of a pool's block. `length` moves on by `advance`, after a pass."""

    def __init__(self, pool: KVPool) -> None:
        self.pool = pool
        self.num_prefix = 0
        self.length = 0
        self.block: Block | None = None
        self.row = -1

    @property
    def end(self) -> int:
        """Positions in use, the prefix counted."""
        return self.length + self.num_prefix

    def begin(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put a prefix (1, G, P, D) in front, while no token is stored."""
        if self.length == 0:
            self.num_prefix = key.shape[2]
            self._write(layer, 0, key, value)

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (1, G, t, D) of new tokens; returns (1, G, S, D) of the whole sequence so far."""
        keys, values = self._write(layer, self.end, key, value)
        total = self.end + key.shape[2]
        return keys[self.row : self.row + 1, :, :total], values[self.row : self.row + 1, :, :total]

    def advance(self, num_tokens: int) -> None:
        """The pass that wrote so many tokens in every layer is over."""
        self.length += num_tokens

    def take(self, other: KVCache, length: int) -> None:
        """Begin with the first `length` tokens of another cache, and the prefix before them."""
        for layer, key, value in other.stored(length + other.num_prefix):
            self._write(layer, 0, key, value)
        self.num_prefix, self.length = other.num_prefix, length

    def bytes_of(self, length: int) -> int:
        """Memory of a copy of the first `length` tokens, the prefix before them included."""
        return (length + self.num_prefix) * self.pool.token_bytes

    def copy(self, length: int) -> KVCache:
        """The first `length` tokens in buffers of their own, with the prefix before them."""
        copy, end = KVCache(), length + self.num_prefix
        copy.num_prefix = self.num_prefix
        assert self.block is not None
        for layer, keys in self.block.keys.items():
            row = slice(self.row, self.row + 1)
            copy._keys[layer] = keys[row, :, :end].clone()
            copy._values[layer] = self.block.values[layer][row, :, :end].clone()
            copy._lengths[layer] = end
        return copy

    def release(self, *, wipe: bool = False) -> None:
        """Give the row back at once. `wipe` it when what it holds may not be finite."""
        if self.block is not None:
            if wipe:
                for kept in (self.block.keys, self.block.values):
                    for buffer in kept.values():
                        buffer[self.row] = 0
            self.pool.give_back(self.block, self.row)
        self.block, self.row, self.length, self.num_prefix = None, -1, 0, 0

    def _write(self, layer: int, start: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        assert self.block is not None, "room is made before a pass"
        keys, values = self.block.layer(layer, key, value)
        end = start + key.shape[2]
        keys[self.row, :, start:end] = key[0]
        values[self.row, :, start:end] = value[0]
        return keys, values


class KVPool:
    """Rows for sequences within `max_bytes` (None: as much as is asked for); a token takes `token_bytes`.

    Blocks are kept for the next sequence; empty ones of another size make room when the budget is used up.
    """

    def __init__(self, token_bytes: int, max_bytes: int | None = None) -> None:
        self.token_bytes = token_bytes
        self.max_bytes = max_bytes
        self.blocks: list[Block] = []

    @property
    def num_bytes(self) -> int:
        """Memory of all blocks."""
        return sum(self._bytes(block.num, block.size) for block in self.blocks)

    @property
    def used_bytes(self) -> int:
        """Memory of the rows that sequences have."""
        return sum(self._bytes(sum(o is not None for o in block.owners), block.size) for block in self.blocks)

    def fits(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens has room in an empty pool."""
        return self.max_bytes is None or self._bytes(1, row_size(num_tokens)) <= self.max_bytes

    def ensure(self, cache: RowCache, num_tokens: int) -> bool:
        """Let the cache have room for so many tokens (its prefix counted); what it holds moves with it.

        False when the budget does not allow it, and then nothing has changed.
        """
        if cache.block is not None and cache.block.size >= num_tokens:
            return True
        found = self._free_row(row_size(num_tokens))
        if found is None:
            return False
        block, row = found
        if (old := cache.block) is not None:
            for layer, keys in old.keys.items():
                key, value = keys[cache.row, None, :, : cache.end], old.values[layer][cache.row, None, :, : cache.end]
                new_keys, new_values = block.layer(layer, key, value)
                new_keys[row, :, : cache.end], new_values[row, :, : cache.end] = key[0], value[0]
            self.give_back(old, cache.row)
        block.owners[row] = cache
        cache.block, cache.row = block, row
        return True

    def give_back(self, block: Block, row: int) -> None:
        """Free a row."""
        block.owners[row] = None

    def _free_row(self, size: int) -> tuple[Block, int] | None:
        """The first free row of a size, in a new block when there is none and the budget allows it."""
        for block in self.blocks:
            if block.size == size and None in block.owners:
                return block, block.owners.index(None)
        num = max(1, min(32, BLOCK_TOKENS // size))
        if self.max_bytes is not None:
            self._make_room(self._bytes(num, size))
            left = self.max_bytes - self.num_bytes
            num = min(num, left // self._bytes(1, size))
            if num < 1:
                return None
        self.blocks.append(Block(num, size))
        return self.blocks[-1], 0

    def _make_room(self, num_bytes: int) -> None:
        """Drop blocks that nobody uses until so many bytes are free."""
        assert self.max_bytes is not None
        for block in [b for b in self.blocks if not any(b.owners)]:
            if self.num_bytes + num_bytes <= self.max_bytes:
                return
            self.blocks.remove(block)

    def _bytes(self, num: int, size: int) -> int:
        return num * size * self.token_bytes


def row_size(num_tokens: int) -> int:
    """The smallest size of row that holds so many tokens."""
    return max(SMALLEST, 1 << (num_tokens - 1).bit_length())
