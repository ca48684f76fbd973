"""Evaluate one customization, or answers from elsewhere, on held-out rows: every metric with its interval."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from tailor.config import Pattern, Strict
from tailor.data.records import Record, completion_of, prompt_of
from tailor.errors import ConfigError, DataError, MissingDependencyError, nearest, require
from tailor.evaluation.hosted_passes import answer_pattern, passes_over, unscored
from tailor.evaluation.passes import Progress
from tailor.evaluation.scores import METRICS, Group, Outcome, metric_named
from tailor.evaluation.task import MAX_LABELS, Kind, Task, answered, answers_of, find_task, known_answers
from tailor.inference.backend import Completion, FinishReason, SamplingParams
from tailor.inference.hosted import HostedBackend
from tailor.inference.local import LocalBackend
from tailor.metrics.answers import extract_answer
from tailor.metrics.bootstrap import Interval
from tailor.store import write_text

_GROUPS: dict[Kind, tuple[Group, ...]] = {
    "labels": ("labels", "likelihood"),
    "labels and text": ("labels", "text", "likelihood"),
    "answers and text": ("labels", "text", "likelihood"),
    "text": ("text", "likelihood"),
}


class EvalSettings(Strict):
    """What is measured, and on how many rows."""

    metrics: Literal["auto"] | tuple[str, ...] = Field(
        "auto", description="auto: by the kind of task; or a list of names"
    )
    answer_pattern: Pattern | None = Field(
        None, description=r"regular expression that reads the label out of answer and reference, e.g. '^Queue: (\w+)'"
    )
    sampling: SamplingParams | None = Field(
        None, description="not given: greedy, up to 1.5 times the longest reference"
    )
    max_rows: int | None = Field(None, ge=1, description="draw this many rows; all when not given")
    seed: int = Field(0, ge=0, description="of the drawn rows and the bootstrap")
    confidence: float = Field(0.95, gt=0, lt=1, description="share of the bootstrap that an interval holds")

    @field_validator("metrics")
    @classmethod
    def _metrics_exist(cls, metrics: Literal["auto"] | tuple[str, ...]) -> Literal["auto"] | tuple[str, ...]:
        unknown = [name for name in metrics if name not in METRICS] if metrics != "auto" else []
        if unknown:
            raise ValueError(f"metric {unknown[0]!r} is unknown ({nearest(unknown[0], METRICS)})")
        if not metrics:
            raise ValueError("name at least one metric, or auto")
        return metrics


@dataclass(frozen=True)
class RowResult:
    """One row: what was asked, what should have come, what came, and its scores.

    `answer` is what the label metrics compared: None when the answer pattern found nothing in the completion. Without
    generation `completion` and `finish_reason` are None.
    """

    source: str
    prompt: str
    reference: str
    completion: str | None
    answer: str | None
    scores: dict[str, float]
    finish_reason: FinishReason | None


@dataclass(frozen=True)
class Evaluation:
    """Scores of one customization (`artifact` None: the plain base), or of given answers, over `num_rows` rows.

    `kind` says what the rows were taken for, `reason` why; `notes` are what a reader of the numbers must know.
    """

    artifact: str | None
    kind: Kind
    reason: str
    metrics: dict[str, Interval]
    rows: list[RowResult]
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def num_rows(self) -> int:
        """Rows evaluated."""
        return len(self.rows)

    def write(self, path: str | Path) -> None:
        """All rows as JSON lines, in the order of the data."""
        write_text(path, "".join(json.dumps(dataclasses.asdict(row)) + "\n" for row in self.rows))

    def to_dict(self) -> dict[str, Any]:
        """Everything but the rows, as JSON knows it."""
        return {
            "artifact": self.artifact,
            "kind": self.kind,
            "reason": self.reason,
            "num_rows": self.num_rows,
            "metrics": {name: dataclasses.asdict(score) for name, score in self.metrics.items()},
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


def evaluate(
    backend: LocalBackend | HostedBackend,
    artifact: str | None,
    records: Sequence[Record],
    *,
    settings: EvalSettings | None = None,
    labels: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Answer and score `records` with an attached customization, or with the plain base (None).

    `labels` are completions of other rows (training); what they and the references answer is the label set. Raises
    DataError naming rows without completion, rows that do not fit the context, and rows whose reference the answer
    pattern does not match; ConfigError for a metric that these rows cannot have; MissingDependencyError for one whose
    package is missing; QualityError when the model gives no finite logprobs.
    """
    started = time.perf_counter()
    chosen = _Chosen.of(records, settings or EvalSettings(), labels)
    reasons = chosen.settings.metrics == "auto" and answer_pattern(backend, artifact) is not None
    names = chosen.metric_names(
        _usual(chosen.task), lambda name: _obstacle(name, chosen.task, reasons) or unscored(backend, name)
    )
    needs = {METRICS[name].needs for name in names}
    passes = passes_over(backend, artifact, chosen.records, progress)
    found = _Found()
    if "completions" in needs:
        sampling = chosen.settings.sampling or passes.usual_sampling()
        found.completions = passes.generate(sampling)
        if cut := sum(c.finish_reason == "length" for c in found.completions):
            chosen.notes.append(
                f"{cut} of {len(chosen.records)} completions were cut at {sampling.max_new_tokens} tokens"
            )
    if "label scores" in needs:
        found.labels = passes.choose_labels(chosen.task)
    if "likelihood" in needs:
        found.sums = passes.likelihood()
    if isinstance(backend, HostedBackend):
        chosen.notes.extend([*backend.notes, f"{backend.endpoint.name}: {backend.usage.told()}"])
    return chosen.evaluation(artifact, names, found, started)


