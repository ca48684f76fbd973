"""Rows of a pool: what is written is read back, moves along when a row grows, and never exceeds the budget."""

from __future__ import annotations

import torch
from torch import Tensor

from tailor.models.kv_cache import BLOCK_TOKENS, SMALLEST, KVCache, KVPool, RowCache, row_size

TOKEN_BYTES = 2 * 2 * 3 * 4 * 4
"""Two layers of keys and values, three heads of four numbers of four bytes."""


def fill(cache: RowCache, numbers: Tensor) -> None:
    """Two layers of (1, 3, t, 4) keys and values that hold the numbers."""
    for layer in range(2):
        key = (numbers[None, None, :, None] + layer).expand(1, 3, -1, 4)
        cache.append(layer, key, -key)
    cache.advance(len(numbers))


def held(cache: RowCache) -> Tensor:
    copy = cache.copy(cache.length).layers()
    assert torch.equal(copy[:, 0], -copy[:, 1])
    assert torch.equal(copy[1, 0], copy[0, 0] + 1)
    assert bool((copy == copy[..., :1]).all())
    return copy[0, 0, 0, :, 0]


def test_sizes_are_powers_of_two() -> None:
    assert [row_size(n) for n in (1, 64, 65, 128, 129)] == [SMALLEST, 64, 128, 128, 256]


def test_what_is_written_moves_with_a_row_that_grows() -> None:
    pool = KVPool(TOKEN_BYTES)
    caches = [RowCache(pool) for _ in range(3)]
    for k, cache in enumerate(caches):
        assert pool.ensure(cache, 10)
        fill(cache, torch.arange(10.0) + 100 * k)
    assert pool.ensure(caches[1], 11)
    assert caches[1].block is caches[0].block, "there is room in the row"
    for size in (64, 65, 300):
        assert pool.ensure(caches[1], size)
    fill(caches[1], torch.arange(5.0))
    assert held(caches[1]).tolist() == [*range(100, 110), 0, 1, 2, 3, 4]
    assert held(caches[0]).tolist() == list(range(10))
    assert held(caches[2]).tolist() == list(range(200, 210))
    assert pool.used_bytes == TOKEN_BYTES * (64 + 64 + 512)
    for cache in caches:
        cache.release()
    assert pool.used_bytes == 0


def test_free_rows_are_used_again_lowest_first() -> None:
    pool = KVPool(TOKEN_BYTES)
    caches = [RowCache(pool) for _ in range(4)]
    for cache in caches:
        pool.ensure(cache, 5)
    assert [cache.row for cache in caches] == [0, 1, 2, 3]
    caches[1].release()
    caches[0].release()
    later = RowCache(pool)
    pool.ensure(later, 5)
    assert later.row == 0
    assert len(pool.blocks) == 1


def test_the_budget_holds_and_blocks_of_another_size_make_room() -> None:
    pool = KVPool(TOKEN_BYTES, max_bytes=TOKEN_BYTES * 512)
    short = [RowCache(pool) for _ in range(9)]
    given = [pool.ensure(cache, 60) for cache in short]
    assert given == [True] * 8 + [False], "eight rows of 64 tokens"
    assert pool.num_bytes <= TOKEN_BYTES * 512
    long = RowCache(pool)
    assert not pool.ensure(long, 200)
    for cache in short:
        cache.release()
    assert pool.ensure(long, 200)
    assert pool.num_bytes <= TOKEN_BYTES * 512
    assert pool.fits(512)
    assert not pool.fits(513)


def test_a_block_has_no_more_rows_than_its_tokens_allow() -> None:
    pool = KVPool(TOKEN_BYTES)
    cache = RowCache(pool)
    pool.ensure(cache, BLOCK_TOKENS + 1)
    assert cache.block is not None
    assert (cache.block.num, cache.block.size) == (1, 2 * BLOCK_TOKENS)


def test_a_copy_begins_another_row_and_stands_alone() -> None:
    pool = KVPool(TOKEN_BYTES)
    first, second = RowCache(pool), RowCache(pool)
    pool.ensure(first, 30)
    for layer in range(2):
        prefix = torch.full((1, 3, 2, 4), 7.0 + layer)
        first.begin(layer, prefix, -prefix)
    fill(first, torch.arange(20.0))
    copy = first.copy(12)
    assert copy.length == 12
    assert copy.num_bytes == first.bytes_of(12) == TOKEN_BYTES * 14
    first.release(wipe=True)
    pool.ensure(second, 40)
    second.take(copy, 9)
    fill(second, torch.tensor([50.0]))
    assert (second.num_prefix, second.length) == (2, 10)
    assert held(second).tolist() == [7, 7, *range(9), 50]


def test_a_wiped_row_holds_nothing_of_the_one_before() -> None:
    pool = KVPool(TOKEN_BYTES)
    broken = RowCache(pool)
    pool.ensure(broken, 8)
    fill(broken, torch.full((8,), float("nan")))
    block = broken.block
    assert block is not None
    broken.release(wipe=True)
    assert all(bool((buffer == 0).all()) for buffer in (*block.keys.values(), *block.values.values()))


def test_a_cache_of_its_own_counts_its_prefix_apart() -> None:
    cache = KVCache()
    cache.begin(0, torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4))
    cache.append(0, torch.zeros(1, 2, 5, 4), torch.zeros(1, 2, 5, 4))
    assert (cache.num_prefix, cache.length) == (3, 5)
