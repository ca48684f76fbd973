"""The row formats that can be read: FORMATS, one entry each, with the fields that tell it and a pure converter."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tailor.data import turns
from tailor.data.kinds import (
    ANY,
    INPUT,
    LIST,
    MESSAGES,
    NUMBER,
    SAID,
    TEXT,
    TEXTS,
    TRANSCRIPT,
    TURN,
    TURNS,
    YES_NO,
    Kind,
)
from tailor.data.records import (
    Comparison,
    Conversation,
    Document,
    Judged,
    PromptCompletion,
    Rated,
    Record,
    Retrieval,
)
from tailor.data.rows import RowError, describe
from tailor.errors import nearest
from tailor.text.messages import Message, assistant, system, user

Fields = Mapping[str, Any]

ATTRIBUTES = ("helpfulness", "correctness", "coherence", "complexity", "verbosity", "quality", "toxicity", "humor")
"""Attribute names of HelpSteer and of the SteerLM models before it; their scale is 0 to 4."""


def _always(row: Fields) -> bool:
    return True


@dataclass(frozen=True, slots=True)
class Format:
    """How one format is told from others and read. A field spelled `a|b` goes by either name.

    A `closed` one refuses columns that it does not know; `made_from` tells apart what has one name and reads otherwise.
    """

    about: str
    required: Mapping[str, Kind]
    convert: Callable[[Fields], Record]
    optional: Mapping[str, Kind] = field(default_factory=dict)
    also: Callable[[Fields], bool] = _always
    also_reason: str = ""
    closed: bool = False
    made_from: str = ""

    def names(self) -> set[str]:
        """Every field name this format knows."""
        return {name for spec in (*self.required, *self.optional) for name in spec.split("|")}

    def fits(self, row: Fields) -> bool:
        """Are all required fields there, with values of their type? Whether they make sense is for `read`."""
        return all(_spelled(row, spec, kind) for spec, kind in self.required.items()) and self.also(row)

    def uses(self, row: Fields) -> set[str]:
        """The fields of this row that reading it would use."""
        return {name for name in self.names() if row.get(name) is not None}

    def read(self, row: Fields) -> tuple[Record, Fields]:
        """(the record, the row's columns that it did not use).

        Raises RowError with the reason when a field is missing, of another type, or empty.
        """
        fields: dict[str, Any] = {}
        used: set[str] = set()
        for spec, kind in self.required.items():
            name = _spelled(row, spec, kind)
            if name is None:
                raise RowError(_complaint(row, spec, kind))
            if isinstance(row[name], str) and not row[name].strip():
                raise RowError(f"field {name!r} is empty")
            fields[spec.split("|")[0]] = row[name]
            used.add(name)
        for spec, kind in self.optional.items():
            given = next((name for name in spec.split("|") if row.get(name) is not None), None)
            if given is not None:
                if not kind.test(row[given]):
                    raise RowError(_complaint(row, given, kind))
                fields[spec.split("|")[0]] = row[given]
                used.add(given)
        if not self.also(row):
            raise RowError(self.also_reason)
        empty = {name for name in self.names() if row.get(name) is None}
        others = {name: value for name, value in row.items() if name not in used | empty}
        if self.closed and (extra := next((name for name, value in others.items() if value is not None), None)):
            raise RowError(f"field {extra!r} has no place in the template; {nearest(extra, sorted(self.names()))}")
        return self.convert(fields), others


def _spelled(row: Fields, spec: str, kind: Kind) -> str | None:
    """The spelling that the row uses for a field, None when it has none with a value of that kind."""
    return next((name for name in spec.split("|") if row.get(name) is not None and kind.test(row[name])), None)


def _complaint(row: Fields, spec: str, kind: Kind) -> str:
    names = spec.split("|")
    for name in names:
        if row.get(name) is not None:
            return f"field {name!r} is {describe(row[name])}, it must be {kind.name}"
        if name in row:
            return f"field {name!r} is null, it must be {kind.name}"
    hint = nearest(names[0], map(str, row)).replace("choices:", "the row has")
    return f"field {' or '.join(map(repr, names))} is missing; {hint}"


def _prompt_completion(row: Fields) -> Record:
    return PromptCompletion(row["prompt"], row["completion"])


def _trl_prompt_completion(row: Fields) -> Record:
    # TRL counts all of the completion in the loss and nothing of the prompt; weights say the same here.
    prompt = tuple(_weighted(turn, 0.0) for turn in said_turns(row["prompt"], user))
    completion = tuple(_weighted(turn, 1.0) for turn in said_turns(row["completion"], assistant))
    turns.check_order(prompt + completion)
    return Conversation(prompt + completion, meta=_unread(row, "prompt", "completion"))


def _weighted(turn: Message, weight: float) -> Message:
    if turn.role != "assistant" or turn.weight is not None:
        return turn
    return Message(turn.role, turn.content, turn.name, turn.tool_calls, turn.tool_call_id, weight)


def openai_chat(row: Fields, *, answered: bool = True) -> Record:
    """Chat messages; not `answered`: they may end with what is asked."""
    said = turns.messages(row["messages"])
    turns.check_order(said, answered=answered)
    functions = [{"type": "function", "function": function} for function in row.get("functions", ())]
    return Conversation(said, _tools(row.get("tools")) + tuple(functions), meta=_unread(row, "messages"))


def _alpaca(row: Fields) -> Record:
    before = _alpaca_prompt(row)
    if len(before) == 1:
        return PromptCompletion(before[0].content, row["output"])
    said = (*before, assistant(row["output"]))
    turns.check_order(said)
    return Conversation(said)


def _alpaca_prompt(row: Fields) -> turns.Messages:
    said = [system(row["system"])] if row.get("system", "").strip() else []
    for pair in row.get("history", ()):
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(map(TEXT.test, pair)):
            raise RowError(f"history has {describe(pair)}, it must be a list of [question, answer] pairs")
        said += [user(pair[0]), assistant(pair[1])]
    given = row.get("input", "")
    return (*said, user(f"{row['instruction']}\n{given}" if given.strip() else row["instruction"]))


def sharegpt(row: Fields, *, answered: bool = True) -> Record:
    """ShareGPT's conversations; not `answered`: they may end with what is asked."""
    said = _sharegpt_turns(row)
    turns.check_order(said, answered=answered)
    return Conversation(said, _tools(row.get("tools")))


def _sharegpt_turns(row: Fields) -> turns.Messages:
    said = turns.sharegpt(row["conversations"])
    return (system(row["system"]), *said) if row.get("system", "").strip() else said


def _openai_preference(row: Fields) -> Record:
    given = row["input"]
    prompt = turns.messages(given["messages"])
    chosen, rejected = turns.messages(row["preferred_output"]), turns.messages(row["non_preferred_output"])
    meta = _unread(row, "preferred_output", "non_preferred_output")
    if more := {key: value for key, value in given.items() if key != "messages" and value is not None}:
        meta["input"] = more
    return _comparison(prompt, chosen, rejected, meta=meta)


def _preference(row: Fields) -> Record:
    meta = _unread(row, "prompt", "chosen", "rejected")
    chosen, rejected = said_turns(row["chosen"], assistant), said_turns(row["rejected"], assistant)
    if "prompt" not in row:
        return _comparison(*turns.common_prefix(chosen, rejected), meta=meta, margin=row.get("margin", 1.0))
    prompt = said_turns(row["prompt"], user)
    if chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
        # Some files repeat the prompt at the start of both sides.
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return _comparison(prompt, chosen, rejected, meta=meta, margin=row.get("margin", 1.0))


def _alpaca_preference(row: Fields) -> Record:
    return _comparison(_alpaca_prompt(row), (assistant(row["chosen"]),), (assistant(row["rejected"]),))


def _sharegpt_preference(row: Fields) -> Record:
    meta = {"tools": _tools(row["tools"])} if "tools" in row else None
    chosen, rejected = turns.sharegpt([row["chosen"]]), turns.sharegpt([row["rejected"]])
    return _comparison(_sharegpt_turns(row), chosen, rejected, meta=meta)


def _hh(row: Fields) -> Record:
    return _comparison(*turns.common_prefix(turns.transcript(row["chosen"]), turns.transcript(row["rejected"])))


def _comparison(
    prompt: turns.Messages,
    chosen: turns.Messages,
    rejected: turns.Messages,
    *,
    meta: Fields | None = None,
    margin: float = 1.0,
) -> Record:
    if chosen == rejected:
        raise RowError("chosen and rejected are identical: there is nothing to prefer")
    for side, said in (("chosen", chosen), ("rejected", rejected)):
        _check_answer(side, prompt, said)
    return Comparison(prompt, chosen, rejected, float(margin), meta=meta or {})


def _check_answer(side: str, prompt: turns.Messages, answer: turns.Messages) -> None:
    if not answer or answer[0].role != "assistant":
        raise RowError(f"{side} must start with an assistant turn, after what the prompt says")
    try:
        turns.check_order(prompt + answer)
    except RowError as error:
        raise RowError(f"prompt and {side}: {error}") from error


def _kto(row: Fields) -> Record:
    prompt, completion = said_turns(row["prompt"], user), said_turns(row["completion"], assistant)
    _check_answer("completion", prompt, completion)
    label = str(row["label"]).lower() in ("true", "1")
    return Judged(prompt, completion, label, meta=_unread(row, "prompt", "completion"))


def _helpsteer(row: Fields) -> Record:
    scores = {}
    for name in ATTRIBUTES:
        if row.get(name) is not None:
            score = _whole(row[name])
            if score is None or not 0 <= score <= 4:
                raise RowError(f"{name} is {describe(row[name])}; the scale is whole numbers from 0 to 4")
            scores[name] = float(score)
    prompt, response = said_turns(row["prompt"], user), said_turns(row["response"], assistant)
    _check_answer("response", prompt, response)
    return Rated(prompt, response, scores, meta=_unread(row, "prompt", "response"))


def _has_attributes(row: Fields) -> bool:
    return sum(_whole(row.get(name)) is not None for name in ATTRIBUTES) >= 3


def _whole(value: object) -> int | None:
    if isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _retrieval(row: Fields) -> Record:
    negatives = row.get("negative", [])
    negatives = (negatives,) if isinstance(negatives, str) else tuple(negatives)
    if not all(text.strip() for text in negatives):
        raise RowError("a negative is empty")
    return Retrieval(row["anchor"], row["positive"], negatives)


def _text(row: Fields) -> Record:
    return Document(row["text"])


def said_turns(value: str | list[Fields], speaker: Callable[[str], Message]) -> turns.Messages:
    """A field that is one text by that speaker, or a list of messages."""
    return (speaker(value),) if isinstance(value, str) else turns.messages(value)


def _unread(row: Fields, *names: str) -> dict[str, Any]:
    """The fields of turns that a Message has no place for, under the name of their list."""
    return {
        name: left for name in names if isinstance(row.get(name), list | tuple) and (left := turns.unread(row[name]))
    }


def _tools(tools: Any) -> tuple[Fields, ...]:
    """Tool schemas: a list, or JSON of one (ShareGPT); bare functions get OpenAI's wrapper."""
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except (ValueError, RecursionError) as error:
            raise RowError(f"tools must be a list, or JSON of one ({error})") from error
    if not isinstance(tools or [], list) or not all(isinstance(tool, Mapping) for tool in tools or []):
        raise RowError(f"tools is {describe(tools)}, it must be a list of objects")
    return tuple(tool if "function" in tool else {"type": "function", "function": tool} for tool in tools or [])


def _any_list(row: Fields) -> bool:
    return isinstance(row.get("prompt"), list) or isinstance(row.get("completion"), list)


def _is_preference(row: Fields) -> bool:
    if TRANSCRIPT.test(row["chosen"]) and TRANSCRIPT.test(row["rejected"]):
        return False  # "hh": both sides repeat the whole prompt
    return row.get("prompt") is not None or (MESSAGES.test(row["chosen"]) and MESSAGES.test(row["rejected"]))


FORMATS: dict[str, Format] = {
    "prompt_completion": Format(
        "one prompt, one completion (the home format)", {"prompt": TEXT, "completion": TEXT}, _prompt_completion
    ),
    "trl_prompt_completion": Format(
        "prompt and completion as lists of messages (TRL)",
        {"prompt": SAID, "completion": SAID},
        _trl_prompt_completion,
        also=_any_list,
        also_reason="neither prompt nor completion is a list of messages",
    ),
    "openai_chat": Format(
        "chat messages (OpenAI)",
        {"messages|conversations": MESSAGES},
        openai_chat,
        {"tools": ANY, "functions": LIST},
    ),
    "alpaca": Format(
        "instruction, input and output (Alpaca)",
        {"instruction": TEXT, "output": TEXT},
        _alpaca,
        {"input": TEXT, "system": TEXT, "history": LIST},
    ),
    "sharegpt": Format(
        "conversations with from and value (ShareGPT)",
        {"conversations|messages": TURNS},
        sharegpt,
        {"system": TEXT, "tools": ANY},
    ),
    "preference": Format(
        "prompt, chosen and rejected (TRL); without prompt, its part is what both lists start with",
        {"chosen": SAID, "rejected": SAID},
        _preference,
        {"prompt": SAID, "margin": NUMBER},
        also=_is_preference,
        also_reason="chosen and rejected must be answers to 'prompt', or lists of messages that contain the prompt",
    ),
    "openai_preference": Format(
        "input with messages, preferred and non-preferred output (OpenAI)",
        {
            "input": INPUT,
            "preferred_output|preferred_completion": MESSAGES,
            "non_preferred_output|non_preferred_completion": MESSAGES,
        },
        _openai_preference,
    ),
    "alpaca_preference": Format(
        "Alpaca with chosen and rejected (LLaMA-Factory)",
        {"instruction": TEXT, "chosen": TEXT, "rejected": TEXT},
        _alpaca_preference,
        {"input": TEXT, "system": TEXT, "history": LIST},
    ),
    "sharegpt_preference": Format(
        "ShareGPT with chosen and rejected turns (LLaMA-Factory)",
        {"conversations": TURNS, "chosen": TURN, "rejected": TURN},
        _sharegpt_preference,
        {"system": TEXT, "tools": ANY},
    ),
    "hh": Format("chosen and rejected transcripts (HH-RLHF)", {"chosen": TRANSCRIPT, "rejected": TRANSCRIPT}, _hh),
    "kto": Format(
        "prompt, completion and a yes/no label (KTO)",
        {"prompt": SAID, "completion": SAID, "label|kto_tag": YES_NO},
        _kto,
    ),
    "helpsteer": Format(
        "prompt, response and attribute scores from 0 to 4 (HelpSteer)",
        {"prompt": SAID, "response": SAID},
        _helpsteer,
        dict.fromkeys(ATTRIBUTES, ANY),
        also=_has_attributes,
        also_reason=f"fewer than three attributes with whole numbers; known: {', '.join(ATTRIBUTES)}",
    ),
    "retrieval": Format(
        "query, a passage that answers it, and passages that do not",
        {"anchor|query": TEXT, "positive": TEXT},
        _retrieval,
        {"negative|negatives": TEXTS},
    ),
    "text": Format("plain text, one document per row", {"text": TEXT}, _text),
}
