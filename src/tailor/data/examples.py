"""Record → Example: token ids and loss mask, born together by the renderer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from tailor.data.records import Record, Source, conversation, last_assistant, tools_of
from tailor.errors import DataError
from tailor.text.messages import Message
from tailor.text.render import Rendered, Renderer, Tools, TrainedTurns, trained_indices

Truncation = Literal["error", "prompt", "drop"]
NOWHERE = Source()
Compose = Callable[[tuple[Message, ...]], tuple[Message, ...]]


@dataclass(frozen=True, slots=True)
class Example:
    """One sequence. `loss_mask[i]` is 1 where token i is predicted and counted.

    `group` ties sequences that must share a micro-batch (a preference pair, rollouts of one prompt); `columns` holds
    per-token lists of the sequence's length, `values` one number per sequence.
    """

    token_ids: Sequence[int]
    loss_mask: Sequence[int]
    group: int = -1
    columns: Mapping[str, Sequence[float]] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)
    source: Source = NOWHERE

    @property
    def num_targets(self) -> int:
        """Tokens that enter the loss: the first token has nothing before it and never does."""
        return sum(self.loss_mask[1:])


Bundle = tuple[Example, ...]
"""The sequences of one record: one, or several that a loss compares (a preference pair), drawn and packed together."""


@dataclass(frozen=True)
class Rendering:
    """How records become examples for one slot: renderer, rewriting by prompting, virtual tokens, limits.

    `truncation` says what happens to a row longer than `max_seq_len`: `error`; `prompt` drops the oldest prompt
    tokens after the first (its bos) and keeps the completion whole; `drop` leaves the row out (`example` is None).
    With `compose` only the last assistant turn can be trained: a row with more of them needs `trained_turns: last`.
    """

    renderer: Renderer
    max_seq_len: int
    prefix_ids: tuple[int, ...] = ()
    compose: Compose | None = None
    trained_turns: TrainedTurns = "all"
    truncation: Truncation = "error"

    def messages(self, prompt: Sequence[Message]) -> tuple[Message, ...]:
        """What the base is shown for these turns: as they are, or as the prompting technique rewrites them."""
        return self.compose(tuple(prompt)) if self.compose else tuple(prompt)

    def prompt(self, prompt: Sequence[Message], tools: Tools = ()) -> list[int]:
        """Token ids after which the assistant answers `prompt`."""
        return self.renderer.prompt(self.messages(prompt), tools=tools, prefix_ids=self.prefix_ids)

    def example(self, record: Record) -> Example | None:
        """The training example of a record, None when `truncation` drops it. Raises DataError naming file and line."""
        try:
            rendered = self._render(record)
            if len(rendered.token_ids) > self.max_seq_len:
                if self.truncation == "drop":
                    return None
                rendered = self._truncate(rendered)
        except DataError as error:
            raise DataError(f"{record.source}: {error.message}", hint=error.hint) from error
        if not any(rendered.loss_mask[1:]):
            raise DataError(f"{record.source}: no token of this row is in the loss")
        return Example(rendered.token_ids, rendered.loss_mask, source=record.source)

    def _render(self, record: Record) -> Rendered:
        said = turns = conversation(record)
        tools = tools_of(record)
        if self.compose:
            answer = last_assistant(said)
            turns = (*self.compose(said[:answer]), said[answer])
            if len(trained_indices(said, self.trained_turns)) > 1:
                raise DataError(
                    "this row has several assistant turns to train, but a prompting technique rewrites all before the "
                    "last one, so only that one can be trained",
                    hint="set data.trained_turns: last (data.trained_turns=last)",
                )
        trained: TrainedTurns = "last" if self.compose else self.trained_turns
        return self.renderer.example(turns, tools=tools, trained_turns=trained, prefix_ids=self.prefix_ids)

    def _truncate(self, rendered: Rendered) -> Rendered:
        excess = len(rendered.token_ids) - self.max_seq_len
        first = rendered.loss_mask.index(1)
        keep = len(self.prefix_ids) + 1
        if self.truncation == "error" or first - keep < excess:
            what = "its completion alone does not fit" if self.truncation == "prompt" else "no truncation rule is named"
            raise DataError(
                f"{len(rendered.token_ids)} tokens, but at most {self.max_seq_len} fit, and {what}",
                hint="set data.truncation to 'prompt' (drop the oldest prompt tokens) or 'drop' (leave the row out)",
            )
        cut = slice(keep, keep + excess)
        token_ids, loss_mask = list(rendered.token_ids), list(rendered.loss_mask)
        del token_ids[cut], loss_mask[cut]
        return Rendered(token_ids, loss_mask)


def make_examples(records: Sequence[Record], rendering: Rendering) -> tuple[list[Example], list[Record]]:
    """Examples of all records and the records that `truncation: drop` left out. Raises DataError when none remain."""
    examples, dropped = [], []
    for record in records:
        example = rendering.example(record)
        if example is None:
            dropped.append(record)
        else:
            examples.append(example)
    if not examples:
        raise DataError(f"no row is left: all {len(dropped)} are longer than {rendering.max_seq_len} tokens")
    return examples, dropped
