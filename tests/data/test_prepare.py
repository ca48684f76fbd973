"""Splits share no prompt and do not depend on row order; duplicates, leakage and blends count exactly."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailor.data.blend import blend
from tailor.data.prepare import duplicates, leakage, split
from tailor.data.records import (
    Comparison,
    Conversation,
    Document,
    Judged,
    PromptCompletion,
    Rated,
    Record,
    Retrieval,
)
from tailor.errors import ConfigError, DataError
from tailor.text.messages import assistant, system, user


def pairs(*prompts: str) -> list[Record]:
    return [PromptCompletion(prompt, f"answer {index}") for index, prompt in enumerate(prompts)]


def key(record: Record) -> str:
    assert isinstance(record, PromptCompletion)
    return " ".join(record.prompt.split()).casefold()


@settings(deadline=None)
@given(
    prompts=st.lists(st.sampled_from(["a", "A", " a ", "b", "c", "d e", "D  E", "f", "g"]), min_size=2, max_size=40),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_no_prompt_on_both_sides_and_nothing_lost(prompts: list[str], fraction: float, seed: int) -> None:
    rows = pairs(*prompts)
    if len({key(row) for row in rows}) < 2:
        with pytest.raises(DataError, match="cannot be split"):
            split(rows, validation_fraction=fraction, seed=seed)
        return
    train, validation = split(rows, validation_fraction=fraction, seed=seed)
    assert train
    assert validation
    assert not {key(row) for row in train} & {key(row) for row in validation}
    assert sorted(map(id, train + validation)) == sorted(map(id, rows))
    assert train == [row for row in rows if row in train]
    assert leakage(train, validation).normalised == ()


def test_ninety_ten_is_exact_for_distinct_prompts() -> None:
    rows = pairs(*map(str, range(1000)))
    train, validation = split(rows)
    assert (len(train), len(validation)) == (900, 100)
    assert split(rows) == (train, validation)
    assert split(rows, seed=1).validation != validation


def test_the_split_does_not_depend_on_the_order_of_rows() -> None:
    rows = pairs(*(str(n % 300) for n in range(1000)))
    shuffled = random.Random(0).sample(rows, len(rows))
    assert {id(row) for row in split(rows).validation} == {id(row) for row in split(shuffled).validation}


def test_added_rows_do_not_reshuffle_the_others() -> None:
    old = pairs(*map(str, range(500)))
    before = {id(row) for row in split(old).validation}
    after = {id(row) for row in split(old + pairs(*map(str, range(500, 550)))).validation}
    # Ranks are fixed, so of 50 rows that stay in validation only those are replaced which new rows outrank.
    assert len(before & after) >= 40


def test_a_huge_group_does_not_swallow_the_validation_set() -> None:
    for seed in range(10):
        train, validation = split(pairs(*["same"] * 90, *map(str, range(10))), seed=seed)
        assert (len(train), len(validation)) == (90, 10)
    train, validation = split(pairs(*["a"] * 50, *["b"] * 40))
    assert (len(train), len(validation)) == (50, 40)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, float("nan")])
def test_fractions_outside_zero_to_one(fraction: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        split(pairs("a", "b"), validation_fraction=fraction)


def test_no_rows_cannot_be_split() -> None:
    with pytest.raises(DataError, match="0 rows"):
        split([])


def test_every_kind_of_record_has_a_prompt_to_group_by() -> None:
    hi = (user("hi"),)
    makers = [
        lambda n: Conversation((system("s"), *hi, assistant(str(n)))),
        lambda n: Comparison(hi, (assistant(str(n)),), (assistant("no"),)),
        lambda n: Judged(hi, (assistant(str(n)),), True),
        lambda n: Rated(hi, (assistant(str(n)),), {"helpfulness": 1.0}),
        lambda n: Retrieval("hi", str(n)),
    ]
    for make in makers:
        with pytest.raises(DataError, match="2 rows with 1 different prompts"):
            split([make(1), make(2)])
        assert duplicates([make(1), make(2), make(1)]).exact == ((0, 2),)
    assert len(split([Document("a"), Document("b")]).validation) == 1


def test_what_makes_rows_different() -> None:
    hi, a, b = (user("hi"),), (assistant("a"),), (assistant("b"),)
    rows = [
        Comparison(hi, a, b),
        Comparison(hi, b, a),
        Judged(hi, a, True),
        Judged(hi, a, False),
        Rated(hi, a, {"helpfulness": 1.0}),
        Rated(hi, a, {"helpfulness": 2.0}),
        Retrieval("q", "p", ("n",)),
        Retrieval("q", "p"),
        PromptCompletion("x", "y z"),
        PromptCompletion("x y", "z"),
        Document("q"),
    ]
    assert duplicates(rows).normalised == ()


def test_duplicates_exact_and_normalised() -> None:
    rows: list[Record] = [
        PromptCompletion("Hi", "a"),
        PromptCompletion("hi ", "A"),
        PromptCompletion("Hi", "a", meta={"id": 3}),
        PromptCompletion("Hi", "b"),
        Conversation((user("Hi"), assistant("a"))),
    ]
    found = duplicates(rows)
    assert found.exact == ((0, 2, 4),)
    assert found.normalised == ((0, 1, 2, 4),)


def test_leakage_pairs_rows_with_the_same_prompt() -> None:
    found = leakage(pairs("a", "b", "b"), pairs("c", "b", "B "))
    assert found.exact == ((1, 1),)
    assert found.normalised == ((1, 1), (2, 1))
    assert leakage([], pairs("a")).exact == ()


@settings(deadline=None)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 10), min_size=4, max_size=4),
    num_rows=st.integers(1, 60),
)
def test_blend_proportions_are_exact_to_a_row(sizes: list[int], weights: list[float], num_rows: int) -> None:
    sources = [
        ([Document(f"{index}.{row}") for row in range(size)], weights[index]) for index, size in enumerate(sizes)
    ]
    mixed = blend(sources, seed=3, num_rows=num_rows)
    assert len(mixed) == num_rows
    counts = Counter(record.text for record in mixed if isinstance(record, Document))
    for index, (rows, weight) in enumerate(sources):
        given_rows = [counts[row.text] for row in rows]
        assert abs(sum(given_rows) - num_rows * weight / sum(w for _, w in sources)) < 1 + 1e-9
        assert max(given_rows) - min(given_rows) <= 1, "no row a second time before all have been used"
        assert index == 0 or sources[index - 1][0] is not rows
    assert mixed == blend(sources, seed=3, num_rows=num_rows)


def test_blend_without_weights_is_everything_once() -> None:
    first, second = pairs("a", "b", "c"), pairs("d")
    mixed = blend([(first, None), (second, None)], seed=1)
    assert sorted(map(key, mixed)) == ["a", "b", "c", "d"]


def test_blend_refuses_unusable_settings() -> None:
    rows = pairs("a")
    with pytest.raises(ConfigError, match="no sources"):
        blend([])
    with pytest.raises(DataError, match="source 2 has no rows"):
        blend([(rows, 1.0), ([], 1.0)])
    with pytest.raises(ConfigError, match="every source a weight, or none"):
        blend([(rows, 1.0), (rows, None)])
    for weight in (-1.0, 0.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="weights must be"):
            blend([(rows, weight)])
    with pytest.raises(ConfigError, match="num_rows is 0"):
        blend([(rows, 1.0)], num_rows=0)
