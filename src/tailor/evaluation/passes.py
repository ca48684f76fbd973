"""The passes over a model that an evaluation needs: answers, a score for every label, likelihood of the references."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from tailor.data.examples import Example
from tailor.data.records import Record, prompt_of, tools_of
from tailor.errors import QualityError
from tailor.evaluation.likelihood import completion_logprobs, packed_logprobs
from tailor.evaluation.task import Task
from tailor.inference.backend import Completion, Request, SamplingParams
from tailor.inference.local import LocalBackend

Progress = Callable[[str, int, int], None]
"""Told (stage, rows done, rows in all)."""


@dataclass(frozen=True)
class Passes:
    """The passes of one customization (`artifact` None: the plain base) over `records`.

    Examples come first: a row that does not fit raises DataError before anything runs.
    """

    backend: LocalBackend
    artifact: str | None
    records: Sequence[Record]
    examples: Sequence[Example]
    progress: Progress | None

    @staticmethod
    def over(
        backend: LocalBackend, artifact: str | None, records: Sequence[Record], progress: Progress | None
    ) -> Passes:
        """Renders the records as this customization sees them."""
        rendering = dataclasses.replace(backend.rendering(artifact), trained_turns="last")
        examples = [rendering.example(record) for record in records]
        kept = [example for example in examples if example is not None]  # this rendering raises, it never drops a row
        return Passes(backend, artifact, records, kept, progress)

    def generate(self, sampling: SamplingParams) -> list[Completion]:
        """An answer to every record's prompt."""
        requests = [Request(prompt_of(r), self.artifact, sampling, tools_of(r)) for r in self.records]
        return self.backend.generate(requests, self._stage("generate"))

    def usual_sampling(self) -> SamplingParams:
        """Greedy, 1.5 × the longest reference + 8 tokens: a model that never stops costs no minutes.

        One that reasons first gets at least the usual length: references do not show how long that is.
        """
        longest = max(example.num_targets for example in self.examples)
        tokens = math.ceil(1.5 * longest) + 8
        slot = self.backend.slot(self.artifact)
        if slot is not None and slot.answer_pattern is not None:
            tokens = max(tokens, SamplingParams().max_new_tokens)
        return SamplingParams(max_new_tokens=min(tokens, self.backend.base.max_seq_len))

    def choose_labels(self, task: Task) -> list[str]:
        """The label of highest summed logprob for each record."""
        assert task.frame is not None
        candidates = [task.frame.around(label) for label in task.labels]
        prompts = [prompt_of(record) for record in self.records]
        scores = completion_logprobs(
            self.backend,
            self.artifact,
            prompts,
            candidates,
            ends=task.frame.ends,
            progress=self._stage("score labels"),
        )
        return [task.labels[k] for k in finite(scores, self.artifact).argmax(dim=1).tolist()]

    def likelihood(self) -> list[tuple[float, int]]:
        """(summed logprob, number of counted tokens) of each record's reference."""
        found = packed_logprobs(
            self.backend.base,
            self.backend.slot(self.artifact),
            self.examples,
            tokens_per_batch=self.backend.engine.tokens_per_pass,
            progress=self._stage("perplexity"),
        )
        return [(float(finite(logprobs, self.artifact).double().sum()), len(logprobs)) for logprobs in found]

    def _stage(self, name: str) -> Callable[[int], None]:
        return stage(self.progress, name, len(self.records))


def stage(progress: Progress | None, name: str, total: int) -> Callable[[int], None]:
    """What tells `progress` how much of one stage is done."""

    def tell(done: int) -> None:
        if progress is not None:
            progress(name, done, total)

    return tell


def finite(logprobs: Tensor, artifact: str | None) -> Tensor:
    """The logprobs as they are. Raises QualityError naming the customization when some are no numbers."""
    if not bool(logprobs.isfinite().all()):
        raise QualityError(
            f"{artifact or 'the base'} gives logprobs that are NaN or infinite: its weights are broken",
            hint="if it was trained, lower train.learning_rate and train again",
        )
    return logprobs
