"""Traffic and feedback as rows: what is chosen, what is left out and why, and that tailor reads what it wrote."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from recorded_chats import told
from tailor.data.readers import read_records
from tailor.data.records import Comparison, Conversation, Rated, Record
from tailor.data.writers import write_records
from tailor.errors import NotFoundError
from tailor.feedback.dataset import Harvest, Wanted, harvest
from tailor.feedback.feedback import Feedback, FeedbackLog
from tailor.feedback.traffic import Traffic, TrafficSettings, open_traffic
from tailor.text.messages import Message, assistant, system, user

DAY = 86_400
START = 1_790_000_000


class Place:
    """A folder with traffic and feedback."""

    def __init__(self, folder: Path) -> None:
        self.traffic: Traffic = open_traffic(TrafficSettings(folder=folder / "traffic"))
        self.log = FeedbackLog(folder / "feedback")

    def chat(self, completion_id: str, question: Any, *answers: Any, **more: Any) -> None:
        self.traffic.record(told(completion_id, question, *answers, **more))

    def say(self, completion_id: str, kind: Any, *, by: str = "ann", **more: Any) -> None:
        self.log.add(Feedback(completion_id, kind, by, "key-1", **more))

    def harvest(self, **wanted: Any) -> Harvest:
        return harvest(self.traffic, self.log, Wanted(**wanted))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture
def again(tmp_path: Path) -> Callable[[Harvest], list[Record]]:
    """What tailor's own readers make of the file that the harvest becomes."""

    def read(found: Harvest) -> list[Record]:
        write_records(tmp_path / "rows.jsonl", found.records)
        return [
            replace(record, source=found.records[0].source) for record in read_records(tmp_path / "rows.jsonl").records
        ]

    return read


def reasons(found: Harvest) -> dict[str, int]:
    return {reason: len(places) for reason, places in found.reasons().items()}


def answers(found: Harvest) -> list[str]:
    return [record.messages[-1].content for record in found.records if isinstance(record, Conversation)]


def test_edits_replace_votes_choose(place: Place, again: Callable[[Harvest], list[Record]]) -> None:
    place.chat("b", "2?", "two", at=START + 1)
    place.chat("a", "1?", "won", at=START)
    place.chat("c", "3?", "tree", at=START + 2)
    place.chat("d", "4?", "four", at=START + 3)
    place.chat("e", "5?", "V", "five", at=START + 4)
    place.chat("f", "6?", "six", at=START + 5)
    place.say("a", "edit", content="one")
    place.say("a", "vote", vote="down")
    place.say("b", "vote", vote="up")
    place.say("c", "vote", vote="down")
    place.say("e", "vote", preferred=1)
    place.say("f", "vote", vote="up")
    place.say("f", "vote", vote="down", by="bob")
    found = place.harvest()
    assert answers(found) == ["one", "two", "five"]
    assert reasons(found) == {
        "voted down": 1,
        "nobody said that it is good": 1,
        "another answer was preferred": 1,
        "as many votes down as up": 1,
    }
    (file,) = place.traffic.journal.files()
    assert found.reasons()["another answer was preferred"] == [f"{file}:5 choice 0"]
    assert found.reasons()["voted down"] == [f"{file}:3"]
    assert (found.num_exchanges, found.num_feedback) == (6, 7)
    assert again(found) == found.records
    assert answers(place.harvest(only_voted=False)) == ["one", "two", "four", "five"]


def test_ratings_choose_where_a_least_one_is_given(place: Place) -> None:
    for number in range(1, 6):
        place.chat(str(number), f"q{number}", f"a{number}", at=START + number)
        place.say(str(number), "rating", rating=number)
    place.chat("6", "q6", "a6", at=START + 6)
    place.say("6", "rating", attributes={"helpfulness": 3})
    assert answers(place.harvest(min_rating=3.5)) == ["a4", "a5", "a6"]
    assert reasons(place.harvest(min_rating=3.5)) == {"rated below 3.5": 3}
    assert answers(place.harvest()) == []
    assert len(answers(place.harvest(only_voted=False))) == 6


def test_a_conversation_learns_its_last_answer(place: Place, again: Callable[[Harvest], list[Record]]) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
        {"role": "assistant", "content": None, "tool_calls": [call], "refusal": None},
        {"role": "tool", "content": "7", "tool_call_id": "c1"},
    ]
    place.chat("a", asked, "Seven.", tools=[tool])
    place.say("a", "vote", vote="up")
    found = place.harvest()
    said = (
        system("Be brief."),
        user("Hi"),
        Message("assistant", "", tool_calls=(call,), weight=0.0),
        Message("tool", "7", tool_call_id="c1"),
        assistant("Seven."),
    )
    assert found.records == [Conversation(said, (tool,))]
    assert again(found) == found.records


def test_what_cannot_be_learned_is_said(place: Place) -> None:
    place.chat("same", "q", "a", at=START)
    place.chat("same too", "q", "a", at=START + 1)
    place.chat("cut", "long", "a and", at=START + 2, finish_reason="length")
    place.chat("empty", "silent", "", at=START + 3)
    place.chat("nul", "zero\0", "a", at=START + 4)
    place.chat("same", "q again", "a", at=START + 5)
    place.chat("large", "x" * (1 << 20), "a", at=START + 6)
    place.say("lost", "vote", vote="up")
    found = place.harvest(only_voted=False)
    assert answers(found) == ["a"]
    assert reasons(found) == {
        "the same row as an earlier one": 1,
        "cut off at the longest answer allowed": 1,
        "turn 2 (assistant) is empty": 1,
        "field 'messages' has the control character NUL (U+0000) at character 5": 1,
        "a chat of this id came before": 1,
        "the chat was too large to be recorded with its texts": 1,
        "there is feedback, but its chat is not recorded": 1,
    }
    assert found.num_exchanges == 6
    place.say("cut", "vote", vote="up")
    assert answers(place.harvest()) == ["a and"]


