"""Feedback: what is refused, what counts, and that nothing is deleted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from recorded_chats import told
from tailor.feedback.feedback import Feedback, FeedbackError, FeedbackLog, current
from tailor.feedback.journal import Damage
from tailor.feedback.redact import redactor
from tailor.feedback.traffic import Exchange, TrafficSettings, open_traffic
from tailor.feedback.verdicts import verdicts


def said(kind: Any, *, of: str = "a", by: str = "ann", **more: Any) -> Feedback:
    return Feedback(of, kind, by, "key-1", **more)


@pytest.fixture
def log(tmp_path: Path) -> FeedbackLog:
    return FeedbackLog(tmp_path / "feedback")


@pytest.fixture
def exchange(tmp_path: Path) -> Exchange:
    traffic = open_traffic(TrafficSettings(folder=tmp_path / "traffic"))
    traffic.record(told("a", "hi", "hello", "hey"))
    traffic.record(told("one", "hi", "hello"))
    found = traffic.find("a")
    assert found is not None
    return found


def test_all_kinds_come_back_in_order(log: FeedbackLog, exchange: Exchange) -> None:
    given = [
        said("vote", vote="up"),
        said("vote", vote="down", choice=1),
        said("vote", preferred=0),
        said("edit", content="Good day", choice=1),
        said("rating", rating=4),
        said("rating", attributes={"helpfulness": 4, "humor": 0}),
    ]
    kept = [log.add(each, exchange) for each in given]
    log.add(said("vote", of="b", vote="up"))
    assert log.of("a") == kept
    assert all(each.id.startswith("fb-") and each.time > 0 for each in kept)
    assert log.of("c") == []


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        ("vote", {}, "vote"),
        ("vote", {"vote": "up", "preferred": 0}, "vote"),
        ("vote", {"vote": "upp"}, "vote"),
        ("vote", {"preferred": 2}, "preferred"),
        ("vote", {"vote": "up", "choice": 2}, "choice"),
        ("vote", {"rating": 3}, "rating"),
        ("edit", {"content": " \n"}, "content"),
        ("edit", {"vote": "up"}, "vote"),
        ("edit", {"content": "x" * (1 << 20) + "x"}, "content"),
        ("rating", {"rating": 0}, "rating"),
        ("rating", {"rating": 6}, "rating"),
        ("rating", {"attributes": {}}, "attributes"),
        ("rating", {"attributes": {"helpfullness": 3}}, "attributes"),
        ("rating", {"attributes": {"helpfulness": 5}}, "attributes"),
        ("rating", {"attributes": {"helpfulness": -1}}, "attributes"),
    ],
)
def test_what_makes_no_sense_is_refused(
    log: FeedbackLog, exchange: Exchange, kind: str, values: dict[str, Any], field: str
) -> None:
    with pytest.raises(FeedbackError) as caught:
        log.add(said(kind, **values), exchange)
    assert caught.value.field == field
    assert list(log.everything()) == []


def test_one_answer_cannot_be_preferred(log: FeedbackLog, tmp_path: Path, exchange: Exchange) -> None:
    alone = open_traffic(TrafficSettings(folder=tmp_path / "traffic")).find("one")
    with pytest.raises(FeedbackError, match="one choice"):
        log.add(said("vote", of="one", preferred=0), alone)


def test_later_feedback_of_the_same_person_counts_and_the_earlier_stays(log: FeedbackLog) -> None:
    first = log.add(said("vote", vote="up"))
    other = log.add(said("vote", vote="up", by="bob"))
    last = log.add(said("vote", vote="down"))
    elsewhere = log.add(said("vote", vote="up", choice=1))
    assert current(log.of("a")) == [other, last, elsewhere]
    assert log.of("a") == [first, other, last, elsewhere]
    about = verdicts(log.of("a"))["a"]
    assert (about.balance(0), about.balance(1), about.was_voted(0)) == (0, 1, True)
    log.add(said("vote", vote="none"))
    assert verdicts(log.of("a"))["a"].balance(0) == 1


def test_ratings_are_means_over_people(log: FeedbackLog) -> None:
    log.add(said("rating", attributes={"quality": 4, "humor": 1}))
    log.add(said("rating", attributes={"helpfulness": 1, "humor": 2}, by="bob"))
    log.add(said("rating", rating=4, by="cleo"))
    about = verdicts(log.of("a"))["a"]
    assert about.rating(0) == (5 + 2 + 4) / 3
    assert about.attributes(0) == {"helpfulness": 1, "humor": 2, "quality": 4}  # 1.5 and 3.5 are rounded up
    assert about.rating(1) is None


def test_who_prefers_what_is_counted(log: FeedbackLog) -> None:
    for person, choice in (("ann", 0), ("bob", 1), ("cleo", 1)):
        log.add(said("vote", preferred=choice, by=person))
    assert verdicts(log.of("a"))["a"].best == 1
    log.add(said("vote", preferred=0, by="dora"))
    assert verdicts(log.of("a"))["a"].best is None


def test_edits_are_redacted_as_traffic_is(tmp_path: Path) -> None:
    log = FeedbackLog(tmp_path, redact=redactor(["email"]))
    assert log.add(said("edit", content="ask a@b.example")).content == "ask [EMAIL]"
    assert log.of("a")[0].content == "ask [EMAIL]"
    refusing = FeedbackLog(tmp_path, redact=lambda entry: None)
    with pytest.raises(FeedbackError, match="may not be kept"):
        refusing.add(said("edit", content="x"))


def test_damaged_lines_are_said(log: FeedbackLog) -> None:
    kept = log.add(said("vote", vote="up"))
    (path,) = log.journal.files()
    with path.open("a") as file:
        file.write('{"completion_id":"a","schema_version":1,"kind":"veto"}\n')
        file.write('{"completion_id":"a","kind":"vote","author":"x","principal":"y","vote":7,"schema_version":1}\n')
        file.write('{"completion_id":"a","schema_version":9}\n')
    first, *rest = log.everything()
    assert first == kept
    assert [each.place for each in rest if isinstance(each, Damage)] == [f"{path}:{line}" for line in (2, 3, 4)]
    assert log.of("a") == [kept]
