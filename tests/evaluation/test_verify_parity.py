from __future__ import annotations

import json
import math
from collections.abc import Sequence

import pytest
import torch
from test_likelihood import by_logits, shaken
from torch import Tensor

from tailor.data.examples import Example, make_examples
from tailor.data.records import PromptCompletion, Record, Source
from tailor.errors import DataError, QualityError
from tailor.evaluation import parity
from tailor.evaluation.likelihood import packed_logprobs
from tailor.evaluation.parity import (
    COARSE,
    FINE,
    alone_logprobs,
    cached_logprobs,
    compare,
    stock_logprobs,
    twin,
    verify,
)
from tailor.inference.local import LocalBackend
from tailor.models.base import Base
from tailor.models.slots import Slot
from tailor.techniques import Full, LoRA, PromptTuning
from tiny_models import tiny_base, tiny_model

ROWS: list[Record] = [
    PromptCompletion(
        prompt="hello there " * (k % 4), completion="the fox " * (1 + k % 3), source=Source("d.jsonl", k + 1)
    )
    for k in range(6)
]


def examples_for(base: Base, slot: Slot | None = None) -> list[Example]:
    backend = LocalBackend(base, {"mine": slot} if slot else {})
    return make_examples(ROWS, backend.rendering("mine" if slot else None))[0]


def assert_near(found: Sequence[Tensor], expected: Sequence[Tensor], atol: float = 1e-5) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), atol=atol, rtol=0)


@pytest.mark.parametrize("technique", [None, LoRA(rank=2), PromptTuning(num_virtual_tokens=4), Full()])
def test_every_hop_gives_the_logprobs_of_full_logits(technique: LoRA | PromptTuning | Full | None) -> None:
    base = tiny_base()
    slot = shaken(base.host.attach([technique])) if technique else None
    examples = examples_for(base, slot)
    expected = [by_logits(base, example, slot) for example in examples]
    assert_near(cached_logprobs(base, slot, examples), expected)
    assert_near(alone_logprobs(base, slot, examples), expected)
    record = verify(base, slot, examples)
    assert record.passed
    assert [hop.name for hop in record.hops] == ["one row at a time", "cached generation"]
    assert 0 < record.noise_floor < 1e-4
    assert (record.gate, record.num_rows) == (1e-4, 6)
    assert record.num_tokens == sum(example.num_targets for example in examples)
    record.check()


@pytest.mark.parametrize("model_type", ["mistral", "gemma2", "gemma3_text", "gpt2", "mixtral"])
def test_windows_caps_and_learned_positions_pass_too(model_type: str) -> None:
    base = tiny_base(model_type)
    examples = examples_for(base)
    stock = tiny_model(model_type)
    record = verify(base, None, examples, hops={"stock": lambda rows: stock_logprobs(stock, rows)})
    assert record.passed, record.hops
    assert record.noise_floor < 1e-4


def test_a_perturbed_hop_fails_by_name_and_an_equal_one_passes() -> None:
    base = tiny_base()
    examples = examples_for(base)

    def shifted(rows: Sequence[Example]) -> list[Tensor]:
        scores = [s.clone() for s in packed_logprobs(base, None, rows)]
        scores[3][1] += 0.01
        return scores

    record = verify(
        base, None, examples, hops={"reloaded": lambda rows: packed_logprobs(base, None, rows), "merged": shifted}
    )
    assert [hop.passed for hop in record.hops] == [True, True, True, False]
    worst = record.hops[-1]
    assert worst.max_difference == pytest.approx(0.01, rel=1e-3)
    assert worst.mean_difference == pytest.approx(0.01 / record.num_tokens, rel=1e-2)
    assert worst.note == "worst at token 1 of the completion in d.jsonl:4"
    with pytest.raises(QualityError, match="merged: token logprobs differ"):
        record.check()
    assert json.loads(json.dumps(record.to_dict()))["passed"] is False


def test_a_slot_that_moved_on_fails_as_reloaded() -> None:
    base = tiny_base()
    slot, other = shaken(base.host.attach([LoRA(rank=2)], seed=1)), base.host.attach([LoRA(rank=2)], seed=1)
    examples = examples_for(base, slot)
    reload = {"reloaded": lambda rows: packed_logprobs(base, other, rows)}
    assert not verify(base, slot, examples, hops=reload).passed
    other.load(slot.state())
    assert verify(base, slot, examples, hops=reload).passed


