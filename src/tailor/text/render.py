"""Messages to token ids and a loss mask, born together; and back again.

A text is cut where assistant turns open and close and where virtual tokens stand (`marks`), and the pieces are
tokenised apart. Training, scoring and serving
share this cut, so the tokens of a generation prompt are always a prefix of the training example's tokens, and what
was trained is what is served.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, Protocol

from tailor.errors import ConfigError, DataError
from tailor.text.messages import Message
from tailor.text.tokenizer import Tokenizer

TrainedTurns = Literal["all", "last"]
Tools = Sequence[Mapping[str, Any]]
Marks = Mapping[str, Sequence[int]]
"""Marker in the text → the ids that stand there. Who gives them has seen to it that no text of a row holds one."""

NO_MARKS: Marks = MappingProxyType({})


SWITCHES: tuple[tuple[str, bool | str, bool | str], ...] = (
    ("enable_thinking", False, True),  # Qwen 3, SmolLM 3
    ("thinking", False, True),  # DeepSeek 3.1, Granite 3.2
    ("reasoning_effort", "low", "high"),  # GPT-OSS
)
"""Variables by which chat templates let a model think first: the name, and two values that make a difference."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """`loss_mask[i]` is 1 where token i is to be predicted and counted (not shifted; packing shifts)."""

    token_ids: list[int]
    loss_mask: list[int]


class Renderer(Protocol):
    """Four verbs: `example`, `prompt`, `parse`, and the ids at which generation stops."""

    tokenizer: Tokenizer
    stop: tuple[int, ...]
    lead: str
    """What the template puts before an answer's text: `parse` leaves it out, as it does the `trail` after it."""
    trail: str

    def example(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = (),
        trained_turns: TrainedTurns = "all",
        prefix_ids: Sequence[int] = (),
        marks: Marks = NO_MARKS,
    ) -> Rendered:
        """Tokens and loss mask of a whole conversation. Raises DataError when nothing would be trained."""
        ...

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = (),
        prefix_ids: Sequence[int] = (),
        marks: Marks = NO_MARKS,
    ) -> list[int]:
        """Tokens after which the assistant speaks."""
        ...

    def parse(self, token_ids: Sequence[int]) -> Message:
        """The assistant turn in generated ids, up to the first stop token. Inverse of the trained part of `example`."""
        ...


def make_renderer(tokenizer: Tokenizer) -> Renderer:
    """The tokenizer's chat template when it has one, plain prompt→completion otherwise."""
    return ChatRenderer(tokenizer) if tokenizer.chat_template else PlainRenderer(tokenizer)


