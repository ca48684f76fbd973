"""From logits to tokens: penalties and truncation against transformers' processors, constraints, reported logprobs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tailor.errors import ConfigError
from tailor.inference.backend import SamplingParams
from tailor.inference.sampling import choose, describe, is_plain, modified, truncated
from tailor.inference.structured import Structure
from tailor.text.tokenizer import VIRTUAL

SIZES = st.sampled_from([5, 37, 1000])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
INF = float("inf")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_logits(seed: int, size: int, dtype: torch.dtype = torch.float32, impossible: bool = False) -> Tensor:
    """Logits of a usual spread; with `impossible`, a third of them -inf."""
    logits = 3 * torch.randn(size, generator=generator(seed))
    if impossible:
        out = torch.rand(size, generator=generator(seed + 1)) < 1 / 3
        logits[out] = -INF
        logits[seed % size] = 0.5
    return logits.to(dtype)


def greedy(logits: Tensor, *, sampled: tuple[int, ...] = (), **settings: Any) -> int:
    return choose(logits, SamplingParams(**settings), generator(), sampled_ids=sampled, stop_ids=(0,))


# ------------------------------------------------------------------------------------------------ truncation


@given(
    seed=st.integers(0, 1000),
    size=SIZES,
    dtype=DTYPES,
    impossible=st.booleans(),
    temperature=st.sampled_from([0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 3, 40]),
    top_p=st.sampled_from([0.05, 0.5, 0.91, 1.0]),
    min_p=st.sampled_from([0.0, 0.02, 0.3, 1.0]),
)
def test_probabilities_equal_those_of_transformers(
    seed: int,
    size: int,
    dtype: torch.dtype,
    impossible: bool,
    temperature: float,
    top_k: int,
    top_p: float,
    min_p: float,
) -> None:
    logits = random_logits(seed, size, dtype, impossible)
    if dtype == torch.bfloat16:  # bfloat16 has many ties, about which the two differ: see the next test
        logits = logits + torch.arange(size, dtype=torch.float64) * 1e-7
    scores = transformers.TemperatureLogitsWarper(temperature)(None, logits[None].double())
    scores = transformers.TopKLogitsWarper(top_k)(None, scores) if top_k else scores
    scores = transformers.TopPLogitsWarper(top_p)(None, scores) if top_p < 1 else scores
    scores = transformers.MinPLogitsWarper(min_p)(None, scores) if min_p else scores
    ours = truncated((logits.double() / temperature).softmax(0), top_k, top_p, min_p)
    torch.testing.assert_close(ours / ours.sum(), scores[0].softmax(0))


def test_of_equally_likely_tokens_the_first_stay() -> None:
    even = torch.full((1000,), 1e-3, dtype=torch.float64)
    assert truncated(even, 3, 1.0).nonzero()[:, 0].tolist() == [0, 1, 2]
    assert truncated(even, 0, 0.0045).nonzero()[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert truncated(even, 0, 0.5).nonzero()[:, 0].tolist() == list(range(500)), "beyond what is sorted at first"
    assert truncated(even, 0, 1.0, 1.0).count_nonzero() == 1000, "all are as likely as the likeliest"


@pytest.mark.parametrize(
    ("min_p", "kept"), [(0.0, [0, 1, 2, 3, 4]), (0.125, [0, 1, 2, 3, 4]), (0.3, [1, 3, 4]), (0.8, [1]), (1.0, [1])]
)
def test_min_p_by_hand(min_p: float, kept: list[int]) -> None:
    probabilities = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)
    assert truncated(probabilities, 0, 1.0, min_p).nonzero()[:, 0].tolist() == kept


@given(seed=st.integers(0, 1000), size=SIZES, dtype=DTYPES, impossible=st.booleans())
def test_what_is_drawn_was_possible(seed: int, size: int, dtype: torch.dtype, impossible: bool) -> None:
    logits = random_logits(seed, size, dtype, impossible)
    params = SamplingParams(temperature=1.5, top_p=0.9, min_p=0.01, frequency_penalty=0.5, repetition_penalty=1.2)
    allowed = torch.rand(size, generator=generator(seed + 2)) < 0.5
    allowed[seed % size] = True
    token = choose(logits, params, generator(seed), prompt_ids=[1, 2], sampled_ids=[3], allowed=allowed)
    assert allowed[token]
    assert logits[token] > -INF


# ------------------------------------------------------------------------------------------------ penalties and bias


@given(seed=st.integers(0, 1000), size=SIZES, dtype=DTYPES, penalty=st.sampled_from([0.5, 1.3, 10.0]))
def test_repetition_penalty_equals_that_of_transformers(
    seed: int, size: int, dtype: torch.dtype, penalty: float
) -> None:
    logits = random_logits(seed, size, dtype, impossible=True)
    prompt, sampled = [0, 3, 3], [1, 4, 4]
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    theirs = processor(torch.tensor([prompt + sampled]), logits.float()[None])[0]
    ours = modified(logits, SamplingParams(repetition_penalty=penalty), [VIRTUAL + 7, *prompt], sampled)
    assert torch.equal(ours, theirs)


def test_presence_and_frequency_by_hand() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, -INF, 0.0])
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    found = modified(logits, params, prompt_ids=[0, 0, 4], sampled_ids=[1, 2, 2, 3])
    assert found.tolist() == [1.0, 2.0 - 0.75, 3.0 - 1.0, -INF, 0.0], "the prompt does not count"
    negative = SamplingParams(presence_penalty=-2.0, frequency_penalty=-1.0)
    assert modified(logits, negative, [], [4, 4]).tolist() == [1.0, 2.0, 3.0, -INF, 4.0]
    assert torch.equal(modified(logits, params, [1, 2], []), logits)


def test_bias_is_added_and_may_ban() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0, 0.0])
    assert greedy(logits, logit_bias=((2, -100.0),)) == 1
    assert greedy(logits, logit_bias=((3, 2.0), (3, 2.0))) == 3, "given twice, it counts twice"
    with pytest.raises(ConfigError, match="logit_bias names token 4, the base has tokens 0 to 3"):
        greedy(logits, logit_bias=((4, 1.0),))


def test_the_logits_of_the_caller_stay_as_they_are() -> None:
    logits = random_logits(0, 20)
    before = logits.clone()
    settings = {"temperature": 1.0, "presence_penalty": 1.0, "repetition_penalty": 2.0, "logit_bias": ((3, 5.0),)}
    params = SamplingParams(**settings, min_new_tokens=9, top_k=3)
    choose(logits, params, generator(), sampled_ids=[1, 2], allowed=torch.arange(20) > 4, stop_ids=(5,))
    assert torch.equal(logits, before)


# ------------------------------------------------------------------------------------------------ stops, constraints


def test_no_stop_before_min_new_tokens() -> None:
    logits = torch.tensor([9.0, 1.0, 2.0])
    assert [greedy(logits, sampled=(1,) * n, min_new_tokens=2) for n in range(4)] == [2, 2, 0, 0]


def test_a_structure_that_only_lets_the_answer_end_wins_over_min_new_tokens() -> None:
    allowed = torch.tensor([True, False, False])
    params = SamplingParams(min_new_tokens=2)
    assert choose(torch.tensor([1.0, 5.0, 2.0]), params, generator(), allowed=allowed, stop_ids=(0,)) == 0


def test_greedy_within_what_is_allowed() -> None:
    logits = torch.tensor([9.0, 1.0, 2.0, 8.0])
    allowed = torch.tensor([False, True, True, False])
    assert choose(logits, SamplingParams(), generator(), allowed=allowed) == 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_allowed_is_said_even_when_the_model_holds_it_for_impossible(temperature: float) -> None:
    logits, allowed = torch.tensor([5.0, -INF, -INF, 1.0]), torch.tensor([False, True, True, False])
    drawn = [choose(logits, SamplingParams(temperature=temperature), generator(s), allowed=allowed) for s in range(20)]
    assert set(drawn) == ({1, 2} if temperature else {1})


# ------------------------------------------------------------------------------------------------ random numbers


def test_one_random_number_per_sample_whatever_the_settings() -> None:
    logits = random_logits(1, 50)
    ours, twin = generator(3), generator(3)
    for settings in (
        {"temperature": 1.0, "min_p": 0.2, "presence_penalty": 1.0},
        {"temperature": 2.0, "repetition_penalty": 1.5, "min_new_tokens": 5},
        {"temperature": 0.1, "logit_bias": ((3, 100.0),)},
    ):
        allowed = torch.arange(50) < 10
        choose(logits, SamplingParams(**settings), ours, sampled_ids=[3], allowed=allowed, stop_ids=(1,))
        torch.rand((), generator=twin, dtype=torch.float64)
        assert torch.equal(ours.get_state(), twin.get_state())
    choose(logits, SamplingParams(presence_penalty=1.0), ours, sampled_ids=[3])
    assert torch.equal(ours.get_state(), twin.get_state()), "greedy takes none"


def test_a_request_draws_the_same_alone_or_between_others() -> None:
    params = SamplingParams(temperature=1.3, top_p=0.9)
    rows = [random_logits(seed, 100) for seed in range(20)]
    alone_generator = generator(7)
    alone = [choose(row, params, alone_generator) for row in rows]
    own, other = generator(7), generator(8)
    beside = []
    for row in rows:
        choose(row.flip(0), params, other)
        beside.append(choose(row, params, own))
        choose(row, SamplingParams(), other)
    assert alone == beside


# ------------------------------------------------------------------------------------------------ plain, or not


@pytest.mark.parametrize(
    ("settings", "plain"),
    [
        ({}, True),
        ({"top_k": 5, "top_p": 0.5, "min_p": 0.1, "seed": 3, "num_top_logprobs": 5, "ignore_stop": True}, True),
        ({"stop": ("x",)}, True),
        ({"temperature": 0.1}, False),
        ({"presence_penalty": 0.1}, False),
        ({"frequency_penalty": -0.1}, False),
        ({"repetition_penalty": 0.9}, False),
        ({"logit_bias": ((1, 1.0),)}, False),
        ({"min_new_tokens": 1}, False),
        ({"structure": Structure(kind="json_object")}, False),
    ],
)
def test_plain_is_what_argmax_answers(settings: dict[str, Any], plain: bool) -> None:
    params = SamplingParams(**settings)
    assert is_plain(params) == plain
    if plain:
        for seed in range(20):
            logits = random_logits(seed, 30)
            chosen = choose(logits, params, generator(), prompt_ids=[1], sampled_ids=[2], stop_ids=(3,))
            assert chosen == int(logits.argmax())


# ------------------------------------------------------------------------------------------------ what is reported


@given(seed=st.integers(0, 1000), size=SIZES, dtype=DTYPES, impossible=st.booleans(), num=st.integers(0, 20))
def test_reported_logprobs(seed: int, size: int, dtype: torch.dtype, impossible: bool, num: int) -> None:
    logits = random_logits(seed, size, dtype, impossible)
    token = seed % size
    found = describe(logits, token, num)
    logprobs = logits.double().log_softmax(0)
    assert found.token_id == token
    assert found.logprob == pytest.approx(float(logprobs[token]), abs=1e-5)
    assert len(found.top) == min(num, int((logprobs > -INF).sum()))
    assert [value for _, value in found.top] == sorted((value for _, value in found.top), reverse=True)
    for place, value in found.top:
        assert value == pytest.approx(float(logprobs[place]), abs=1e-5)
    least = min((value for _, value in found.top), default=INF)
    named = {place for place, _ in found.top}
    others = [float(v) for place, v in enumerate(logprobs.tolist()) if place not in named]
    assert num == 0 or max(others, default=-INF) <= least + 1e-5, "no likelier one is left out"
    if token in named:
        assert dict(found.top)[token] == found.logprob, "bit for bit"


def test_ties_are_reported_in_the_order_of_their_ids() -> None:
    assert [i for i, _ in describe(torch.zeros(50), 7, 3).top] == [0, 1, 2]
    assert [i for i, _ in describe(torch.tensor([0.0, 1.0, 1.0, 1.0]), 0, 2).top] == [1, 2]
