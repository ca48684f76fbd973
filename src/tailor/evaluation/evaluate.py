"""Evaluate one customization on held-out rows: every metric with its interval, every row kept."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator
from torch import Tensor

from tailor.config import Pattern, Strict
from tailor.data.examples import Example
from tailor.data.records import Record, completion_of, prompt_of, tools_of
from tailor.errors import ConfigError, MissingDependencyError, QualityError, nearest, require
from tailor.evaluation.likelihood import completion_logprobs, packed_logprobs
from tailor.evaluation.scores import METRICS, Group, Outcome, metric_named
from tailor.evaluation.task import MAX_LABELS, Kind, Task, answered, answers_of, find_task, known_answers
from tailor.inference.backend import Completion, FinishReason, Request, SamplingParams
from tailor.inference.local import LocalBackend
from tailor.metrics.answers import extract_answer
from tailor.metrics.bootstrap import Interval
from tailor.store import write_text

Progress = Callable[[str, int, int], None]
"""Told (stage, rows done, rows in all)."""


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
    """Scores of one customization (`artifact` None: the plain base) over `num_rows` rows.

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
    backend: LocalBackend,
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
    settings = settings or EvalSettings()
    run = _Run(backend, artifact, settings, progress, [])
    records = run.drawn(answered(records))
    references = [completion_of(record) for record in records]
    answers = answers_of(records, references, settings.answer_pattern)
    known, unread = known_answers(labels or (), settings.answer_pattern)
    if unread:
        run.notes.append(f"{unread} of {len(labels or ())} known completions do not match the answer pattern")
    task = find_task(references, answers, known, settings.answer_pattern)
    names = run.names(task)
    outcomes, completions = run.outcomes(names, records, references, task)
    metrics = {
        name: METRICS[name].interval(outcomes, confidence=settings.confidence, seed=settings.seed) for name in names
    }
    for name in names:
        if (signature := METRICS[name].signature) is not None:
            run.notes.append(f"{name}: {signature(outcomes)}")
    rows = [
        _row(names, record, outcomes[k], completions[k] if completions else None, run.answer)
        for k, record in enumerate(records)
    ]
    return Evaluation(artifact, task.kind, task.reason, metrics, rows, run.notes, time.perf_counter() - started)


