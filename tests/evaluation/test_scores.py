from __future__ import annotations

import math

import pytest
from sklearn.metrics import f1_score

from tailor.errors import ConfigError
from tailor.evaluation.scores import METRICS, Outcome, metric_named


def labelled(pairs: list[tuple[str, str | None]]) -> list[Outcome]:
    return [Outcome(reference=right, label=right, predicted=found, chosen=found) for right, found in pairs]


def test_accuracy_and_its_interval() -> None:
    outcomes = labelled([("a", "a"), ("a", "b"), ("b", None), ("b", "b")])
    score = METRICS["accuracy"].interval(outcomes, confidence=0.95, seed=0)
    assert (score.mean, score.n) == (0.5, 4)
    assert 0 <= score.low < 0.5 < score.high <= 1


def test_macro_f1_equals_scikit_learn_over_the_labels_that_occur() -> None:
    right, found = list("aabbbcdd"), list("abbbacda")
    score = METRICS["macro_f1"].interval(labelled(list(zip(right, found, strict=True))), confidence=0.95, seed=0)
    assert score.mean == pytest.approx(f1_score(right, found, average="macro"))


def test_a_perfect_macro_f1_stays_perfect_in_every_resample() -> None:
    outcomes = labelled([(str(k), str(k)) for k in range(20)])
    score = METRICS["macro_f1"].interval(outcomes, confidence=0.95, seed=0)
    assert (score.mean, score.low, score.high) == (1.0, 1.0, 1.0)


def test_perplexity_weighs_rows_by_their_tokens() -> None:
    outcomes = [Outcome("", "", logprob=-6.0, num_tokens=2), Outcome("", "", logprob=-2.0, num_tokens=6)]
    metric = METRICS["perplexity"]
    assert metric.interval(outcomes, confidence=0.95, seed=0).mean == pytest.approx(math.e)
    assert metric.row is not None
    assert metric.row(outcomes[0]) == pytest.approx(math.exp(3))
    assert math.isfinite(metric.row(Outcome("", "", logprob=-1e6, num_tokens=1)))


def test_text_metrics_of_equal_texts_are_full() -> None:
    outcomes = [Outcome("the quick brown fox", "", completion="the quick brown fox")] * 3
    full = {"exact_match": 1, "token_f1": 1, "rouge1": 1, "rouge2": 1, "rougeL": 1, "bleu": 100, "chrf": 100}
    for name, most in full.items():
        assert METRICS[name].interval(outcomes, confidence=0.9, seed=0).mean == pytest.approx(most)
    assert {name for name, metric in METRICS.items() if metric.group == "text"} == set(full)


def test_an_unknown_metric_names_its_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        metric_named("acuracy")
    assert "did you mean 'accuracy'" in (caught.value.hint or "")