class ChatRenderer:
    """Renders by the tokenizer's Jinja chat template.

    `stop` starts with the token that ends an assistant turn, found by rendering a probe once. Raises ConfigError when
    the template closes an assistant turn without a special token: a model tuned on it would never stop.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._efforts: dict[str, ChatRenderer | None] = {}
        probe = "Probe"
        turns = [Message("user", "Hi"), Message("assistant", probe)]
        opened, closed = self._text(turns[:1], (), True), self._text(turns, (), False)
        piece = closed[len(opened) :] if closed.startswith(opened) else ""
        if probe not in piece:
            raise ConfigError(
                "the chat template does not render an assistant turn as a continuation of its generation prompt",
                hint="use a template whose add_generation_prompt text opens the assistant turn",
            )
        self.lead, tail = piece.split(probe, 1)
        tail_ids = tokenizer.encode(tail, continues=True)
        at = next((k for k, i in enumerate(tail_ids) if i in tokenizer.special_ids), None)
        if at is None:
            raise ConfigError(
                f"the chat template ends an assistant turn with {tail!r}, which holds no special token: "
                "a model tuned on it would never learn to stop",
                hint="add the end-of-turn token (for instance {{ eos_token }}) after the assistant content",
            )
        self.trail = tokenizer.decode(tail_ids[:at], continues=True)
        self._end_of_turn = tail_ids[at]
        self.stop = tuple(dict.fromkeys([tail_ids[at]] + ([tokenizer.eos_id] if tokenizer.eos_id is not None else [])))

    def example(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = (),
        trained_turns: TrainedTurns = "all",
        prefix_ids: Sequence[int] = (),
        marks: Marks = NO_MARKS,
    ) -> Rendered:
        trained = trained_indices(messages, trained_turns)
        end = max(trained) + 1
        check_contents(self.tokenizer, messages[:end], tools)
        text = self._text(messages[:end], tools, False)
        token_ids, loss_mask, done = list(prefix_ids), [0] * len(prefix_ids), 0
        for index, (start, stop) in self._turns(messages[:end], tools, text, closed=True):
            opening, turn = self._piece(text, done, start, marks), self._piece(text, start, stop)
            token_ids += opening + turn
            loss_mask += [0] * len(opening) + (self._turn_mask(turn) if index in trained else [0] * len(turn))
            trained.discard(index)
            done = stop
        if trained:
            raise DataError(
                f"the chat template rewrites earlier turns: assistant turn {min(trained)} cannot be trained in place",
                hint="set trained_turns: last",
            )
        return Rendered(token_ids, loss_mask)

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = (),
        prefix_ids: Sequence[int] = (),
        marks: Marks = NO_MARKS,
    ) -> list[int]:
        check_contents(self.tokenizer, messages, tools)
        text = self._text(messages, tools, True)
        token_ids, done = list(prefix_ids), 0
        for _, (start, stop) in self._turns(messages, tools, text, closed=False):
            token_ids += self._piece(text, done, start, marks) + self._piece(text, start, stop)
            done = stop
        return token_ids + self._piece(text, done, len(text), marks)

    def parse(self, token_ids: Sequence[int]) -> Message:
        text = self.tokenizer.decode(before_stop(token_ids, self.stop), continues=True)
        return Message("assistant", text.removeprefix(self.lead).removesuffix(self.trail))

    def at_effort(self, effort: str) -> ChatRenderer | None:
        """The renderer of the same template whose switch says how long to think; None for a template without one.

        Where the switch is on or off, `none` and `minimal` are off. It is whichever of SWITCHES changes what stands
        before an answer.
        """
        if effort not in self._efforts:
            switch = next((switch for switch in SWITCHES if self._heeds(*switch)), None)
            set_to = effort if switch and isinstance(switch[1], str) else effort not in ("none", "minimal")
            variables = None if switch is None else {switch[0]: set_to}
            self._efforts[effort] = None if variables is None else self._reading(variables)
        return self._efforts[effort]

    def _reading(self, variables: Mapping[str, Any]) -> ChatRenderer:
        """This renderer with variables for its template: other prompts, and answers that begin and end as they did."""
        switched = copy.copy(self)
        switched.tokenizer = Tokenizer(self.tokenizer.hf, variables)
        return switched

    def _heeds(self, name: str, *values: bool | str) -> bool:
        """Whether the template writes something else for each of these values of a variable."""
        asked = [Message("user", "Hi").to_dict()]
        texts = [Tokenizer(self.tokenizer.hf, {name: v}).apply_chat_template(asked, (), True) for v in values]
        return len(set(texts)) == len(texts)

    def _piece(self, text: str, start: int, stop: int, marks: Marks = NO_MARKS) -> list[int]:
        return encode_marked(self.tokenizer, text[start:stop], marks, continues=start > 0)

    def _turns(
        self, messages: Sequence[Message], tools: Tools, text: str, *, closed: bool
    ) -> list[tuple[int, tuple[int, int]]]:
        """Character spans (completion start, turn end) of the assistant turns that `text` holds unchanged.

        `text` is all messages; when `closed`, without a generation prompt after them.
        """
        turns = []
        for index, message in enumerate(messages):
            if message.role != "assistant":
                continue
            opened = self._text(messages[:index], tools, True)
            ends_here = closed and index + 1 == len(messages)
            turn = text if ends_here else self._text(messages[: index + 1], tools, False)
            if text.startswith(turn) and turn.startswith(opened):
                turns.append((index, (len(opened), len(turn))))
        return turns

    def _turn_mask(self, token_ids: Sequence[int]) -> list[int]:
        """Content and end-of-turn token count; what the template writes after that token does not."""
        if self._end_of_turn not in token_ids:
            raise DataError("the end-of-turn token is missing from a rendered assistant turn: it would never stop")
        last = len(token_ids) - 1 - list(reversed(token_ids)).index(self._end_of_turn)
        return [1] * (last + 1) + [0] * (len(token_ids) - last - 1)

    def _text(self, messages: Sequence[Message], tools: Tools, generate: bool) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template([m.to_dict() for m in messages], tools, generate)
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            roles = ", ".join(m.role for m in messages)
            raise DataError(f"the chat template refuses these turns ({roles}): {error}") from error


class PlainRenderer:
    """For bases without a chat template: prompt and completion stand side by side, the completion ends with eos.

    Nothing is inserted between prompt and completion. Earlier exchanges and the system text are context, each followed
    by a blank line; only the last assistant turn can be trained. Raises ConfigError when the tokenizer has no eos.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if tokenizer.eos_id is None:
            raise ConfigError(
                "the tokenizer has neither a chat template nor an eos token: a tuned model would never stop",
                hint="set eos_token in tokenizer_config.json",
            )
        self.tokenizer = tokenizer
        self.leading = tokenizer.leading_ids()
        self._eos = tokenizer.eos_id
        self.stop: tuple[int, ...] = (tokenizer.eos_id,)
        self.lead = self.trail = ""

    def example(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = (),
        trained_turns: TrainedTurns = "all",
        prefix_ids: Sequence[int] = (),
        marks: Marks = NO_MARKS,
    ) -> Rendered:
        trained = sorted(trained_indices(messages, trained_turns))
        if len(trained) > 1:
            raise DataError(
                "this base has no chat template, so only the last assistant turn of a row can be trained",
                hint="set trained_turns: last",
            )
        last = trained[0]
        check_contents(self.tokenizer, [messages[last]])
        prompt = self.prompt(messages[:last], tools=tools, prefix_ids=prefix_ids, marks=marks)
        completion = [*self.tokenizer.encode(messages[last].content, continues=True), self._eos]
        return Rendered(prompt + completion, [0] * len(prompt) + [1] * len(completion))

    def prompt(
        self,
        messages: Sequence[Message],
        *,
        tools: Tools = (),
        prefix_ids: Sequence[int] = (),
        marks: Marks = NO_MARKS,
    ) -> list[int]:
        if tools:
            raise DataError("this base has no chat template, so it has no place for tools")
        check_contents(self.tokenizer, messages)
        token_ids = [*prefix_ids, *self.leading]
        for index, message in enumerate(messages):
            closes = message.role in ("assistant", "system", "developer") and index + 1 < len(messages)
            text = message.content + ("\n\n" if closes else "")
            token_ids += encode_marked(self.tokenizer, text, marks, continues=index > 0)
        return token_ids

    def parse(self, token_ids: Sequence[int]) -> Message:
        return Message("assistant", self.tokenizer.decode(before_stop(token_ids, self.stop), continues=True))


