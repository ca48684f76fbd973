"""Recorded chats and the feedback on them as rows to train on; what becomes no row is reported, and why."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, Literal, NamedTuple

from tailor.config import Strict
from tailor.data.formats import FORMATS
from tailor.data.records import Record
from tailor.data.rows import RawRow, RowError, parse
from tailor.errors import NotFoundError, nearest
from tailor.feedback.feedback import Feedback, FeedbackLog
from tailor.feedback.journal import Damage, encode
from tailor.feedback.traffic import Choice, Exchange, Traffic
from tailor.feedback.verdicts import NOTHING, Verdicts, verdicts

Kind = Literal["sft", "preference", "rated"]
KINDS: Mapping[Kind, str] = {"sft": "openai_chat", "preference": "preference", "rated": "helpsteer"}
"""The kinds of data sets, and the format of docs/formats.md that each is written in."""

_TURN = ("role", "content", "name", "tool_calls", "tool_call_id", "function_call")


class Wanted(Strict):
    """Which chats become which rows. `model` is a name as it was asked for, or an artifact's.

    `since` and `until` (exclusive) are seconds since 1970. With `only_voted` an answer needs an edit, more votes up
    than down, or a rating of at least `min_rating`; else it is enough that nothing speaks against it.
    """

    kind: Kind = "sft"
    model: str | None = None
    since: int | None = None
    until: int | None = None
    min_rating: float | None = None
    only_voted: bool = True


class LeftOut(NamedTuple):
    """What became no row: where it stands, and why."""

    place: str
    reason: str


@dataclass
class Harvest:
    """The records, in the order of their chats, and everything that did not become one."""

    kind: Kind
    records: list[Record] = field(default_factory=list)
    num_exchanges: int = 0
    num_feedback: int = 0
    left_out: list[LeftOut] = field(default_factory=list)
    damaged: list[Damage] = field(default_factory=list)

    def reasons(self) -> dict[str, list[str]]:
        """Reason → places, the most frequent first."""
        found: dict[str, list[str]] = {}
        for place, reason in self.left_out:
            found.setdefault(reason, []).append(place)
        return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


class _Row(NamedTuple):
    """A row to be, ordered by when and where it was recorded."""

    time: int
    completion_id: str
    choice: int
    other: int
    place: str
    fields: dict[str, Any]


def harvest(traffic: Traffic, log: FeedbackLog, wanted: Wanted) -> Harvest:
    """All rows of the recorded chats that are wanted, each once. The same files give the same rows in the same order.

    Raises NotFoundError when nothing was recorded of the model, DataError when a file cannot be read.
    """
    found = Harvest(wanted.kind)
    said = list(_undamaged(log.everything(), found.damaged))
    found.num_feedback = len(said)
    about = verdicts(said)
    exchanges = _chosen(traffic, wanted, about, found)
    if wanted.kind == "preference":
        rows = _preferences(exchanges, about, found)
    else:
        make = _sft if wanted.kind == "sft" else _rated
        rows = [row for each in exchanges for row in make(each, about.get(each.id, NOTHING), wanted, found)]
    _keep(sorted(rows, key=lambda row: row[:4]), found)
    return found


def _undamaged(lines: Iterable[Feedback | Damage], damaged: list[Damage]) -> Iterator[Feedback]:
    for line in lines:
        if isinstance(line, Damage):
            damaged.append(line)
        else:
            yield line


def _chosen(traffic: Traffic, wanted: Wanted, about: Mapping[str, Verdicts], found: Harvest) -> Iterator[Exchange]:
    """The chats of the model and the time, once each; what feedback has no chat is reported at the end."""
    models: set[str] = set()
    seen: set[str] = set()
    for each in traffic.exchanges():
        if isinstance(each, Damage):
            found.damaged.append(each)
            continue
        names = {each.model, each.artifact or each.model}
        models |= names
        if each.id in seen:
            found.left_out.append(LeftOut(each.place, "a chat of this id came before"))
        elif (wanted.model is None or wanted.model in names) and _in_time(each.time, wanted):
            found.num_exchanges += 1
            if each.num_bytes is None:
                yield each
            else:
                found.left_out.append(LeftOut(each.place, "the chat was too large to be recorded with its texts"))
        seen.add(each.id)
    if wanted.model is not None and wanted.model not in models:
        raise NotFoundError(f"no chat with {wanted.model!r} is recorded; {nearest(wanted.model, sorted(models))}")
    for completion_id in sorted(about.keys() - seen):
        found.left_out.append(LeftOut(completion_id, "there is feedback, but its chat is not recorded"))


def _in_time(time: int, wanted: Wanted) -> bool:
    return (wanted.since is None or time >= wanted.since) and (wanted.until is None or time < wanted.until)


# --- supervised and rated rows ---------------------------------------------------------------------------------------


def _sft(exchange: Exchange, about: Verdicts, wanted: Wanted, found: Harvest) -> Iterator[_Row]:
    for choice in exchange.choices:
        reason = _against(choice, about, wanted)
        if reason:
            found.left_out.append(LeftOut(_place(exchange, choice), reason))
            continue
        answer = _corrected(choice, about) or _turn(choice.message)
        fields: dict[str, Any] = {"messages": [*_context(exchange), answer]}
        yield _row(exchange, choice, {**fields, **_tools(exchange)})


def _against(choice: Choice, about: Verdicts, wanted: Wanted) -> str:
    """Why this answer is not learned; empty when it is."""
    at = choice.index
    if at in about.edits:
        return ""
    if about.was_voted(at) and about.balance(at) <= 0:
        return "voted down" if about.balance(at) < 0 else "as many votes down as up"
    if about.best is not None and about.best != at and not about.was_voted(at):
        return "another answer was preferred"
    rating = about.rating(at)
    if wanted.min_rating is not None and rating is not None and rating < wanted.min_rating:
        return f"rated below {wanted.min_rating:g}"
    liked = about.balance(at) > 0 or about.best == at or (wanted.min_rating is not None and rating is not None)
    if not liked and choice.finish_reason == "length":
        return "cut off at the longest answer allowed"
    return "" if liked or not wanted.only_voted else "nobody said that it is good"


def _rated(exchange: Exchange, about: Verdicts, wanted: Wanted, found: Harvest) -> Iterator[_Row]:
    for choice in exchange.choices:
        attributes, rating = about.attributes(choice.index), about.rating(choice.index)
        reason = "" if attributes else "nobody rated it"
        if wanted.min_rating is not None and rating is not None and rating < wanted.min_rating:
            reason = f"rated below {wanted.min_rating:g}"
        if reason:
            found.left_out.append(LeftOut(_place(exchange, choice), reason))
            continue
        fields = {"prompt": _turns(exchange), "response": [_turn(choice.message)]}
        yield _row(exchange, choice, {**fields, **attributes, **_tools(exchange)})


# --- preferences -----------------------------------------------------------------------------------------------------


class _Side(NamedTuple):
    """An answer that people liked or disliked."""

    exchange: Exchange
    choice: Choice


def _preferences(exchanges: Iterable[Exchange], about: Mapping[str, Verdicts], found: Harvest) -> list[_Row]:
    """Edits before what they correct, preferred choices before the others, voted up before voted down.

    Votes are compared between all answers to the same prompt, whenever it was asked.
    """
    rows: list[_Row] = []
    sides: dict[str, tuple[list[_Side], list[_Side]]] = {}
    for exchange in exchanges:
        own = about.get(exchange.id, NOTHING)
        if not (own.edits or own.preferred or own.votes):
            found.left_out.append(LeftOut(exchange.place, "nobody compared it with another answer"))
            continue
        rows += _within(exchange, own)
        if own.preferred and own.best is None:
            found.left_out.append(LeftOut(exchange.place, "as many people preferred one answer as another"))
        up, down = sides.setdefault(_key([_turns(exchange), _tools(exchange)]), ([], []))
        for choice in exchange.choices:
            if own.was_voted(choice.index):
                (up if own.balance(choice.index) > 0 else down).append(_Side(exchange, choice))
    for up, down in sides.values():
        rows += [_pair(good.exchange, good.choice, _turn(good.choice.message), bad) for good, bad in product(up, down)]
        if not (up and down):
            places = [_place(*side) for side in (*up, *down)]
            found.left_out += [LeftOut(place, "a vote, but no answer voted the other way") for place in places]
    return _without_contradictions(rows, found)


def _within(exchange: Exchange, about: Verdicts) -> Iterator[_Row]:
    """The pairs of one chat: what was corrected, and what was preferred."""
    for choice in exchange.choices:
        side, edited = _Side(exchange, choice), _corrected(choice, about)
        if edited is not None:
            yield _pair(exchange, choice, edited, side)
    best = next((choice for choice in exchange.choices if choice.index == about.best), None)
    for choice in exchange.choices if best is not None else ():
        assert best is not None
        if choice is not best:
            yield _pair(exchange, best, _turn(best.message), _Side(exchange, choice))


def _pair(exchange: Exchange, choice: Choice, chosen: Mapping[str, Any], rejected: _Side) -> _Row:
    answer = _turn(rejected.choice.message)
    fields = {"prompt": _turns(exchange), "chosen": [chosen], "rejected": [answer], **_tools(exchange)}
    return _row(exchange, choice, fields, rejected.choice.index)


def _without_contradictions(rows: Sequence[_Row], found: Harvest) -> list[_Row]:
    """Where people say both that A is better than B and that B is better than A, neither is learned."""
    pairs = {_key([row.fields["prompt"], row.fields["chosen"], row.fields["rejected"]]) for row in rows}
    kept = []
    for row in rows:
        chosen, rejected = row.fields["chosen"], row.fields["rejected"]
        if chosen != rejected and _key([row.fields["prompt"], rejected, chosen]) in pairs:
            found.left_out.append(LeftOut(row.place, "others say the opposite of the same two answers"))
        else:
            kept.append(row)
    return kept


# --- rows ------------------------------------------------------------------------------------------------------------


def _keep(rows: Sequence[_Row], found: Harvest) -> None:
    """The rows as records, read as any file's are: what cannot be read is left out here and not found later."""
    row_format, first = FORMATS[KINDS[found.kind]], dict[str, str]()
    for row in rows:
        key = _key(row.fields)
        if key in first:
            found.left_out.append(LeftOut(row.place, "the same row as an earlier one"))
            continue
        first[key] = row.place
        try:
            fields = parse(RawRow(0, encode(row.fields)))
            record, others = row_format.read(fields)
        except RowError as error:
            found.left_out.append(LeftOut(row.place, str(error)))
            continue
        found.records.append(_with_meta(record, others))


