"""benchmarks/serve.py and int8_decoding.py: every case runs, what is compared is the same. No time is asserted."""

from __future__ import annotations

import math

import pytest
import torch

from tailor.models.base import load_base
from tailor.models.packed import Int8Linear, PackedLinear, has_int8


def test_every_case_of_the_serving_program_runs() -> None:
    import serve

    bench = serve.make_bench(serve.BASES["tiny"], ("mixed", "loras"))
    for name in ("mixed", "single", "shots"):
        found = serve.CASES[name](bench, 1)
        assert all(math.isfinite(value) and value > 0 for value in found.values()), name
    assert len(bench.mixed) == serve.NUM
    assert bench.base.stepper.step is not None


@pytest.mark.skipif(not has_int8(torch.float32), reason="no products of integers on this processor")
def test_quality_is_that_of_decoding_steps_over_the_same_words() -> None:
    import int8_decoding

    found = int8_decoding.quality("float32", 3)
    assert 0 < abs(found["more_loss"]) < 0.1
    assert found["more_loss"] == pytest.approx(found["int8_loss"] - found["own_loss"], abs=1e-5)
    assert found["same_best"] > 0.8
    base = load_base("tailor-nano", "cpu", "float32")
    texts = int8_decoding.paragraphs(base, 2)
    logprobs = int8_decoding.forced(base, texts)
    expected = torch.stack([base.logits(ids)[1:-1].log_softmax(dim=1) for ids in texts])
    torch.testing.assert_close(logprobs, expected, atol=1e-4, rtol=0)
    base.stepper.use_int8(True)
    int8_decoding.forced(base, texts)
    assert base.stepper.step is not None
    assert isinstance(base.stepper.step.head, Int8Linear)
    base.stepper.use_int8(False)
    int8_decoding.forced(base, texts)
    assert isinstance(base.stepper.step.head, PackedLinear)
