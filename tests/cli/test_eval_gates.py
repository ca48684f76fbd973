"""Gates of `tailor eval`: mistakes are found before anything is loaded, and each score is held to its good side."""

from __future__ import annotations

from pathlib import Path

import pytest

import tailor.recipes.evaluate as recipe
from tailor.cli.main import run
from tailor.errors import ConfigError, QualityError
from tailor.evaluation.evaluate import Evaluation
from tailor.metrics.bootstrap import Interval
from tailor.recipes.evaluate import Gates


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--min", "accuracy=abc"], 2, "--min accuracy wants a number, got 'abc'"),
        (["--min", "accuracy=nan"], 2, "wants a number, got 'nan'"),
        (["--min", "accuracy"], 2, "--min wants name=value"),
        (["--min", "acuracy=0.5"], 3, "did you mean 'accuracy'"),
        (["--max", "perplexty=5"], 3, "did you mean 'perplexity'"),
        (["--min", "perplexity=5"], 3, "hint: gate it with --max perplexity=5"),
        (["--max", "accuracy=0.5"], 3, "hint: gate it with --min accuracy=0.5"),
        (["--metric", "rougeL", "--min", "accuracy=0.5"], 3, "hint: add --metric accuracy"),
    ],
)
def test_a_wrong_gate_costs_no_evaluation(
    arguments: list[str], code: int, told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def never(*args: object, **settings: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(recipe, "load", never)
    assert run(["eval", "x", "rows.jsonl", *arguments]) == code
    assert told in capsys.readouterr().err


SCORES = Evaluation(
    None, "labels", "", {"accuracy": Interval(0.7, 0.6, 0.8, 9), "perplexity": Interval(4.0, 3.0, 5.0, 9)}, []
)


def test_scores_on_the_good_side_pass() -> None:
    Gates(least={"accuracy": 0.7}, most={"perplexity": 4.0}).check(SCORES)


@pytest.mark.parametrize(
    ("gates", "told"),
    [
        (Gates(least={"accuracy": 0.71}), "accuracy is 0.7000, below the gate of 0.71"),
        (Gates(most={"perplexity": 3.9}), "perplexity is 4.0000, above the gate of 3.9"),
    ],
)
def test_scores_on_the_wrong_side_raise(gates: Gates, told: str) -> None:
    with pytest.raises(QualityError, match=told):
        gates.check(SCORES)


def test_a_score_that_is_not_there_raises() -> None:
    with pytest.raises(ConfigError, match="'bleu' was not measured on these rows"):
        Gates(least={"bleu": 1.0}).check(SCORES)


def test_the_command_gates_perplexity_from_above(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n')
    command = ["eval", "tailor-nano", str(rows), "-m", "perplexity", "--quiet"]
    assert run([*command, "--max", "perplexity=1e300"]) == 0
    assert run([*command, "--max", "perplexity=1"]) == 9
    assert "above the gate of 1" in capsys.readouterr().err