def _with_meta(record: Record, others: Mapping[str, Any]) -> Record:
    return replace(record, meta={**record.meta, **others})


def _row(exchange: Exchange, choice: Choice, fields: dict[str, Any], other: int = 0) -> _Row:
    return _Row(exchange.time, exchange.id, choice.index, other, _place(exchange, choice), fields)


def _place(exchange: Exchange, choice: Choice) -> str:
    return f"{exchange.place} choice {choice.index}" if exchange.num_choices > 1 else exchange.place


def _corrected(choice: Choice, about: Verdicts) -> dict[str, Any] | None:
    edited = about.edits.get(choice.index)
    return None if edited is None else {"role": "assistant", "content": edited}


def _turns(exchange: Exchange) -> list[dict[str, Any]]:
    return [_turn(message) for message in exchange.messages]


def _context(exchange: Exchange) -> list[dict[str, Any]]:
    """What came before, its answers out of the loss: they are chats of their own, where people may have voted."""
    return [{**turn, "weight": 0} if turn["role"] == "assistant" else turn for turn in _turns(exchange)]


def _turn(message: Mapping[str, Any]) -> dict[str, Any]:
    """What a data file holds of a message: a refusal is its text, annotations are left."""
    turn = {name: message[name] for name in _TURN if message.get(name)}
    content = message.get("content")
    turn["content"] = (message.get("refusal") or "") if content is None else content
    return {"role": "", **turn}


def _tools(exchange: Exchange) -> dict[str, Any]:
    return {"tools": list(exchange.tools)} if exchange.tools else {}


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True)