def evaluate_answers(
    answers: Sequence[str],
    records: Sequence[Record],
    *,
    settings: EvalSettings | None = None,
    labels: Sequence[str] | None = None,
    name: str | None = None,
) -> Evaluation:
    """Score answers that no backend generated (a baseline's, a person's), one per record, under `name`.

    The same rows in the same order as `evaluate` with the same settings, scored by the same metrics. Those that ask a
    model (label scores, likelihood) are left out of `auto`. Raises ConfigError for one of them that is named, DataError
    when there is not one answer per record, and what `evaluate` raises for the records.
    """
    started = time.perf_counter()
    if len(answers) != len(records):
        raise DataError(f"{len(answers)} answers cannot be compared with {len(records)} rows: give one per row")
    chosen = _Chosen.of(records, settings or EvalSettings(), labels)
    usual = [metric for metric in _usual(chosen.task) if METRICS[metric].needs == "completions"]
    names = chosen.metric_names(usual, _beyond_answers)
    texts = [answers[k] for k in chosen.indices]
    found = _Found(completions=[Completion(text, (), (), "stop", 0, text) for text in texts])
    return chosen.evaluation(name, names, found, started)


@dataclass
class _Found:
    """What the answers' source gave, row by row; None for what was not asked of it."""

    completions: list[Completion] | None = None
    labels: list[str] | None = None
    sums: list[tuple[float, int]] | None = None


