"""The passes of an evaluation over a hosted model: answers from its text, likelihood only where its endpoint echoes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tailor.data.records import Record, completion_of, prompt_of, tools_of
from tailor.evaluation.likelihood import completion_logprobs
from tailor.evaluation.passes import Passes, Progress, finite, stage
from tailor.evaluation.scores import METRICS
from tailor.evaluation.task import Task
from tailor.inference.backend import Completion, Request, SamplingParams
from tailor.inference.hosted import HostedBackend
from tailor.inference.local import LocalBackend

BYTES_PER_TOKEN = 3
"""Fewer than tokenisers of large models put into one on average (English: about four), so that answers are not cut."""

ROOM = 16
"""Tokens on top, for short answers."""


@dataclass(frozen=True)
class HostedPasses:
    """The passes over `records`, as `Passes` has them."""

    backend: HostedBackend
    artifact: str | None
    records: Sequence[Record]
    progress: Progress | None

    def generate(self, sampling: SamplingParams) -> list[Completion]:
        """An answer to every record's prompt."""
        requests = [Request(prompt_of(r), self.artifact, sampling, tools_of(r)) for r in self.records]
        return self.backend.generate(requests, self._stage("generate"))

    def usual_sampling(self) -> SamplingParams:
        """Greedy, about 1.5 × the longest reference: the tokens of a hosted model are not known.

        One that reasons first gets at least the usual length.
        """
        longest = max(len(completion_of(record).encode()) for record in self.records)
        tokens = math.ceil(1.5 * longest / BYTES_PER_TOKEN) + ROOM
        if self.backend.answer_pattern(self.artifact) is not None:
            tokens = max(tokens, SamplingParams().max_new_tokens)
        return SamplingParams(max_new_tokens=tokens)

    def choose_labels(self, task: Task) -> list[str]:
        """The label of highest summed logprob for each record."""
        assert task.frame is not None
        candidates = [task.frame.around(label) for label in task.labels]
        prompts = [prompt_of(record) for record in self.records]
        scores = completion_logprobs(
            self.backend, self.artifact, prompts, candidates, ends=task.frame.ends, progress=self._stage("score labels")
        )
        return [task.labels[k] for k in finite(scores, self.artifact).argmax(dim=1).tolist()]

    def likelihood(self) -> list[tuple[float, int]]:
        """(summed logprob, number of counted tokens) of each record's reference."""
        requests = [Request(prompt_of(r), self.artifact, tools=tools_of(r)) for r in self.records]
        found = self.backend.logprobs(requests, [completion_of(r) for r in self.records])
        self._stage("perplexity")(len(self.records))
        return [(float(finite(logprobs, self.artifact).double().sum()), len(logprobs)) for logprobs in found]

    def _stage(self, name: str) -> Callable[[int], None]:
        return stage(self.progress, name, len(self.records))


def passes_over(
    backend: LocalBackend | HostedBackend, artifact: str | None, records: Sequence[Record], progress: Progress | None
) -> Passes | HostedPasses:
    """The passes of whatever answers."""
    if isinstance(backend, HostedBackend):
        return HostedPasses(backend, artifact, records, progress)
    return Passes.over(backend, artifact, records, progress)


def answer_pattern(backend: LocalBackend | HostedBackend, artifact: str | None) -> str | None:
    """What reads the answer out of a customization's chain of thought. Raises NotFoundError."""
    if isinstance(backend, HostedBackend):
        return backend.answer_pattern(artifact)
    slot = backend.slot(artifact)
    return None if slot is None else slot.answer_pattern


def unscored(backend: LocalBackend | HostedBackend, metric: str) -> str | None:
    """Why a metric that takes logprobs of given texts cannot be had here; None when it can."""
    if METRICS[metric].needs == "completions" or not isinstance(backend, HostedBackend):
        return None
    return backend.unscored
