from __future__ import annotations

import pytest

from tailor.data.records import Comparison, Conversation, PromptCompletion, Source
from tailor.errors import DataError
from tailor.evaluation.task import Frame, answered, answers_of, find_task, frame_of, known_answers
from tailor.text.messages import Message, assistant, user

QUEUE = r"^Queue: (\w+)"


def test_repeated_short_references_are_a_label_set() -> None:
    references = ["billing", "sales", "billing", "sales"]
    task = find_task(references, references)
    assert (task.kind, task.labels, task.frame) == ("labels", ("billing", "sales"), Frame("", "", True))
    assert "2 different short values" in task.reason


def test_few_rows_whose_references_are_known_from_training_are_a_label_set() -> None:
    references = ["billing", "sales"]
    known = [f"queue {k}" for k in range(70)]
    assert find_task(references, references, known).kind == "text"
    assert find_task(references, references, [*known, "billing", "sales"]).kind == "labels"


@pytest.mark.parametrize(
    ("references", "why"),
    [
        (["one text", "another text", "a third"], "hardly repeat"),
        (["yes", "yes"], "all the same"),
        (["x" * 81, "short"] * 2, "long"),
        (["two\nlines", "short"] * 2, "several lines"),
        ([f"label {k}" for k in range(201)] * 2, "201 different values"),
    ],
)
def test_other_references_are_free_text(references: list[str], why: str) -> None:
    task = find_task(references, references)
    assert task.kind == "text"
    assert why in task.reason


def test_a_pattern_that_reads_a_label_out_of_a_reply_makes_both() -> None:
    references = [f"Queue: {queue}\nReply: number {k}" for k, queue in enumerate(["billing", "sales"] * 3)]
    task = find_task(references, ["billing", "sales"] * 3, (), QUEUE)
    assert task.kind == "labels and text"
    assert task.frame == Frame("Queue: ", "\nReply: number", ends=False)


def test_a_pattern_around_nothing_but_the_label_leaves_a_label_task() -> None:
    references = ["Queue: billing.", "Queue: sales."] * 3
    task = find_task(references, ["billing", "sales"] * 3, (), QUEUE)
    assert task.kind == "labels"
    assert task.frame is not None
    assert task.frame.around("sales") == "Queue: sales."


def test_answers_that_do_not_repeat_are_answers() -> None:
    references = [f"It follows that the answer is {k}" for k in range(5)]
    assert find_task(references, list("01234"), (), r"is (\d+)").kind == "answers and text"


def test_the_frame_keeps_what_nearly_all_rows_have() -> None:
    assert frame_of([" a"] * 9 + ["b"], None) == Frame(" ", "", True)
    assert frame_of(["first a", "b", "in c"], r"\w$") is None
    # nothing that all share follows the label, so nothing would close it
    assert frame_of(["Queue: a, yes", "Queue: b. no", "Queue: c!"], QUEUE) is None


def test_the_frame_stands_around_the_last_match_without_its_quotes() -> None:
    assert frame_of(['no "a" but "b"!'] * 2, r"(\"\w\")") == Frame('no "a" but "', '"!', True)


def test_rows_without_completion_are_named() -> None:
    rows = [
        PromptCompletion(prompt="p", completion="c", source=Source("a.jsonl", 1)),
        Comparison(
            prompt=(user("p"),), chosen=(assistant("x"),), rejected=(assistant("y"),), source=Source("a.jsonl", 2)
        ),
        Conversation(messages=(user("only a question"),), source=Source("a.jsonl", 3)),
    ]
    with pytest.raises(
        DataError, match=r"2 of 3 rows(.|\n)*a\.jsonl:2: Comparison(.|\n)*a\.jsonl:3: no assistant turn"
    ):
        answered(rows)
    with pytest.raises(DataError, match="no rows"):
        answered([])


def test_a_conversation_ends_with_its_reference_whatever_its_training_weight() -> None:
    turns = (user("a"), Message("assistant", "b", weight=0), user("thanks"))
    (row,) = answered([Conversation(messages=turns)])
    assert isinstance(row, Conversation)
    assert row.messages == (user("a"), assistant("b"))


def test_references_that_the_pattern_does_not_match_are_named() -> None:
    rows = [PromptCompletion(prompt="p", completion="Queue sales", source=Source("a.jsonl", 7))]
    with pytest.raises(DataError, match=r"1 of 1 references: a\.jsonl:7") as caught:
        answers_of(rows, ["Queue sales"], QUEUE)
    assert "Queue sales" in (caught.value.hint or "")


def test_known_completions_without_match_are_counted() -> None:
    assert known_answers(["Queue: sales\nHi", "Hello"], QUEUE) == (["sales"], 1)
    assert known_answers([" sales "], None) == (["sales"], 0)
