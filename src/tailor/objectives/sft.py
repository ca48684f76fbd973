"""Supervised fine-tuning: the mean negative log-likelihood of the counted tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from torch import Tensor

from tailor.config import Strict
from tailor.data.examples import Example, Rendering
from tailor.data.records import Conversation, PromptCompletion, Record
from tailor.objectives.objective import RecordTypes, Scored


class SFT(Strict):
    """Cross-entropy on completions, averaged over all counted tokens of an optimizer step."""

    type: Literal["sft"] = "sft"

    consumes: ClassVar[RecordTypes] = (PromptCompletion, Conversation)

    def examples(self, record: Record, rendering: Rendering) -> list[Example]:
        """One sequence per record, none when the rendering drops it."""
        example = rendering.example(record)
        return [] if example is None else [example]

    def count(self, examples: Sequence[Example]) -> int:
        """Counted tokens."""
        return sum(example.num_targets for example in examples)

    def loss(self, scored: Scored) -> Tensor:
        """- Σ logprobs."""
        return -scored.logprobs.sum()
