"""Turns of a conversation as files spell them (role/content, ShareGPT's from/value, HH transcripts); their order."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from tailor.data.rows import RowError, describe
from tailor.errors import nearest
from tailor.text.messages import ROLES, Message, assistant, system, user

Messages = tuple[Message, ...]

INSTRUCTIONS = ("system", "developer")

TAGS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "system": "system",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
    "function_response": "tool",
}
"""ShareGPT's `from` and the role it means."""

_READ = {"role", "content", "name", "tool_calls", "tool_call_id", "weight", "function_call"}
_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant):")


def messages(turns: Sequence[Mapping[str, Any]]) -> Messages:
    """Turns in OpenAI's spelling; the older `function` role and `function_call` become tool turns and calls."""
    return tuple(_message(index, turn) for index, turn in enumerate(turns, start=1))


def unread(turns: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What turns carry beyond a Message, e.g. `reasoning_content`: turn number → fields. Kept in a record's meta."""
    left = {}
    for index, turn in enumerate(turns, start=1):
        if extra := {key: value for key, value in turn.items() if key not in _READ and value is not None}:
            left[str(index)] = extra
    return left


def sharegpt(turns: Sequence[Mapping[str, Any]]) -> Messages:
    """Turns in ShareGPT's spelling. `function_call` values are JSON: one call or a list of them."""
    return tuple(_tagged(index, turn) for index, turn in enumerate(turns, start=1))


def transcript(text: str) -> Messages:
    """`"\\n\\nHuman: … \\n\\nAssistant: …"` as turns (the format of Anthropic's HH-RLHF)."""
    pieces = _TRANSCRIPT.split(text)
    if len(pieces) < 3 or pieces[0].strip():
        raise RowError('a transcript must start with "\\n\\nHuman:"')
    speakers = zip(pieces[1::2], pieces[2::2], strict=True)
    return tuple(user(said.strip()) if who == "Human" else assistant(said.strip()) for who, said in speakers)


def is_transcript(value: object) -> bool:
    """Does the text look like an HH transcript?"""
    return isinstance(value, str) and value.lstrip("\n").startswith("Human:") and "\n\nAssistant:" in value


def common_prefix(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """(prompt, chosen, rejected) of two whole conversations: the prompt is what both start with."""
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    if same == len(chosen) == len(rejected):
        raise RowError("chosen and rejected are identical: there is nothing to prefer")
    if same == len(chosen) or same == len(rejected):
        raise RowError("one of chosen and rejected is the start of the other: there are no two answers to compare")
    if same == 0:
        raise RowError("chosen and rejected have no common start, so they answer no common prompt")
    return chosen[:same], chosen[same:], rejected[same:]


def check_order(turns: Messages, *, answered: bool = True) -> None:
    """Raise RowError unless the turns make a conversation that a model can learn from.

    System turns come first, a user speaks before the assistant, tools answer calls, assistants do not follow
    each other, nothing said is empty, and there is an assistant turn. Turns that are not `answered` need none, but
    then they end with what is to be answered.
    """
    if answered and not any(turn.role == "assistant" for turn in turns):
        raise RowError("there is no assistant turn, so there is nothing to learn")
    previous = ""
    for index, turn in enumerate(turns, start=1):
        if problem := _misplaced(turn, previous, turns[: index - 1]):
            raise RowError(f"turn {index} ({turn.role}) {problem}")
        previous = turn.role
    if not answered:
        if previous in INSTRUCTIONS:
            raise RowError("there are only system turns, so there is nothing to answer")
        return
    trained = [turn for turn in turns if turn.role == "assistant" and turn.weight != 0]
    if not trained:
        raise RowError("every assistant turn has weight 0, so there is nothing to learn")


def _misplaced(turn: Message, previous: str, before: Messages) -> str:
    if turn.role in ("user", "assistant") and not turn.content.strip() and not turn.tool_calls:
        return "is empty"
    if turn.role in INSTRUCTIONS and previous not in ("", *INSTRUCTIONS):
        return f"comes after turn {len(before)} ({previous}): system turns come first"
    if turn.role == "assistant":
        if not any(earlier.role == "user" for earlier in before):
            return "comes before any user turn"
        if previous == "assistant":
            return "follows another assistant turn: join them, or add what was said between"
    if turn.role == "tool" and not (previous == "tool" or (before and before[-1].tool_calls)):
        return "does not follow a tool call"
    if previous == "assistant" and before[-1].tool_calls and turn.role != "tool":
        return "follows a tool call without its result"
    return ""


def _message(index: int, turn: Mapping[str, Any]) -> Message:
    role = "tool" if turn.get("role") == "function" else turn.get("role")
    if role not in ROLES:
        raise RowError(f"turn {index}: role is {describe(role)}; {nearest(str(role), ROLES)}")
    calls = _tool_calls(index, turn)
    if calls and role != "assistant":
        raise RowError(f"turn {index} ({role}): only assistant turns have tool_calls")
    weight = turn.get("weight")
    if weight is not None and (role != "assistant" or isinstance(weight, bool) or weight not in (0, 1)):
        raise RowError(f"turn {index} ({role}): weight is {describe(weight)}, it must be 0 or 1 on an assistant turn")
    name, call_id = turn.get("name"), turn.get("tool_call_id")
    for field, value in (("name", name), ("tool_call_id", call_id)):
        if value is not None and not isinstance(value, str):
            raise RowError(f"turn {index} ({role}): {field} is {describe(value)}, it must be text")
    content = _content(f"turn {index} ({role})", turn.get("content"), optional=bool(calls))
    return Message(role, content, name, calls, call_id, None if weight is None else float(weight))


def _content(what: str, content: object, *, optional: bool) -> str:
    if content is None and optional:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and content:
        return "".join(_part(what, part) for part in content)
    raise RowError(f"{what}: content is {describe(content)}, it must be text")


def _part(what: str, part: object) -> str:
    if isinstance(part, Mapping) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, Mapping) else describe(part)
    raise RowError(f"{what}: a content part is {kind!r}; only text parts can be read")


def _tool_calls(index: int, turn: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    calls = turn.get("tool_calls") or []
    if legacy := turn.get("function_call"):
        calls = [{"type": "function", "function": legacy}]
    if not isinstance(calls, list):
        raise RowError(f"turn {index}: tool_calls is {describe(calls)}, it must be a list")
    for call in calls:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise RowError(f'turn {index}: a tool call must look like {{"function": {{"name": …, "arguments": …}}}}')
    return tuple(calls)


def _tagged(index: int, turn: Mapping[str, Any]) -> Message:
    tag, value = turn["from"], turn["value"]
    if not isinstance(tag, str) or tag not in TAGS:
        raise RowError(f"turn {index}: from is {describe(tag)}; {nearest(str(tag), TAGS)}")
    if not isinstance(value, str):
        raise RowError(f"turn {index} ({tag}): value is {describe(value)}, it must be text")
    if tag == "function_call":
        return Message("assistant", "", tool_calls=_called(index, value))
    return system(value) if TAGS[tag] == "system" else Message(TAGS[tag], value)


def _called(index: int, value: str) -> tuple[Mapping[str, Any], ...]:
    try:
        calls = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"turn {index}: the value of a function_call must be JSON ({error})") from error
    calls = calls if isinstance(calls, list) else [calls]
    return _tool_calls(index, {"tool_calls": [{"type": "function", "function": call} for call in calls]})
