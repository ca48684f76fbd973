"""Record → Example: token ids and loss mask, born together by the renderer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tailor.data.records import Record, Source, conversation, last_assistant, tools_of
from tailor.errors import ConfigError, DataError, NotFoundError, nearest
from tailor.text.messages import Message
from tailor.text.render import Rendered, Renderer, Tools, TrainedTurns, trained_indices
from tailor.text.template import PROMPT, TASK, TaskPrompt, refuse_markers
from tailor.text.tokenizer import VIRTUAL

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
    With `compose` or a template only the last assistant turn can be trained: a row with more of them needs
    `trained_turns: last`.

    `prefix_ids` lead every sequence. A slot with `tasks` has virtual tokens of its own for each: those of `task`, else
    of the task that a row names, else of the only one. Examples for `training` count all words of a task whose template
    says so. Raises ConfigError for settings that would tear a template's text apart.
    """

    renderer: Renderer
    max_seq_len: int
    prefix_ids: tuple[int, ...] = ()
    compose: Compose | None = None
    trained_turns: TrainedTurns = "all"
    truncation: Truncation = "error"
    tasks: Mapping[str, TaskPrompt] = field(default_factory=dict)
    task: str | None = None
    training: bool = False

    def __post_init__(self) -> None:
        templates = [prompt.template for prompt in self.tasks.values() if prompt.template is not None]
        if templates and self.truncation == "prompt":
            raise ConfigError(
                "truncation: prompt would cut virtual tokens out of a template",
                hint="name the field to shorten: technique.template.truncate_field, or set data.truncation to 'drop'",
            )
        if self.compose and any(template.asked != (PROMPT,) for template in templates):
            raise ConfigError(
                "a prompting technique rewrites the text of the prompt, so a template beside it can only ask for "
                "{prompt}"
            )

    def messages(self, prompt: Sequence[Message]) -> tuple[Message, ...]:
        """What the base is shown for these turns: as they are, or as the prompting technique rewrites them."""
        return self.compose(tuple(prompt)) if self.compose else tuple(prompt)

    def prompt(self, prompt: Sequence[Message], tools: Tools = (), reserve: int = 0) -> list[int]:
        """Token ids after which the assistant answers `prompt`.

        A template's `truncate_field` is shortened so far that `reserve` more tokens fit.
        """

        def make(turns: Sequence[Message], **virtual: Any) -> Rendered:
            token_ids = self.renderer.prompt(turns, tools=tools, **virtual)
            return Rendered(token_ids, [0] * len(token_ids))

        return self._shown(prompt, make, self.max_seq_len - reserve).token_ids

    def continued(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt that is no conversation: virtual tokens, then its text or its ids as they are.

        Raises DataError for ids that are no words, and for a task whose template asks for a conversation.
        """
        task = self._task_prompt(())
        if task.template is not None:
            raise DataError("this customization fills a template with what a user says", hint="send messages")
        tokenizer = self.renderer.tokenizer
        if isinstance(prompt, str):
            return [*task.ids, *tokenizer.leading_ids(), *tokenizer.encode(prompt)]
        if strange := [i for i in prompt if not 0 <= i < tokenizer.vocab_size]:
            raise DataError(f"token id {strange[0]} is not in the vocabulary of {tokenizer.vocab_size}")
        return [*task.ids, *prompt]

    def answered(self, prompt: Sequence[Message], answer: Message, tools: Tools = ()) -> Rendered:
        """A prompt with its answer, of which alone tokens are in the loss."""
        if self._task_prompt(prompt).template is not None:
            refuse_markers([answer])

        def make(turns: Sequence[Message], **virtual: Any) -> Rendered:
            return self.renderer.example((*turns, answer), tools=tools, trained_turns="last", **virtual)

        return self._shown(prompt, make, self.max_seq_len)

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
        said, tools = conversation(record), tools_of(record)
        prompt = self._task_prompt(said)
        if not self.compose and prompt.template is None:
            return self.renderer.example(said, tools=tools, trained_turns=self.trained_turns, prefix_ids=prompt.ids)
        if len(trained_indices(said, self.trained_turns)) > 1:
            who = "a prompting technique rewrites" if self.compose else "a template is filled with"
            raise DataError(
                f"this row has several assistant turns to train, but {who} all before the "
                "last one, so only that one can be trained",
                hint="set data.trained_turns: last (data.trained_turns=last)",
            )
        answer = last_assistant(said)
        rendered = self.answered(said[:answer], said[answer], tools)
        if self.training and prompt.template is not None and not prompt.template.answer_only_loss:
            return Rendered(rendered.token_ids, [int(token < VIRTUAL) for token in rendered.token_ids])
        return rendered

    def _task_prompt(self, said: Sequence[Message]) -> TaskPrompt:
        """The virtual tokens that these turns are for. Raises NotFoundError or DataError when that is not clear."""
        if set(self.tasks) <= {""}:
            if self.task is not None:
                raise NotFoundError(f"there is no task {self.task!r}: this customization has no tasks by name")
            return self.tasks.get("", TaskPrompt(self.prefix_ids))
        if self.task is not None:
            if self.task not in self.tasks:
                raise NotFoundError(f"there is no task {self.task!r}", hint=nearest(self.task, self.tasks))
            return self.tasks[self.task]
        named = next((dict(m.fields).get(TASK) for m in reversed(said) if m.role == "user"), None)
        if named is None and len(self.tasks) == 1:
            return next(iter(self.tasks.values()))
        if named is None:
            raise DataError(
                f"this customization has several tasks ({', '.join(self.tasks)}), and nothing says which is meant",
                hint=f"name one (--task), or give every row a column {TASK!r}",
            )
        if named not in self.tasks:
            raise DataError(f"there is no task {named!r}", hint=nearest(named, self.tasks))
        return self.tasks[named]

    def _shown(self, prompt: Sequence[Message], make: Callable[..., Rendered], limit: int) -> Rendered:
        """What `make` makes of the turns as the base is shown them, with the virtual tokens of their task."""
        task, turns = self._task_prompt(prompt), self.messages(prompt)
        if task.template is None:
            return make(turns, prefix_ids=task.ids)
        refuse_markers(turns)
        asking = next((k for k in reversed(range(len(turns))) if turns[k].role == "user"), None)
        if asking is None:
            raise DataError("there is no user turn to put into the template")
        template, fields = task.template, task.template.read(turns[asking])
        name = template.truncate_field
        left = self.renderer.tokenizer.encode(fields[name], continues=True) if name else []
        while True:
            turn = Message("user", template.fill(fields), name=turns[asking].name)
            rendered = make((*turns[:asking], turn, *turns[asking + 1 :]), marks=task.marks)
            if sorted(token for token in rendered.token_ids if token >= VIRTUAL) != sorted(task.ids):
                raise ConfigError(
                    "the base's chat template does not leave the markers of this task's template in place"
                )
            excess = len(rendered.token_ids) - limit
            if excess <= 0 or name is None or not left:
                return rendered
            left = left[: max(0, len(left) - excess)]
            fields[name] = self.renderer.tokenizer.decode(left, continues=True).rstrip("\ufffd")

    def _truncate(self, rendered: Rendered) -> Rendered:
        excess = len(rendered.token_ids) - self.max_seq_len
        first = rendered.loss_mask.index(1)
        keep = 1 + next(k for k, token in enumerate(rendered.token_ids) if token < VIRTUAL)
        if self.truncation == "error" or first - keep < excess:
            what = "its completion alone does not fit" if self.truncation == "prompt" else "no truncation rule is named"
            raise DataError(
                f"{len(rendered.token_ids)} tokens, but at most {self.max_seq_len} fit, and {what}",
                hint=self._ways_out(),
            )
        cut = slice(keep, keep + excess)
        token_ids, loss_mask = list(rendered.token_ids), list(rendered.loss_mask)
        del token_ids[cut], loss_mask[cut]
        return Rendered(token_ids, loss_mask)

    def _ways_out(self) -> str:
        if any(prompt.template is not None for prompt in self.tasks.values()):
            return (
                "set technique.template.truncate_field to the field to shorten, or data.truncation to 'drop' (the row)"
            )
        return "set data.truncation to 'prompt' (drop the oldest prompt tokens) or 'drop' (leave the row out)"


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
