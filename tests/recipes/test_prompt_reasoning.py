"""Reasoning that the model writes for shots: kept where it is right, cut before the answer, and used by `tune`."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest

from tailor.inference.backend import Completion, Request
from tailor.inference.scripted import ScriptedBackend
from tailor.metrics.answers import FINAL_ANSWER
from tailor.recipes.prompt_reasoning import bootstrapped, changed, reasoning_in, write_reasoning
from tailor.techniques import LoRA
from tailor.techniques.prompting import Prompting, Shot
from tiny_models import tiny_base


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Two and two. That makes four. The answer is 4.", "Two and two. That makes four."),
        ("Two and two, so the answer is 4", None),  # no whole sentence before it
        ("First.\nThen this\nAnswer: 4", "First.\nThen this"),
        ("The answer is 3. No, wait! The answer is 4.", "The answer is 3. No, wait!"),
        ("I do not know.", None),
        ("The answer is 4", None),
    ],
)
def test_what_stands_before_the_answer(text: str, found: str | None) -> None:
    assert reasoning_in(text, FINAL_ANSWER) == found


def sums(request: Request) -> str:
    """Adds up, but cannot count beyond ten."""
    a, b = map(int, re.findall(r"(\d+)", request.messages[-1].content)[:2])
    return f"I add {b} to {a}. The answer is {a + b if a + b < 10 else 10}."


SHOTS = [
    Shot(prompt="2 and 3", completion="5"),
    Shot(prompt="8 and 7", completion="15"),
    Shot(prompt="1 and 1", completion="2", reasoning="One more than one."),
]


def test_only_right_answers_give_reasoning() -> None:
    backend = ScriptedBackend(sums)
    found = write_reasoning(Prompting(shots=2, reasoning=True), SHOTS, backend.generate)
    assert [shot.reasoning for shot in found] == ["I add 3 to 2.", None, "One more than one."]
    assert len(backend.requests) == 2
    # the one that is worked out already is shown
    assert backend.requests[0].messages[1].content == "One more than one.\nThe answer is 2"


def test_with_nothing_missing_nobody_is_asked() -> None:
    backend = ScriptedBackend(sums)
    assert write_reasoning(Prompting(shots=1, reasoning=True), SHOTS[2:], backend.generate) == SHOTS[2:]
    assert backend.requests == []


class _Answering:
    """Stands in for the local engine."""

    def __init__(self, base: object) -> None:
        pass

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return ScriptedBackend(sums).generate(requests)


def test_shots_that_were_worked_out_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tailor.recipes.prompt_reasoning.LocalBackend", _Answering)
    shots = [Shot(prompt=f"{k} and {k}", completion=str(2 * k)) for k in (9, 8, 2, 3, 4, 7)]
    technique = Prompting(shots=2, reasoning=True, bootstrap=True, examples=shots)
    found, other = bootstrapped([technique, LoRA()], tiny_base())
    assert isinstance(found, Prompting)
    assert [shot.prompt for shot in found.examples] == ["2 and 2", "3 and 3", "4 and 4"]
    assert all(shot.reasoning for shot in found.examples)
    assert not found.bootstrap
    assert other == LoRA()
    nearest = changed(technique, selection="nearest")
    assert [shot.prompt for shot in bootstrapped([nearest], tiny_base())[0].examples] == [  # type: ignore[attr-defined]
        "2 and 2",
        "3 and 3",
        "4 and 4",
    ]


def test_changed_is_checked_and_forgets_what_was_computed() -> None:
    technique = Prompting(shots=1, examples=SHOTS)
    before = technique.compose(())
    other = changed(technique, system="Be brief.", selection="nearest")
    assert other.compose(()) != before
    assert other.examples == tuple(SHOTS)
    assert changed(None, system="x") == Prompting(shots=0, system="x")
