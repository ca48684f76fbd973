"""SFT: the summed negative log-likelihood of one slot's own tokens, divided by their count."""

from __future__ import annotations

import pytest
import torch

from tailor.data.examples import Example
from tailor.data.packing import Placed, pack
from tailor.data.records import Comparison, Conversation, PromptCompletion
from tailor.objectives import OBJECTIVES
from tailor.objectives.objective import scored_by_slot
from tailor.objectives.sft import SFT


def rows() -> list[Placed]:
    first = Example([1, 2, 3, 4], [0, 0, 1, 1], columns={"c": [0.0, 0.1, 0.2, 0.3]}, values={"v": 1.0})
    second = Example([5, 6, 7], [0, 1, 1], columns={"c": [1.0, 1.1, 1.2]}, values={"v": 2.0})
    third = Example([8, 9], [0, 1], columns={"c": [2.0, 2.1]}, values={"v": 3.0})
    return [Placed(first, 2, 0), Placed(second, 0, 1), Placed(third, 2, 2)]


def test_logprobs_are_cut_by_slot() -> None:
    batch = pack(rows(), 100)[0]
    # slot 0 comes first: targets 6 7 | 3 4 | 9
    assert batch.targets[batch.loss_mask].tolist() == [6, 7, 3, 4, 9]
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0, -5.0])
    scored = scored_by_slot(batch, logprobs)
    assert set(scored) == {0, 2}
    assert scored[0].logprobs.tolist() == [-1.0, -2.0]
    assert scored[2].logprobs.tolist() == [-3.0, -4.0, -5.0]
    assert scored[2].rows.tolist() == [1, 1, 2]
    assert [batch.segments[r].index for r in scored[2].rows.tolist()] == [0, 0, 2]
    assert scored[2].columns["c"].tolist() == pytest.approx([0.2, 0.3, 2.1])
    assert scored[2].values["v"][scored[2].rows].tolist() == [1.0, 1.0, 3.0]
    assert float(SFT().loss(scored[2])) == 12.0


def test_a_slot_without_counted_tokens_is_not_there() -> None:
    silent = [Placed(Example([1, 2], [0, 0]), 1, 0), Placed(Example([1, 2], [0, 1]), 3, 0)]
    batch = pack(silent, 100)[0]
    assert set(scored_by_slot(batch, torch.tensor([-1.0]))) == {3}


def test_the_count_is_that_of_the_targets() -> None:
    assert SFT().count([p.example for p in rows()]) == 5
    assert SFT().count([Example([1, 2], [1, 1])]) == 1, "a first token is never predicted"


def test_what_sft_learns_from() -> None:
    assert PromptCompletion in SFT.consumes
    assert Conversation in SFT.consumes
    assert Comparison not in SFT.consumes


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_registry_is_consistent(name: str) -> None:
    assert OBJECTIVES[name].model_fields["type"].default == name
    assert OBJECTIVES[name].consumes