def test_damaged_lines_are_reported_and_the_others_used(place: Place) -> None:
    place.chat("a", "q", "a")
    place.say("a", "vote", vote="up")
    files = [log.journal.files()[0] for log in (place.traffic, place.log)]
    for file in files:
        with file.open("a") as torn:
            torn.write('{"id":"b"')
    place.chat("c", "q2", "a2")
    place.say("c", "vote", vote="up")
    found = place.harvest()
    assert answers(found) == ["a", "a2"]
    assert sorted(each.place for each in found.damaged) == sorted(f"{file}:2" for file in files)


def test_models_and_times(place: Place) -> None:
    for number, model in enumerate(("moods", "base", "moods")):
        place.chat(str(number), f"q{number}", f"a{number}", at=START + number * DAY, model=model)
        place.say(str(number), "vote", vote="up")
    assert answers(place.harvest(model="moods")) == ["a0", "a2"]
    assert answers(place.harvest(since=START + 1)) == ["a1", "a2"]
    assert answers(place.harvest(until=START + DAY)) == ["a0"]
    assert reasons(place.harvest(model="moods", until=START + DAY)) == {}
    with pytest.raises(NotFoundError, match="did you mean 'moods'"):
        place.harvest(model="mods")


def test_artifacts_count_as_models(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.traffic = open_traffic(TrafficSettings(folder=tmp_path / "t"), artifact_of={"ft:1": "moods"}.get)
    place.chat("a", "q", "a", model="ft:1")
    for name in ("ft:1", "moods"):
        assert answers(place.harvest(model=name, only_voted=False)) == ["a"]


def pairs(found: Harvest) -> list[tuple[str, str, str]]:
    records = [record for record in found.records if isinstance(record, Comparison)]
    return [(each.prompt[-1].content, each.chosen[0].content, each.rejected[0].content) for each in records]


def test_preferences(place: Place, again: Callable[[Harvest], list[Record]]) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    place.chat("edit", "1?", "won", at=START, tools=[tool])
    place.chat("best", "2?", "too", "two", "to", at=START + 1)
    place.chat("up", "3?", "three", at=START + 2)
    place.chat("down", "3?", "tree", at=START + 3)
    place.chat("alone", "4?", "four", at=START + 4)
    place.chat("tie", "5?", "five", "V", at=START + 5)
    place.chat("rated", "6?", "six", at=START + 6)
    place.chat("same", "7?", "seven", at=START + 7)
    place.say("edit", "edit", content="one")
    place.say("best", "vote", preferred=1)
    place.say("up", "vote", vote="up")
    place.say("down", "vote", vote="down")
    place.say("alone", "vote", vote="up")
    place.say("tie", "vote", preferred=0)
    place.say("tie", "vote", preferred=1, by="bob")
    place.say("rated", "rating", rating=5)
    place.say("same", "edit", content="seven")
    found = place.harvest(kind="preference")
    assert pairs(found) == [
        ("1?", "one", "won"),
        ("2?", "two", "too"),
        ("2?", "two", "to"),
        ("3?", "three", "tree"),
    ]
    assert reasons(found) == {
        "a vote, but no answer voted the other way": 1,
        "as many people preferred one answer as another": 1,
        "nobody compared it with another answer": 1,
        "chosen and rejected are identical: there is nothing to prefer": 1,
    }
    assert again(found) == found.records
    assert found.records[0].meta["tools"] == [tool]


def test_contradictions_are_not_learned(place: Place) -> None:
    place.chat("a", "q", "x", "y", at=START)
    place.chat("b", "q", "x", "y", at=START + 1)
    place.chat("c", "q2", "x", "y", at=START + 2)
    place.say("a", "vote", preferred=0)
    place.say("b", "vote", preferred=1)
    place.say("c", "vote", preferred=1)
    found = place.harvest(kind="preference")
    assert pairs(found) == [("q2", "y", "x")]
    assert reasons(found) == {"others say the opposite of the same two answers": 2}


def test_rated_answers(place: Place, again: Callable[[Harvest], list[Record]]) -> None:
    scores = {"helpfulness": 4, "correctness": 3, "verbosity": 0}
    place.chat("a", [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}], "x", at=START)
    place.chat("b", "q2", "y", at=START + 1)
    place.chat("c", "q3", "z", at=START + 2)
    place.say("a", "rating", attributes=scores)
    place.say("a", "rating", attributes={**scores, "helpfulness": 1}, by="bob")
    place.say("b", "rating", rating=5)
    found = place.harvest(kind="rated")
    assert found.records == [
        Rated((system("s"), user("q")), (assistant("x"),), {"helpfulness": 3.0, "correctness": 3.0, "verbosity": 0.0})
    ]
    assert again(found) == found.records
    assert sum(reasons(found).values()) == 2
    assert reasons(found)["nobody rated it"] == 1
    assert any(reason.startswith("fewer than three attributes") for reason in reasons(found))
    assert reasons(place.harvest(kind="rated", min_rating=4))["rated below 4"] == 1


def test_the_same_files_give_the_same_rows(place: Place) -> None:
    for number in range(20):
        place.chat(f"c{number:02}", f"q{number % 7}", f"a{number}", "b", at=START - number % 5)
        place.say(f"c{number:02}", "vote", preferred=number % 2)
    first = [place.harvest(kind=kind).records for kind in ("sft", "preference")]
    assert first == [place.harvest(kind=kind).records for kind in ("sft", "preference")]
    assert all(first)
