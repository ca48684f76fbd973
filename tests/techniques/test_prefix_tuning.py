"""Prefix tuning: stock transformers models with the prefix in their cache as the oracle; starts, reparametrisation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tailor.data.examples import Example
from tailor.data.packing import MIN_SHARED, Placed, Segment, pack
from tailor.errors import ConfigError, ResourceError
from tailor.inference.backend import Request, SamplingParams
from tailor.inference.local import LocalBackend
from tailor.models.base import Base
from tailor.models.kv_cache import KVCache
from tailor.models.plan import Plan
from tailor.models.slots import Slot
from tailor.techniques import LoRA
from tailor.techniques.prefix_tuning import PrefixTuning
from tailor.text.messages import user
from tiny_models import ARCHITECTURES, tiny_base, tiny_model

CLOSE = {"atol": 1e-5, "rtol": 0.0}
IDS = [1, 4, 70, 71, 99, 6, 5, 200, 33, 150, 7, 12]
NUM = 5


def with_prefix(base: Base, num: int = NUM, **settings: Any) -> tuple[Slot, Tensor]:
    """A slot whose prefix is noise, and that prefix: (L, 2, G, P, D)."""
    slot = base.host.attach([PrefixTuning(num_virtual_tokens=num, init="random", **settings)], seed=3)
    assert slot.prefix is not None
    return slot, slot.prefix.layers().detach()


@torch.no_grad()
def stock_logits(model_type: str, prefix: Tensor, ids: list[int]) -> Tensor:
    """The stock model continuing a cache that holds the prefix, positions counted on."""
    model = tiny_model(model_type)
    cache = transformers.DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(prefix):
        cache.update(keys[None], values[None], layer)
    num = prefix.shape[3]
    positions = torch.arange(num, num + len(ids))
    mask = torch.ones(1, num + len(ids), dtype=torch.long)
    found = model(
        input_ids=torch.tensor([ids]), past_key_values=cache, position_ids=positions[None], attention_mask=mask
    )
    return found.logits[0]  # type: ignore[no-any-return]


# the toy's windows are 7 tokens: a prefix of 5 slides out of sight within the row, one of 11 is never seen whole
@pytest.mark.parametrize("num", [NUM, 11])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_stock_model_with_the_prefix_as_its_past_agrees(model_type: str, num: int) -> None:
    base = tiny_base(model_type)
    slot, prefix = with_prefix(base, num)
    found = base.logits(IDS, slot.number)
    torch.testing.assert_close(found, stock_logits(model_type, prefix, IDS), **CLOSE)
    assert float((found - base.logits(IDS)).abs().max()) > 1e-2


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_shape_is_that_of_the_models_own_keys(model_type: str) -> None:
    host = tiny_base(model_type).host
    layers, groups, size = host.kv_shape
    assert host.keys_values(IDS).shape == (layers, 2, groups, len(IDS), size)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_keys_and_values_of_a_text_stand_for_the_text(model_type: str) -> None:
    """Started from a text's own keys and values, the slot says what the base says after that text."""
    base = tiny_base(model_type)
    text = "the quick fox"
    ids = base.tokenizer.encode(text)
    whole = base.logits([*ids, *IDS])[len(ids) :]
    slot = base.host.attach([PrefixTuning(num_virtual_tokens=len(ids), init="text", init_text=text)])
    torch.testing.assert_close(base.logits(IDS, slot.number), whole, **CLOSE)
    again = PrefixTuning(
        num_virtual_tokens=len(ids), init="text", init_text=text, reparametrisation=True, encoder_hidden=24
    )
    torch.testing.assert_close(base.logits(IDS, base.host.attach([again]).number), whole, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2", "gpt2"])
def test_every_way_through_attention_agrees(model_type: str, dtype: torch.dtype) -> None:
    """Alone, packed beside the base, behind a shared beginning (in blocks), and cached token by token."""
    base = tiny_base(model_type, dtype)
    slot, _ = with_prefix(base)
    expected = base.logits(IDS, slot.number)
    half = len(IDS) // 2
    beginning = Segment(0, half, slot.number)
    rest = [Segment(half * k, half * (k + 1), slot.number, parent=0, position0=half) for k in (1, 2)]
    shared = Plan.of([beginning, *rest])
    assert shared.in_blocks(torch.zeros(1, dtype=dtype))
    beside = Plan.of([Segment(0, 4), Segment(4, 4 + len(IDS), slot.number)])
    assert not beside.in_blocks(torch.zeros(1, dtype=dtype))
    with torch.no_grad():
        for plan, ids in ((shared, IDS + IDS[half:]), (beside, [9, 8, 7, 6, *IDS])):
            positions = torch.cat([torch.arange(s.length) + s.position0 for s in plan.segments])
            with base.host.run(plan):
                logits = base.head.logits(base.hidden(plan, torch.tensor(ids), positions))
            last = plan.segments[-1].length
            torch.testing.assert_close(logits[-last:], expected[-last:], **CLOSE)
        torch.testing.assert_close(logits[:4], base.logits([9, 8, 7, 6]), **CLOSE)
        cache, found = KVCache(), []
        for start, end in ((0, 4), (4, 5), (5, 8), (8, len(IDS))):
            assert cache.length == start
            plan = Plan.of([Segment(0, end - start, slot.number, position0=start)], caches=[cache])
            with base.host.run(plan):
                found.append(
                    base.head.logits(base.hidden(plan, torch.tensor(IDS[start:end]), torch.arange(start, end)))
                )
    assert cache.layers().shape[3] == NUM + len(IDS)
    torch.testing.assert_close(torch.cat(found), expected, **CLOSE)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma2"])
def test_in_bfloat16_it_is_off_by_rounding_only(model_type: str) -> None:
    """Half precision runs in blocks; several slots with prefixes of different lengths stand in one row."""
    exact, rough = tiny_base(model_type, torch.float64), tiny_base(model_type, torch.bfloat16)
    slots = [[with_prefix(base, num)[0] for num in (3, 11)] for base in (exact, rough)]
    placed = [Placed(Example(IDS, [0] * 4 + [1] * 8), slot, k) for slot in (0, 1, 2) for k in range(2)]
    assert [s.number for s in slots[0]] == [s.number for s in slots[1]] == [1, 2]
    batch = pack(placed, 1000)[0]
    truth, found = exact.score(batch), rough.score(batch).double()
    plain = torch.arange(len(truth)) < 16
    floor = (truth - found)[plain].abs().mean()
    assert (truth - found)[~plain].abs().mean() < 3 * floor
    by_slot = truth.view(3, 2, 8)
    assert torch.allclose(by_slot[:, 0], by_slot[:, 1])
    assert float((by_slot[0] - by_slot[1]).abs().max()) > 1e-2


def test_the_gradient_is_that_of_the_formula() -> None:
    """Of the prefix itself, by finite differences through the whole model; behind a shared beginning too."""
    base = tiny_base("llama", torch.float64)
    slot, _ = with_prefix(base, 2)
    table = slot.parameters["prefix_encoder.table"]
    shared = tuple(range(20, 20 + MIN_SHARED))
    rows = [Example([*shared, *tail], [0] * MIN_SHARED + [1] * len(tail)) for tail in ((5, 6, 7), (8, 9))]
    placed = [Placed(row, slot.number, k) for k, row in enumerate(rows)]
    for share in (True, False):
        batches = pack(placed, 1000, share_prefixes=share)

        def loss(batches: Any = batches) -> Tensor:
            total = []
            for batch in batches:
                plan = Plan.of_batch(batch)
                with base.host.run(plan):
                    total.append(base.batch_logprobs(batch, plan).sum())
            return torch.stack(total).sum()

        (gradient,) = torch.autograd.grad(loss(), table)
        for where in ((0, 0, 0, 0, 1), (1, 1, 1, 1, 5), (2, 0, 1, 1, 7)):
            ends = []
            for step in (1e-5, -1e-5):
                with torch.no_grad():
                    table[where] += step
                    ends.append(loss())
                    table[where] -= step
            torch.testing.assert_close((ends[0] - ends[1]) / 2e-5, gradient[where], atol=1e-6, rtol=1e-4)


def test_the_start_has_the_size_of_the_bases_own_keys_and_values() -> None:
    base = tiny_base()
    own = base.host.keys_values(range(0, 320, 5)).square().mean(dim=(2, 3, 4)).sqrt()
    for settings in ({"init": "random"}, {"init": "vocab"}):
        for reparametrisation in (False, True):
            technique = PrefixTuning(num_virtual_tokens=64, reparametrisation=reparametrisation, **settings)  # type: ignore[arg-type]
            slot = base.host.attach([technique])
            assert slot.prefix is not None
            found = slot.prefix.layers().detach().square().mean(dim=(2, 3, 4)).sqrt()
            torch.testing.assert_close(found, own, rtol=0.25, atol=0)


def test_parameters_while_training_and_after() -> None:
    """Section 4.3: P × e and two linear layers, of which 2 · L · G · D numbers per position are kept."""
    base = tiny_base()
    kept = 3 * 2 * 2 * 4 * 8
    plain = base.host.attach([PrefixTuning(num_virtual_tokens=4)])
    assert plain.num_parameters == kept
    slot = base.host.attach([PrefixTuning(num_virtual_tokens=4, reparametrisation=True, encoder_hidden=10)])
    assert slot.num_parameters == 4 * 32 + (32 * 10 + 10) + (10 + 1) * kept // 4
    assert set(slot.rates) == set(slot.parameters)
    before = base.logits(IDS, slot.number)
    state = slot.bake()
    assert list(slot.parameters) == ["prefix"]
    assert slot.num_parameters == kept
    assert not slot.rates
    assert all(name.startswith("prefix_encoder.") for name in state)
    torch.testing.assert_close(base.logits(IDS, slot.number), before, atol=1e-6, rtol=0)


def test_a_prefix_takes_its_share_of_the_context() -> None:
    base = tiny_base()
    slot, _ = with_prefix(base, 6)
    assert base.room(slot) == base.max_seq_len - 6
    base.logits([5] * base.room(slot), slot.number)
    with pytest.raises(ResourceError, match="a sequence of 257 tokens exceeds the base's context of 256"):
        base.logits([5] * (base.room(slot) + 1), slot.number)


def test_a_longer_prefix_than_the_context_is_refused() -> None:
    for init in ("vocab", "random"):
        with pytest.raises(ConfigError, match="256 virtual tokens fill the base's context of 256"):
            tiny_base("gpt2").host.attach([PrefixTuning(num_virtual_tokens=256, init=init)])


def test_generation_beside_others() -> None:
    """Prefixes of two lengths, LoRA and a prefix on one slot, and the base, token by token in one batch."""
    base = tiny_base("mistral")
    both = base.host.attach([LoRA(rank=2), PrefixTuning(num_virtual_tokens=3)], seed=4)
    slots = {"short": with_prefix(base, 2)[0], "long": with_prefix(base, 9)[0], "both": both}
    requests = [
        Request((user("the quick fox"),), name, SamplingParams(max_new_tokens=8)) for name in (None, *slots, "long")
    ]
    mixed = LocalBackend(base, slots).generate(requests)
    for request, completion in zip(requests, mixed, strict=True):
        alone = LocalBackend(base, slots).generate([request])[0]
        assert alone.token_ids == completion.token_ids
        torch.testing.assert_close(torch.tensor(completion.logprobs), torch.tensor(alone.logprobs), **CLOSE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init": "text"}, "init_text and init: text go together"),
        ({"init_text": "x"}, "init_text and init: text go together"),
        ({"encoder_hidden": 8}, "encoder_hidden has no effect without reparametrisation"),
        ({"encoder_hidden": 8, "reparametrisation": True}, "an MLP 8 wide cannot start at 50 words"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PrefixTuning(**settings)


def test_an_empty_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="init_text has no tokens"):
        tiny_base().host.attach([PrefixTuning(init="text", init_text="")])