def test_missing_tokens_and_nan_never_pass() -> None:
    reference = [torch.zeros(3), torch.zeros(2)]
    fewer = compare("cut", reference, [torch.zeros(3), torch.zeros(1)], gate=math.inf)
    assert (fewer.passed, fewer.note) == (False, "4 counted tokens in 2 rows instead of 5 in 2")
    broken = compare("nan", reference, [torch.zeros(3), torch.tensor([0.0, math.nan])], gate=1.0)
    assert (broken.passed, broken.max_difference) == (False, math.inf)
    assert "token 1" in broken.note
    assert "row 1" in broken.note
    record = parity.Parity((broken,), 0.0, 1.0, 2, 5)
    assert record.to_dict()["hops"][0]["max_difference"] is None


def test_logprobs_that_are_no_numbers_fail_and_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    honest = parity.packed_logprobs
    monkeypatch.setattr(parity, "packed_logprobs", lambda *given: [s * math.nan for s in honest(*given)])
    record = verify(base, None, examples_for(base))
    assert not record.passed
    written = json.loads(json.dumps(record.to_dict(), allow_nan=False))
    assert (written["passed"], written["noise_floor"], written["gate"]) == (False, None, 1e-2)
    with pytest.raises(QualityError):
        record.check()
    alone = parity.Parity((parity.Hop("same", 0.0, 0.0, True),), math.nan, math.inf, 1, 1)
    assert not alone.passed
    assert (alone.to_dict()["noise_floor"], alone.to_dict()["gate"]) == (None, None)
    with pytest.raises(QualityError, match="no numbers"):
        alone.check()


def test_gates_follow_the_floor_between_their_bounds() -> None:
    assert (FINE.gate(0.0), FINE.gate(5e-5), FINE.gate(1.0)) == (1e-4, pytest.approx(5e-4), 1e-2)
    assert (COARSE.gate(0.0), COARSE.gate(0.05), COARSE.gate(9.0)) == (0.02, pytest.approx(0.2), 1.0)


def test_a_fault_in_packing_cannot_hide_behind_its_own_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    honest = parity.alone_logprobs
    monkeypatch.setattr(parity, "alone_logprobs", lambda *given: [s + 0.5 for s in honest(*given)])
    record = verify(base, None, examples_for(base))
    assert record.noise_floor == pytest.approx(0.5, rel=1e-3)
    assert not record.passed


def test_the_twin_has_the_slot_in_float64_and_leaves_the_base_alone() -> None:
    base = tiny_base()
    slot = shaken(base.host.attach([LoRA(rank=2), PromptTuning(num_virtual_tokens=2)]))
    examples = examples_for(base, slot)
    before = packed_logprobs(base, slot, examples)
    implementation = base.config._experts_implementation
    double = twin(base, torch.float64)
    assert base.config._experts_implementation == implementation
    exact = packed_logprobs(double, slot, examples)
    assert exact[0].dtype == torch.float64
    assert_near(exact, before)
    assert base.dtype == torch.float32
    assert next(base.model.parameters()).dtype == torch.float32
    with torch.no_grad():
        for parameter in double.model.parameters():
            parameter.zero_()
    assert all(torch.equal(a, b) for a, b in zip(packed_logprobs(base, slot, examples), before, strict=True))


def test_bfloat16_is_held_to_the_coarse_gate() -> None:
    base = tiny_base(dtype=torch.bfloat16)
    record = verify(base, None, examples_for(base))
    assert record.passed
    assert 1e-4 < record.noise_floor < 0.5
    assert record.gate >= 0.02
    assert "float32" in record.note


def test_a_large_base_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny_base()
    monkeypatch.setattr(parity, "MAX_TWIN_PARAMETERS", 10)
    monkeypatch.setattr(parity, "twin", None)
    assert "packed against alone" in verify(base, None, examples_for(base)).note


def test_few_rows_are_drawn_and_none_is_an_error() -> None:
    base = tiny_base()
    assert verify(base, None, examples_for(base), num_rows=2).num_rows == 2
    with pytest.raises(DataError):
        verify(base, None, [])


def test_a_stock_model_takes_virtual_tokens_as_embeddings() -> None:
    base = tiny_base("gemma3_text")
    slot = base.host.attach([PromptTuning(num_virtual_tokens=4)])
    examples = examples_for(base, slot)
    table = slot.state()["prompt_embeddings"]
    stock = tiny_model("gemma3_text")
    assert_near(stock_logprobs(stock, examples, table), packed_logprobs(base, slot, examples))
    with pytest.raises(QualityError, match="virtual tokens"):
        stock_logprobs(stock, examples)