@dataclass(frozen=True)
class _Chosen:
    """The rows of one evaluation (`indices` of those given), what task they are, and the notes it gathers."""

    settings: EvalSettings
    indices: list[int]
    records: list[Record]
    references: list[str]
    task: Task
    notes: list[str]

    @staticmethod
    def of(records: Sequence[Record], settings: EvalSettings, labels: Sequence[str] | None) -> _Chosen:
        notes: list[str] = []
        usable = answered(records)
        indices = _drawn(len(usable), settings, notes)
        kept = [usable[k] for k in indices]
        references = [completion_of(record) for record in kept]
        right = answers_of(kept, references, settings.answer_pattern)
        known, unread = known_answers(labels or (), settings.answer_pattern)
        if unread:
            notes.append(f"{unread} of {len(labels or ())} known completions do not match the answer pattern")
        task = find_task(references, right, known, settings.answer_pattern)
        return _Chosen(settings, indices, kept, references, task, notes)

    def metric_names(self, usual: Sequence[str], obstacle: Callable[[str], str | None]) -> list[str]:
        """The metrics to compute. What `auto` (the usual ones) must leave out is noted; what was asked for raises."""
        asked = self.settings.metrics
        names = []
        for name in usual if asked == "auto" else dict.fromkeys(asked):
            metric = metric_named(name)
            reason = obstacle(name)
            if reason and asked != "auto":
                raise ConfigError(f"{name} cannot be computed here: {reason}")
            try:
                if metric.package is not None:
                    require(metric.package, "eval")
            except MissingDependencyError as error:
                if asked != "auto":
                    raise
                reason = f"{error.message} ({error.hint})"
            if reason:
                self.notes.append(f"no {name}: {reason}")
            else:
                names.append(name)
        return names

    def evaluation(self, name: str | None, names: Sequence[str], found: _Found, started: float) -> Evaluation:
        """Every metric over the rows, and every row's own scores."""
        outcomes = self._outcomes(found)
        settings = self.settings
        metrics = {
            metric: METRICS[metric].interval(outcomes, confidence=settings.confidence, seed=settings.seed)
            for metric in names
        }
        for metric in names:
            if (signature := METRICS[metric].signature) is not None:
                self.notes.append(f"{metric}: {signature(outcomes)}")
        rows = [
            self._row(names, record, outcomes[k], found.completions[k] if found.completions else None)
            for k, record in enumerate(self.records)
        ]
        seconds = time.perf_counter() - started
        return Evaluation(name, self.task.kind, self.task.reason, metrics, rows, self.notes, seconds)

    def _outcomes(self, found: _Found) -> list[Outcome]:
        known = set(self.task.labels)
        outcomes = []
        for k, reference in enumerate(self.references):
            completion = found.completions[k] if found.completions else None
            predicted = self._answer(completion)
            logprob, num_tokens = found.sums[k] if found.sums else (0.0, 1)
            outcomes.append(
                Outcome(
                    reference=reference,
                    label=self.task.answers[k],
                    completion=completion.answer if completion else "",
                    predicted=predicted if predicted in known else None,
                    chosen=found.labels[k] if found.labels else None,
                    logprob=logprob,
                    num_tokens=num_tokens,
                )
            )
        return outcomes

    def _answer(self, completion: Completion | None) -> str | None:
        """What the label metrics compare: found by the settings' pattern, else by the customization's own."""
        if completion is None:
            return None
        pattern = self.settings.answer_pattern
        return completion.answer.strip() if pattern is None else extract_answer(completion.text, pattern)

    def _row(self, names: Sequence[str], record: Record, outcome: Outcome, completion: Completion | None) -> RowResult:
        users = [message.content for message in prompt_of(record) if message.role == "user"]
        scorers = {name: row for name in names if (row := METRICS[name].row) is not None}
        return RowResult(
            source=str(record.source),
            prompt=users[-1] if users else "",
            reference=outcome.reference,
            completion=None if completion is None else completion.text,
            answer=self._answer(completion),
            scores={name: score(outcome) for name, score in scorers.items()},
            finish_reason=None if completion is None else completion.finish_reason,
        )


def _drawn(num_rows: int, settings: EvalSettings, notes: list[str]) -> list[int]:
    """Indices of at most `max_rows` rows, drawn once and kept in order."""
    limit = settings.max_rows
    if limit is None or limit >= num_rows:
        return list(range(num_rows))
    notes.append(f"{limit} of {num_rows} rows, drawn with seed {settings.seed}")
    return sorted(random.Random(settings.seed).sample(range(num_rows), limit))


def _obstacle(name: str, task: Task, reasons: bool) -> str | None:
    """Why labels cannot be scored as completions of these rows, None when they can (or the metric is another)."""
    if METRICS[name].needs != "label scores":
        return None
    if len(task.labels) > MAX_LABELS:
        return f"{len(task.labels)} labels are more than the {MAX_LABELS} that are scored for every row"
    if task.frame is None:
        return "the references write different texts around the label, so labels cannot be scored as completions"
    return "this customization reasons before it answers" if reasons else None


def _beyond_answers(name: str) -> str | None:
    """Why answers alone do not do, None when they do."""
    return None if METRICS[name].needs == "completions" else "it asks the model, and there are only answers"


def _usual(task: Task) -> list[str]:
    """What `auto` computes for this kind of task."""
    if task.kind == "answers and text":  # the answers are no label set: there is nothing to average over or to score
        return [name for name in METRICS if METRICS[name].group != "labels" or name == "accuracy"]
    return [name for name in METRICS if METRICS[name].group in _GROUPS[task.kind]]


__all__ = ["EvalSettings", "Evaluation", "Progress", "RowResult", "evaluate", "evaluate_answers"]