def trained_indices(messages: Sequence[Message], trained_turns: TrainedTurns) -> set[int]:
    """Indices of the assistant turns that enter the loss. Raises DataError when there are none."""
    turns = [k for k, m in enumerate(messages) if m.role == "assistant"]
    if not turns:
        raise DataError("no assistant turn: there is nothing to train on")
    chosen = turns[-1:] if trained_turns == "last" else turns
    kept = {k for k in chosen if messages[k].weight != 0}
    if not kept:
        raise DataError("every assistant turn has weight 0: the whole row would be masked")
    return kept


def encode_marked(tokenizer: Tokenizer, text: str, marks: Marks, *, continues: bool) -> list[int]:
    """The ids of a text in which `marks` stand for theirs; what is between two of them is tokenised apart."""
    if not marks:
        return tokenizer.encode(text, continues=continues)
    token_ids: list[int] = []
    for piece in re.split("(" + "|".join(map(re.escape, marks)) + ")", text):
        if piece in marks:
            token_ids += marks[piece]
        elif piece:
            token_ids += tokenizer.encode(piece, continues=continues)
            continues = True
    return token_ids


def before_stop(token_ids: Sequence[int], stop: Sequence[int]) -> list[int]:
    """The ids before the first stop token."""
    ids = list(token_ids)
    return ids[: next((k for k, i in enumerate(ids) if i in stop), len(ids))]


def check_contents(tokenizer: Tokenizer, messages: Sequence[Message], tools: Tools = ()) -> None:
    """Refuse texts that hold a special token: they would open or close turns (broken rows, or injection)."""
    texts = [(f"{m.role} text", text) for m in messages for text in _texts(m)]
    for where, text in [*texts, *(("description of a tool", _json(tool)) for tool in tools)]:
        if special := tokenizer.special_in(text):
            raise DataError(
                f"the {where} holds the special token {special!r}, which would change the turns of the row",
                hint="remove it or write it differently (for instance with a space inside)",
            )


def _texts(message: Message) -> list[str]:
    """Everything of a turn that a template may write into the conversation."""
    return [message.content, message.name or "", message.tool_call_id or "", *map(_json, message.tool_calls)]


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