@dataclass(frozen=True)
class _Run:
    """One evaluation under way: whose, how, and the notes it has gathered."""

    backend: LocalBackend
    artifact: str | None
    settings: EvalSettings
    progress: Progress | None
    notes: list[str]

    def stage(self, name: str, total: int) -> Callable[[int], None]:
        def tell(done: int) -> None:
            if self.progress is not None:
                self.progress(name, done, total)

        return tell

    def drawn(self, records: list[Record]) -> list[Record]:
        """At most `max_rows` of them, drawn once and kept in order."""
        limit = self.settings.max_rows
        if limit is None or limit >= len(records):
            return records
        self.notes.append(f"{limit} of {len(records)} rows, drawn with seed {self.settings.seed}")
        kept = sorted(random.Random(self.settings.seed).sample(range(len(records)), limit))
        return [records[k] for k in kept]

    def names(self, task: Task) -> list[str]:
        """The metrics to compute. What `auto` must leave out is noted; what was asked for and cannot be raises."""
        asked = self.settings.metrics
        names = []
        for name in METRICS if asked == "auto" else dict.fromkeys(asked):
            metric = metric_named(name)
            if asked == "auto" and not _belongs(name, task):
                continue
            obstacle = self._obstacle(name, task, asked == "auto")
            if obstacle and asked != "auto":
                raise ConfigError(f"{name} cannot be computed here: {obstacle}")
            try:
                if metric.package is not None:
                    require(metric.package, "eval")
            except MissingDependencyError as error:
                if asked != "auto":
                    raise
                obstacle = f"{error.message} ({error.hint})"
            if obstacle:
                self.notes.append(f"no {name}: {obstacle}")
            else:
                names.append(name)
        return names

    def _obstacle(self, name: str, task: Task, auto: bool) -> str | None:
        if METRICS[name].needs != "label scores":
            return None
        if len(task.labels) > MAX_LABELS:
            return f"{len(task.labels)} labels are more than the {MAX_LABELS} that are scored for every row"
        if task.frame is None:
            return "the references write different texts around the label, so labels cannot be scored as completions"
        slot = self.backend.slot(self.artifact)
        if auto and slot is not None and slot.answer_pattern is not None:
            return "this customization reasons before it answers"
        return None

    def outcomes(
        self, names: Sequence[str], records: Sequence[Record], references: Sequence[str], task: Task
    ) -> tuple[list[Outcome], list[Completion] | None]:
        """Run the passes that the metrics need. Examples come first: a row that does not fit is refused at once."""
        needs = {METRICS[name].needs for name in names}
        examples = self._examples(records)
        prompts = [prompt_of(record) for record in records]
        completions = None
        if "completions" in needs:
            sampling = self.settings.sampling or self._sampling(examples)
            requests = [
                Request(prompt, self.artifact, sampling, tools_of(record))
                for prompt, record in zip(prompts, records, strict=True)
            ]
            completions = self.backend.generate(requests, self.stage("generate", len(requests)))
            if cut := sum(c.finish_reason == "length" for c in completions):
                self.notes.append(f"{cut} of {len(records)} completions were cut at {sampling.max_new_tokens} tokens")
        chosen: list[str | None] = [None] * len(records)
        if "label scores" in needs:
            chosen = list(self._choose(prompts, task))
        sums = self._likelihood(examples) if "likelihood" in needs else [(0.0, 1)] * len(records)
        known = set(task.labels)
        outcomes = []
        for k, reference in enumerate(references):
            predicted = None if completions is None else self.answer(completions[k])
            outcomes.append(
                Outcome(
                    reference=reference,
                    label=task.answers[k],
                    completion="" if completions is None else completions[k].answer,
                    predicted=predicted if predicted in known else None,
                    chosen=chosen[k],
                    logprob=sums[k][0],
                    num_tokens=sums[k][1],
                )
            )
        return outcomes, completions

    def answer(self, completion: Completion) -> str | None:
        """What the label metrics compare: found by the settings' pattern, else by the customization's own."""
        pattern = self.settings.answer_pattern
        return completion.answer.strip() if pattern is None else extract_answer(completion.text, pattern)

    def _examples(self, records: Sequence[Record]) -> list[Example]:
        rendering = dataclasses.replace(self.backend.rendering(self.artifact), trained_turns="last")
        examples = [rendering.example(record) for record in records]
        return [example for example in examples if example is not None]  # this rendering raises, it never drops a row

    def _sampling(self, examples: Sequence[Example]) -> SamplingParams:
        """Greedy, 1.5 × the longest reference + 8 tokens: a model that never stops costs no minutes.

        One that reasons first gets at least the usual length: references do not show how long that is.
        """
        longest = max(example.num_targets for example in examples)
        tokens = math.ceil(1.5 * longest) + 8
        slot = self.backend.slot(self.artifact)
        if slot is not None and slot.answer_pattern is not None:
            tokens = max(tokens, SamplingParams().max_new_tokens)
        return SamplingParams(max_new_tokens=min(tokens, self.backend.base.max_seq_len))

    def _choose(self, prompts: Sequence[Any], task: Task) -> list[str]:
        """The label of highest summed logprob for each prompt."""
        assert task.frame is not None
        candidates = [task.frame.around(label) for label in task.labels]
        stage = self.stage("score labels", len(prompts))
        scores = completion_logprobs(
            self.backend, self.artifact, prompts, candidates, ends=task.frame.ends, progress=stage
        )
        return [task.labels[k] for k in self._finite(scores).argmax(dim=1).tolist()]

    def _likelihood(self, examples: Sequence[Example]) -> list[tuple[float, int]]:
        """(summed logprob, number of counted tokens) of each row's reference."""
        found = packed_logprobs(
            self.backend.base,
            self.backend.slot(self.artifact),
            examples,
            tokens_per_batch=self.backend.engine.tokens_per_pass,
            progress=self.stage("perplexity", len(examples)),
        )
        return [(float(self._finite(logprobs).double().sum()), len(logprobs)) for logprobs in found]

    def _finite(self, logprobs: Tensor) -> Tensor:
        if not bool(logprobs.isfinite().all()):
            raise QualityError(
                f"{self.artifact or 'the base'} gives logprobs that are NaN or infinite: its weights are broken",
                hint="if it was trained, lower train.learning_rate and train again",
            )
        return logprobs


def _belongs(name: str, task: Task) -> bool:
    """Whether `auto` computes this metric for this kind of task."""
    group = METRICS[name].group
    if group == "labels" and task.kind == "answers and text":
        return name == "accuracy"  # the answers are no label set: there is nothing to average over or to score
    return group in _GROUPS[task.kind]


def _row(
    names: Sequence[str],
    record: Record,
    outcome: Outcome,
    completion: Completion | None,
    answer: Callable[[Completion], str | None],
) -> RowResult:
    users = [message.content for message in prompt_of(record) if message.role == "user"]
    scorers = {name: row for name in names if (row := METRICS[name].row) is not None}
    return RowResult(
        source=str(record.source),
        prompt=users[-1] if users else "",
        reference=outcome.reference,
        completion=None if completion is None else completion.text,
        answer=None if completion is None else answer(completion),
        scores={name: score(outcome) for name, score in scorers.items()},
        finish_reason=None if completion is None else completion.finish_reason,
    )
