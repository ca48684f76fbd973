"""The packed attention: equal to the stock models, cached = recomputed, shared beginnings = separate sequences."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tailor.data.packing import Segment
from tailor.errors import ConfigError, ResourceError
from tailor.models import attention
from tailor.models.base import Base, wrap_model
from tailor.models.kv_cache import KVCache
from tailor.models.placement import REFUSED, SUPPORTED, placement_of
from tailor.models.plan import LONG_SEQUENCE, Plan
from tiny_models import ARCHITECTURES, tiny_base, tiny_model, tiny_tokenizer

LENGTHS = (13, 1, 20, 8)
TOLERANCE = 1e-5


def rows(lengths: Sequence[int] = LENGTHS, seed: int = 1) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 320, (n,), generator=generator).tolist() for n in lengths]


def run(base: Base, plan: Plan, ids: Sequence[int], positions: Sequence[int]) -> Tensor:
    with torch.no_grad(), base.host.run(plan):
        return base.head.logits(base.hidden(plan, torch.tensor(ids), torch.tensor(positions)))


def packed_logits(base: Base, sequences: Sequence[Sequence[int]]) -> list[Tensor]:
    """One pass over all sequences side by side, cut back into rows."""
    segments, ids, positions = [], [], []
    for row in sequences:
        segments.append(Segment(len(ids), len(ids) + len(row)))
        ids += row
        positions += range(len(row))
    logits = run(base, Plan.of(segments), ids, positions)
    return [logits[s.start : s.end] for s in segments]


def test_every_supported_architecture_is_tried_here() -> None:
    assert set(ARCHITECTURES) == set(SUPPORTED)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_packed_equals_the_stock_model_row_by_row(model_type: str) -> None:
    stock = tiny_model(model_type)
    expected = []
    for row in rows():
        with torch.no_grad():
            expected.append(stock(input_ids=torch.tensor([row]), use_cache=False).logits[0])
    found = packed_logits(tiny_base(model_type), rows())
    for theirs, ours in zip(expected, found, strict=True):
        assert theirs.std() > 0.1, "the toy must be able to show a difference"
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_cached_decoding_of_unequal_sequences_equals_full_recompute(model_type: str) -> None:
    base = tiny_base(model_type)
    sequences = rows((3, 12, 7))
    caches = [KVCache() for _ in sequences]
    # all prompts at once; then two chunks of unequal size; then token by token while the first row sits out
    steps: list[list[list[int]]] = [[row[:] for row in sequences], *(rows(n, seed=9) for n in ((1, 4, 2), (5, 1, 1)))]
    steps += [[[], *rows((1, 1), seed=20 + k)] for k in range(5)]
    so_far: list[list[int]] = [[] for _ in sequences]
    for chunks in steps:
        running = [k for k, chunk in enumerate(chunks) if chunk]
        segments, ids, positions = [], [], []
        for k in running:
            seen, chunk = len(so_far[k]), chunks[k]
            segments.append(Segment(len(ids), len(ids) + len(chunk), position0=seen))
            ids += chunk
            positions += range(seen, seen + len(chunk))
            so_far[k] += chunk
        logits = run(base, Plan.of(segments, caches=[caches[k] for k in running]), ids, positions)
        for k, segment in zip(running, segments, strict=True):
            assert caches[k].length == len(so_far[k])
            whole = base.logits(so_far[k])[-segment.length :]
            torch.testing.assert_close(logits[segment.start : segment.end], whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_shared_beginnings_equal_separate_sequences_two_levels_deep(model_type: str) -> None:
    base = tiny_base(model_type)
    root, left, right, leaf, other = rows((9, 4, 6, 5, 3))
    # root ─┬─ left ─── leaf        and a stranger beside them
    #       └─ right
    table = [(root, -1, 0), (left, 0, 9), (right, 0, 9), (leaf, 1, 13), (other, -1, 0)]
    segments, ids, positions = [], [], []
    for tokens, parent, position0 in table:
        segments.append(Segment(len(ids), len(ids) + len(tokens), parent=parent, position0=position0))
        ids += tokens
        positions += range(position0, position0 + len(tokens))
    logits = run(base, Plan.of(segments), ids, positions)
    separate = packed_logits(base, [root, root + left, root + right, root + left + leaf, other])
    for segment, whole in zip(segments, separate, strict=True):
        own = logits[segment.start : segment.end]
        torch.testing.assert_close(own, whole[-segment.length :], atol=TOLERANCE, rtol=0)


def test_attention_mask_by_hand() -> None:
    assert attention.visible(2, 4, None, torch.device("cpu")).tolist() == [[True, True, True, False], [True] * 4]
    assert attention.visible(2, 4, 2, torch.device("cpu")).tolist() == [
        [False, True, True, False],
        [False, False, True, True],
    ]


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 1, 3, 50])
@pytest.mark.parametrize(("t", "s"), [(5, 5), (1, 6), (3, 8), (1, 1)])
def test_attention_equals_the_formula(t: int, s: int, window: int | None, softcap: float | None) -> None:
    query = torch.randn(1, 4, t, 6, dtype=torch.float64)
    key, value = torch.randn(2, 1, 2, s, 6, dtype=torch.float64)
    found = attention.attention(query, key, value, 0.3, window, softcap)
    expected = torch.zeros_like(query)
    for head in range(4):
        for i in range(t):
            place = s - t + i
            first = 0 if window is None else max(0, place - window + 1)
            scores = (key[0, head // 2, first : place + 1] @ query[0, head, i]) * 0.3
            scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
            expected[0, head, i] = scores.softmax(0) @ value[0, head // 2, first : place + 1]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_cache_keeps_what_it_was_given_while_it_grows() -> None:
    cache, pieces = KVCache(), []
    for size in (3, 60, 1, 1, 100):
        key, value = torch.randn(2, 1, 2, size, 4)
        pieces.append((key, value))
        for layer in (0, 1):
            keys, values = cache.append(layer, key, value)
            assert torch.equal(keys, torch.cat([k for k, _ in pieces], dim=2))
            assert torch.equal(values, torch.cat([v for _, v in pieces], dim=2))
    assert cache.length == 165


@pytest.mark.parametrize("model_type", REFUSED)
def test_architectures_that_would_be_wrong_are_refused_by_name(model_type: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{model_type}' are not supported: it"):
        placement_of(SimpleNamespace(model_type=model_type))


def test_refused_and_unknown_architectures_do_not_load() -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.BloomConfig(hidden_size=16, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match="'bloom' are not supported: it uses ALiBi"):
        wrap_model(model, tiny_tokenizer(), torch.device("cpu"))
    with pytest.raises(ConfigError, match="'lama'") as caught:
        placement_of(SimpleNamespace(model_type="lama"))
    assert "did you mean 'llama'" in str(caught.value.hint)


def test_dynamic_rope_is_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ConfigError, match="dynamic RoPE"):
        tiny_base("llama", rope_parameters=rope)


@pytest.mark.parametrize("rope_type", ["linear", "yarn", "llama3"])
def test_fixed_rope_scalings_are_packed_right(rope_type: str) -> None:
    rope: dict[str, Any] = {"rope_type": rope_type, "factor": 2.0, "rope_theta": 1e4}
    if rope_type == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    if rope_type == "yarn":
        rope |= {"original_max_position_embeddings": 128}
    stock = tiny_model("llama", rope_parameters=rope)
    row = rows((30,))[0]
    with torch.no_grad():
        expected = stock(input_ids=torch.tensor([row]), use_cache=False).logits[0]
    found = packed_logits(tiny_base("llama", rope_parameters=rope), [row[:5], row])[1]
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)


def test_longrope_runs_with_its_short_factors_up_to_where_they_hold() -> None:
    factors = {"short_factor": [1.0, 1.2, 1.5, 2.0], "long_factor": [4.0, 5.0, 6.0, 8.0]}
    changes = {
        "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "factor": 4.0, **factors},
        "original_max_position_embeddings": 64,
    }
    stock, base = tiny_model("phi3", **changes), tiny_base("phi3", **changes)
    assert base.max_seq_len == 64
    sequences = rows((40, 40))  # together beyond 64, each below
    for row, ours in zip(sequences, packed_logits(base, sequences), strict=True):
        with torch.no_grad():
            expected = stock(input_ids=torch.tensor([row]), use_cache=False).logits[0]
        torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)
    with pytest.raises(ResourceError):
        base.logits([5] * 65)


def test_a_packed_pass_that_deviates_is_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaky(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)  # not causal

    monkeypatch.setattr(attention, "attention", leaky)
    with pytest.raises(ConfigError, match="differs from the stock model"):
        tiny_base("llama")


def test_nan_in_a_packed_pass_is_refused_at_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "attention", lambda query, *args: torch.full_like(query, float("nan")))
    with pytest.raises(ConfigError, match="differs from the stock model"):
        tiny_base("llama")


def test_a_sequence_beyond_the_context_is_refused() -> None:
    base = tiny_base("llama")
    assert base.max_seq_len == 256
    assert base.logits([5] * 256).shape == (256, 320)
    with pytest.raises(ResourceError, match="257 tokens exceeds the base's context of 256"):
        base.logits([5] * 257)
    # positions count, not the tokens of this pass
    plan = Plan.of([Segment(0, 2, position0=255)], caches=[KVCache()])
    with pytest.raises(ResourceError, match="257"), base.host.run(plan):
        base.hidden(plan, torch.tensor([5, 5]), torch.tensor([255, 256]))


def test_the_model_runs_inside_a_plan_only() -> None:
    base = tiny_base("llama")
    with pytest.raises(RuntimeError, match="inside"):
        base.model(input_ids=torch.tensor([[5, 6]]))


def test_blocks_are_for_short_sequences_and_never_for_generation() -> None:
    """Their masks grow with the square of the length, so what counts is the whole sequence, parents included."""

    def in_blocks(dtype: torch.dtype, *segments: Segment, caches: Sequence[KVCache] | None = None) -> bool:
        return Plan.of(segments, caches=caches).in_blocks(torch.empty(1, dtype=dtype))

    half = LONG_SEQUENCE // 2
    shared = Segment(0, half)
    assert in_blocks(torch.bfloat16, Segment(0, LONG_SEQUENCE))
    assert not in_blocks(torch.bfloat16, Segment(0, LONG_SEQUENCE + 1))
    assert not in_blocks(torch.float32, Segment(0, 8), Segment(8, 16))
    assert in_blocks(torch.float32, shared, Segment(half, 2 * half, parent=0, position0=half))
    assert not in_blocks(torch.float32, shared, Segment(half, 2 * half + 1, parent=0, position0=half))
    assert not in_blocks(torch.bfloat16, Segment(0, 8), caches=[KVCache()])
