"""Shots never show a prompt its own answer, and there are as many as asked for all the same."""

from __future__ import annotations

from typing import Any

import pytest

from tailor.data.examples import Rendering
from tailor.data.records import PromptCompletion
from tailor.errors import ConfigError
from tailor.techniques.prompting import Prompting
from tailor.text.messages import user
from tailor.text.render import make_renderer
from tiny_models import tiny_tokenizer

ROWS = [PromptCompletion(prompt=f"thing {k}", completion=f"answer-{k}") for k in range(9)]


def shown(technique: Prompting, prompt: str) -> list[str]:
    """The prompts of the shots in front of `prompt`."""
    return [m.content for m in technique.compose((user(prompt),))[:-1] if m.role == "user"]


@pytest.mark.parametrize("selection", ["fixed", "random", "nearest"])
def test_no_row_is_its_own_shot(selection: Any) -> None:
    technique = Prompting(shots=3, selection=selection).prepare(ROWS, seed=0)
    for row in ROWS:
        prompts = shown(technique, row.prompt)
        assert row.prompt not in prompts
        assert len(set(prompts)) == 3


def test_the_answer_is_not_in_the_training_prompt() -> None:
    technique = Prompting(shots=2, selection="fixed").prepare(ROWS, seed=0)
    tokenizer = tiny_tokenizer()
    rendering = Rendering(make_renderer(tokenizer), 1000, compose=technique.compose)
    for row in ROWS:
        example = rendering.example(row)
        assert example is not None
        assert tokenizer.decode(example.token_ids).count(row.completion) == 1


def test_a_new_prompt_sees_the_first_shots_and_not_the_spare() -> None:
    technique = Prompting(shots=2, selection="fixed").prepare(ROWS, seed=0)
    assert len(technique.examples) == 3
    assert shown(technique, "something else") == ["thing 0", "thing 1"]
    assert shown(technique, "thing 0") == ["thing 1", "thing 2"]


@pytest.mark.parametrize("selection", ["fixed", "random"])
def test_without_a_row_to_spare_a_shot_sees_one_fewer(selection: Any) -> None:
    technique = Prompting(shots=2, selection=selection).prepare(ROWS[:2], seed=0)
    assert len(shown(technique, "something else")) == 2
    assert shown(technique, "thing 0") == ["thing 1"]
    with pytest.raises(ConfigError, match="3 shots are asked for, but there are 2 rows"):
        Prompting(shots=3, selection=selection).prepare(ROWS[:2], seed=0)
