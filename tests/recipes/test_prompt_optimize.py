"""The prompt search against a scripted model: it finds what helps, says so honestly, counts calls, and goes on."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tailor.artifacts.artifact import find
from tailor.config import load_recipe
from tailor.data.readers import read_records
from tailor.errors import ConfigError, ConflictError, NotFoundError
from tailor.evaluation.evaluate import EvalSettings, evaluate
from tailor.inference.backend import Completion, Request
from tailor.inference.local import LocalBackend
from tailor.inference.scripted import ScriptedBackend
from tailor.recipes.prompt_journal import Journal
from tailor.recipes.prompt_optimize import PromptResult, optimize_prompt, resume_prompt
from tailor.recipes.prompt_report import sentence
from tailor.recipes.prompt_score import Candidate, Room, Scorer, rows_of, task_of
from tailor.recipes.prompt_settings import PromptRecipe
from tailor.recipes.tune_settings import TuneRecipe
from tailor.techniques.prompting import Prompting
from tiny_models import tiny_base

COLOURS = ("red", "green", "blue")


def right_answer(question: str) -> str:
    """Thing k has the colour k mod 3."""
    found = re.findall(r"thing (\d+)", question)
    return COLOURS[int(found[-1]) % 3] if found else "none"


def follows_instructions(request: Request) -> str:
    """Right when a system text names colours; it can write such a text when it is asked to."""
    question = request.messages[-1].content
    if "Write the instruction" in question or "Write a better one" in question:
        return 'Instruction: "Name the colours of things."'
    told = request.messages[0].role == "system" and "colours" in request.messages[0].content
    return right_answer(question) if told else "dunno"


def needs_shots(request: Request) -> str:
    """Right with three shots or more, right for every second thing with fewer."""
    question, shots = request.messages[-1].content, sum(m.role == "assistant" for m in request.messages)
    if "Write the instruction" in question or "Write a better one" in question:
        return ""
    number = int(re.findall(r"thing (\d+)", question)[-1])
    return right_answer(question) if shots >= 3 or (shots and number % 2) else "dunno"


def indifferent(request: Request) -> str:
    """Right for a third of the things, whatever it is shown."""
    return "red"


@pytest.fixture
def rows(own_home: Path, tmp_path: Path) -> str:
    path = tmp_path / "things.jsonl"
    lines = [{"prompt": f"which colour has thing {k}?", "completion": COLOURS[k % 3]} for k in range(90)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def recipe(rows: str, **settings: Any) -> PromptRecipe:
    data = {"train": rows, "max_selection": 20, "max_held_out": 25}
    return PromptRecipe(**{"name": "things", "data": data, "budget": 600, "rounds": 2, **settings})


def search(rows: str, script: Any, **settings: Any) -> tuple[PromptResult, ScriptedBackend]:
    backend = ScriptedBackend(script)
    return optimize_prompt(recipe(rows, **settings), backend=backend), backend


def test_an_instruction_that_helps_is_found(rows: str) -> None:
    result, _ = search(rows, follows_instructions)
    report = result.report
    assert report["metric"] == "accuracy"
    assert report["verdict"] == "better"
    assert report["prompt"]["system"] == "Name the colours of things."
    assert report["held_out"]["start"]["score"]["mean"] == 0.0
    assert report["held_out"]["best"]["score"]["mean"] == 1.0
    assert report["held_out"]["best_minus_start"]["low"] == 1.0
    assert "Better than the prompt it began with: +1.000" in sentence(report)
    assert len(report["rounds"]) == 1  # nothing is better than all right
    artifact = find("things")
    assert artifact.kind == "prompting"
    assert artifact.techniques[0] == Prompting(**report["prompt"])
    assert artifact.manifest["search"]["verdict"] == "better"
    assert artifact.manifest["labels"] == sorted(COLOURS)


def test_shots_that_help_are_found_and_the_shorter_of_equal_prompts_wins(rows: str) -> None:
    result, _ = search(rows, needs_shots, max_shots=4)
    report = result.report
    assert report["verdict"] == "better"
    assert report["prompt"]["shots"] >= 3
    # four shots drawn without a search do as well here, and the report says so
    assert report["held_out"]["best_minus_drawn"]["mean"] == 0.0
    assert any("not beyond noise better than shots drawn at random" in note for note in report["notes"])


def test_no_improvement_is_called_that(rows: str) -> None:
    result, _ = search(rows, indifferent)
    assert result.report["verdict"] == "start is best"
    assert result.artifact is None
    assert "nothing is saved" in sentence(result.report)
    with pytest.raises(NotFoundError):
        find("things")


def test_noise_is_called_noise(rows: str) -> None:
    def lucky(request: Request) -> str:
        """With shots right for other things than without, and for as many."""
        number = int((re.findall(r"thing (\d+)", request.messages[-1].content) or ["0"])[-1])
        shown = any(m.role == "assistant" for m in request.messages)
        return right_answer(f"thing {number}") if (number // 3) % 2 == shown else "dunno"

    result, _ = search(rows, lucky, num_instructions=0)
    report = result.report
    difference = report["held_out"].get("best_minus_start")
    assert report["verdict"] in ("no improvement beyond noise", "start is best")
    assert difference["low"] <= 0 <= difference["high"]


def test_no_held_out_prompt_is_ever_shown_or_asked_before_the_report(rows: str) -> None:
    result, backend = search(rows, indifferent, num_instructions=0, max_shots=3)
    assert result.report["rows"] == {"pool": 31, "selection": 20, "held_out": 25}
    before = backend.requests[: result.report["calls"]["search"]]
    shown = {m.content for request in backend.requests for m in request.messages[:-1] if m.role == "user"}
    asked = {request.messages[-1].content for request in before}
    held_out = {request.messages[-1].content for request in backend.requests[len(before) :]}
    assert len(held_out) == 25
    assert not held_out & (shown | asked)
    # what was chosen by is never a shot; questions of the pool are asked when the model is to get them right
    assert len(shown) > 20
    assert len(asked - shown) <= 20 + 31 - len(shown)


@pytest.mark.parametrize("budget", [200, 350])
def test_the_budget_holds_and_every_call_is_counted(rows: str, budget: int) -> None:
    result, backend = search(rows, needs_shots, budget=budget, rounds=3)
    calls = result.report["calls"]
    assert len(backend.requests) == calls["search"] + calls["held_out"] <= budget
    assert calls["held_out"] <= 75


def test_a_budget_without_room_is_refused(rows: str) -> None:
    with pytest.raises(ConfigError, match="75, and trying one prompt beside the start on 20 rows 40 more"):
        search(rows, indifferent, budget=114)


class Failing(ScriptedBackend):
    """Stops after so many calls."""

    def __init__(self, after: int) -> None:
        super().__init__(needs_shots)
        self.after = after

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        if len(self.requests) + len(requests) > self.after:
            raise KeyboardInterrupt
        return super().generate(requests)


def test_an_interrupted_search_goes_on_to_the_same_result(rows: str, own_home: Path) -> None:
    whole, backend = search(rows, needs_shots, name="whole", votes=2)
    broken = Failing(after=150)
    with pytest.raises(KeyboardInterrupt):
        optimize_prompt(recipe(rows, votes=2), backend=broken)
    journal = own_home / "prompts" / "things" / "journal.jsonl"
    with journal.open("a") as file:
        file.write('{"key": "torn')
    rest = ScriptedBackend(needs_shots)
    result = resume_prompt("things", backend=rest)
    assert len(broken.requests) + len(rest.requests) == len(backend.requests)
    same = {key: value for key, value in whole.report.items() if key not in ("name", "artifact")}
    assert {key: value for key, value in result.report.items() if key not in ("name", "artifact")} == same
    shown = ScriptedBackend(needs_shots)
    assert resume_prompt("things", backend=shown).report == result.report  # finished: it is shown again
    assert shown.requests == []


def test_other_settings_or_rows_are_another_search(rows: str) -> None:
    search(rows, needs_shots)
    with pytest.raises(ConflictError, match="other settings: rounds"):
        search(rows, needs_shots, rounds=1)
    _save_as("taken")
    with pytest.raises(ConflictError, match="artifact 'taken'"):
        search(rows, needs_shots, name="taken")
    result = optimize_prompt(recipe(rows, rounds=1), backend=ScriptedBackend(needs_shots), force=True)
    assert result.report["verdict"] == "better"
    with pytest.raises(NotFoundError, match="no prompt search 'thing'"):
        resume_prompt("thing")


def _save_as(name: str) -> None:
    from tailor.artifacts.artifact import save_hosted

    save_hosted(name, "somewhere", {"techniques": [Prompting(system="x", shots=0).model_dump(mode="json")]})


def test_a_journal_of_other_rows_is_refused(rows: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        optimize_prompt(recipe(rows), backend=Failing(after=100))
    with open(rows, "a") as file:
        file.write('{"prompt": "thing 7 again", "completion": "green"}\n')
    with pytest.raises(ConflictError, match="data_hash was"):
        resume_prompt("things", backend=ScriptedBackend(needs_shots))


def test_the_recipe_beside_it_makes_the_same_prompt(rows: str) -> None:
    result, _ = search(rows, needs_shots)
    tuned = load_recipe(result.folder / "best.yaml", TuneRecipe).recipe
    assert tuned.technique[0].prepare([], 0) == Prompting(**result.report["prompt"])
    assert tuned.data.validation_fraction == 0.3
    assert find("things").manifest["recipe"] == tuned.model_dump(mode="json")


def test_it_begins_where_it_is_told_to(rows: str) -> None:
    start = Prompting(system="Name the colours of things.", shots=0)
    result, _ = search(rows, follows_instructions, start=start)
    assert result.report["verdict"] == "start is best"
    assert result.report["held_out"]["start"]["score"]["mean"] == 1.0


def reasons(request: Request) -> str:
    """Right only when it may think, and when somebody showed it how."""
    question = request.messages[-1].content
    if "step by step" not in question:
        return "dunno"
    shown = any("Its number decides." in m.content for m in request.messages if m.role == "assistant")
    number = int(re.findall(r"thing (\d+)", question)[-1])
    if shown or number % 4 == 0:
        return f"Its number decides. The answer is {right_answer(question)}."
    return "Hm. The answer is purple."


def test_chains_of_thought_are_bootstrapped_from_right_answers(rows: str) -> None:
    result, _ = search(rows, reasons, reasoning=True, num_instructions=0, max_shots=3)
    prompt = result.report["prompt"]
    assert result.report["verdict"] == "better"
    assert prompt["reasoning"]
    assert {example["reasoning"] for example in prompt["examples"]} == {"Its number decides."}
    assert result.report["held_out"]["best"]["score"]["mean"] == 1.0


def test_votes_are_tried_and_paid_for(rows: str) -> None:
    def mostly(request: Request) -> str:
        """Greedy is wrong; of samples two in three are right."""
        sampling, question = request.sampling, request.messages[-1].content
        return right_answer(question) if sampling.temperature and sampling.seed % 3 else "dunno"

    result, _ = search(rows, mostly, votes=7, num_instructions=0, num_sets=0, budget=1500)
    assert result.report["prompt"]["votes"] == 7
    assert result.report["held_out"]["best"]["calls_per_row"] == 7
    assert result.report["verdict"] == "better"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metric": "perplexity"}, "single answers"),
        ({"metric": "macro_f1"}, "single answers"),
        ({"num_sets": 0, "num_instructions": 0}, "nothing is tried"),
        ({"metric": "label_accuracy", "votes": 3}, "nothing to reason or to vote on"),
    ],
)
def test_wrong_settings(rows: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(rows, indifferent, **settings)


@pytest.mark.parametrize(
    ("metric", "settings"),
    [
        ("accuracy", {"system": "Name the colour.", "shots": 2, "selection": "nearest"}),
        ("token_f1", {"shots": 1, "selection": "fixed"}),
        ("label_accuracy", {"shots": 1, "selection": "mmr", "similarity": "embedding"}),
        ("accuracy", {"shots": 0, "reasoning": True}),
    ],
)
def test_scores_are_those_of_an_evaluation(rows: str, tmp_path: Path, metric: str, settings: dict[str, Any]) -> None:
    records = list(read_records(rows).records)
    technique = Prompting(**settings).prepare(records[:20], 0)
    base = tiny_base()
    backend = LocalBackend(base, {"it": base.host.attach([technique])})
    chosen = rows_of(records[20:32], None)
    task = task_of(chosen, None)
    journal = Journal(tmp_path / "journal.jsonl", LocalBackend(base), 100)
    scorer = Scorer(journal, metric, task, None, 6, backend.embed, Room.of(backend))
    answers = scorer.answers([Candidate(technique, "")], chosen, "")[0]
    asked = EvalSettings(metrics=(metric,), sampling=scorer.sampling(technique))
    evaluation = evaluate(backend, "it", [row.record for row in chosen], settings=asked)
    assert answers.scores == [row.scores[metric] for row in evaluation.rows]
    assert journal.num_calls == 12
    if metric != "label_accuracy":
        assert [c.text for c in answers.completions] == [row.completion for row in evaluation.rows]
    again = Journal(journal.path, ScriptedBackend(indifferent), 100)  # nobody needs to be asked
    repeated = dataclasses.replace(scorer, journal=again).answers([Candidate(technique, "")], chosen, "")[0]
    assert repeated.scores == answers.scores
    assert [c.logprobs for c in repeated.completions] == [c.logprobs for c in answers.completions]
