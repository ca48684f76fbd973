"""METRICS: every metric by name. A new metric is one entry; interval, table, file and recipe choice follow from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from tailor.errors import ConfigError, nearest
from tailor.metrics.bootstrap import Interval, interval, interval_of
from tailor.metrics.classification import macro_f1
from tailor.metrics.rouge import rouge
from tailor.metrics.text_scores import exact_match, token_f1
from tailor.metrics.translation import CorpusScore, bleu, chrf


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that a metric may look at for one row; what was not asked for keeps its default.

    `label` is the right one. `predicted` is the label that the generated answer names (None: it names none), `chosen`
    the label with the highest logprob. `logprob` is summed over the reference's `num_tokens` counted tokens.
    """

    reference: str
    label: str
    completion: str = ""
    predicted: str | None = None
    chosen: str | None = None
    logprob: float = 0.0
    num_tokens: int = 1


Outcomes = Sequence[Outcome]
Group = Literal["labels", "text", "likelihood"]
Needs = Literal["completions", "label scores", "likelihood"]


@dataclass(frozen=True, slots=True)
class Metric:
    """How a score comes about: per row (`row`), over the rows together (`corpus`), or both; then `corpus` is the score.

    `needs` says which passes must run, `package` what must be installed, `signature` how the score was computed.
    """

    group: Group
    needs: Needs
    row: Callable[[Outcome], float] | None = None
    corpus: Callable[[Outcomes], float] | None = None
    resamples: int = 1000
    package: str | None = None
    signature: Callable[[Outcomes], str] | None = None
    higher_is_better: bool = True

    def interval(self, outcomes: Outcomes, *, confidence: float, seed: int) -> Interval:
        """The score over all rows with its bootstrap interval."""
        if self.corpus is not None:
            return interval_of(self.corpus, outcomes, confidence=confidence, num_resamples=self.resamples, seed=seed)
        assert self.row is not None, "a metric scores rows, or all of them together"
        values = [self.row(outcome) for outcome in outcomes]
        return interval(values, confidence=confidence, num_resamples=self.resamples, seed=seed)


def _macro_f1(outcomes: Outcomes) -> float:
    """Over the labels that are right or predicted in some row, as scikit-learn averages.

    Labels of the training rows that occur in none would add a 0 each, and more of them in every bootstrap resample.
    """
    predictions, expected = [o.predicted for o in outcomes], [o.label for o in outcomes]
    occurring = sorted({*expected, *(p for p in predictions if p is not None)})
    return macro_f1(predictions, expected, occurring)


def _perplexity(outcomes: Outcomes) -> float:
    """exp(-Σ logprob / Σ tokens), held at e^700 so that a hopeless model still gets a number."""
    total = sum(o.logprob for o in outcomes) / sum(o.num_tokens for o in outcomes)
    return math.exp(min(-total, 700.0))


def _bleu(outcomes: Outcomes) -> CorpusScore:
    return bleu([o.completion for o in outcomes], [[o.reference] for o in outcomes])


def _chrf(outcomes: Outcomes) -> CorpusScore:
    return chrf([o.completion for o in outcomes], [[o.reference] for o in outcomes])


def _rouge(name: str) -> Metric:
    return Metric("text", "completions", row=lambda o: rouge(o.completion, o.reference)[name])


def _translation(compute: Callable[[Outcomes], CorpusScore]) -> Metric:
    # one tenth of a second per resample and thousand rows: 100 resamples are what a wait is worth
    return Metric(
        "text",
        "completions",
        corpus=lambda rows: compute(rows).score,
        resamples=100,
        package="sacrebleu",
        signature=lambda rows: compute(rows).signature,
    )


METRICS: dict[str, Metric] = {
    "accuracy": Metric("labels", "completions", row=lambda o: float(o.predicted == o.label)),
    "macro_f1": Metric("labels", "completions", corpus=_macro_f1),
    "label_accuracy": Metric("labels", "label scores", row=lambda o: float(o.chosen == o.label)),
    "exact_match": Metric("text", "completions", row=lambda o: exact_match(o.completion, o.reference)),
    "token_f1": Metric("text", "completions", row=lambda o: token_f1(o.completion, o.reference)),
    "rouge1": _rouge("rouge1"),
    "rouge2": _rouge("rouge2"),
    "rougeL": _rouge("rougeL"),
    "bleu": _translation(_bleu),
    "chrf": _translation(_chrf),
    "perplexity": Metric(
        "likelihood", "likelihood", row=lambda o: _perplexity([o]), corpus=_perplexity, higher_is_better=False
    ),
}


def metric_named(name: str) -> Metric:
    """The entry of METRICS. Raises ConfigError with the nearest name."""
    if name not in METRICS:
        raise ConfigError(f"metric {name!r} is unknown", hint=nearest(name, METRICS))
    return METRICS[name]
