from __future__ import annotations

import sys
from collections.abc import Sequence

import pytest

from tailor.data.records import Comparison, Conversation, PromptCompletion, Record
from tailor.errors import DataError, MissingDependencyError
from tailor.evaluation.baselines import BASELINES, majority, nearest_neighbour
from tailor.text.messages import Message, assistant, system, user

QUEUE = r"^Queue: (\w+)"
CLASSIFIER = "tf-idf + logistic regression"


def rows(*pairs: tuple[str, str]) -> list[Record]:
    return [PromptCompletion(prompt=prompt, completion=completion) for prompt, completion in pairs]


def asked(*texts: str) -> list[tuple[Message, ...]]:
    return [(user(text),) for text in texts]


def answers(name: str, train: Sequence[Record], *texts: str, pattern: str | None = None) -> list[str]:
    return BASELINES[name].answers(train, asked(*texts), pattern)


ANIMALS = rows(
    ("the dog barks loudly", "dog"),
    ("a cat sleeps on the sofa", "cat"),
    ("my dog chases a ball", "dog"),
    ("the cat drinks milk", "cat"),
    ("a dog barks at night", "dog"),
)
TICKETS = rows(
    ("I want to return the boots", "Queue: returns\nReply: Send the boots back."),
    ("the invoice for my tent is wrong", "Queue: billing\nReply: We correct the invoice."),
    ("please return my money for the jacket", "Queue: returns\nReply: The jacket is refunded."),
    ("an invoice is missing, send it again", "Queue: billing\nReply: Here is the invoice again."),
    ("the boots are too small, return them", "Queue: returns\nReply: We exchange the boots."),
)


def test_each_baseline_says_which_tasks_it_is_for() -> None:
    kinds = ("labels", "labels and text", "answers and text", "text")
    applies = {name: [baseline.applies(kind) for kind in kinds] for name, baseline in BASELINES.items()}  # type: ignore[arg-type]
    assert applies == {
        "majority": [True, True, False, False],
        "nearest neighbour": [True, True, True, True],
        CLASSIFIER: [True, True, False, False],
    }


def test_the_majority_answers_everything_alike_and_the_first_of_equals_wins() -> None:
    assert answers("majority", ANIMALS, "a cat", "") == ["dog", "dog"]
    assert answers("majority", rows(("x", "b"), ("y", "a"), ("z", "a"), ("w", "b")), "x") == ["b"]


def test_a_label_is_the_same_with_white_space_around_it() -> None:
    assert answers("majority", rows(("x", "b"), ("y", "a\n"), ("z", " a")), "y") == ["a\n"]


def test_the_nearest_neighbour_is_that_of_bm25() -> None:
    # "sofa" is in one prompt only, "barks" in two of which the shorter scores higher
    assert answers("nearest neighbour", ANIMALS, "who is on the SOFA?", "something barks", "zebra") == [
        "cat",
        "dog",
        "dog",
    ]
    prompts = [("alpha beta gamma", "first"), ("beta", "second"), ("alpha", "third")]
    assert answers("nearest neighbour", rows(*prompts), "beta", "gamma beta", "alpha") == ["second", "first", "third"]


def test_the_classifier_generalises_where_no_single_row_decides() -> None:
    assert answers(CLASSIFIER, ANIMALS, "a dog sleeps", "the cat chases milk") == ["dog", "cat"]
    assert answers(CLASSIFIER, ANIMALS) == []


def test_the_classifier_predicts_the_only_label_there_is() -> None:
    assert answers(CLASSIFIER, rows(("a", "yes"), ("b", "yes")), "c") == ["yes"]


def test_the_classifier_finds_the_labels_of_separable_rows_always_alike() -> None:
    words = {"red": "apple cherry", "green": "grass leaf", "blue": "sea sky"}
    train = rows(*[(f"{word} number {k}", color) for color, two in words.items() for k, word in enumerate(two.split())])
    texts = ["an apple", "green grass", "the deep sea", "a clear sky", "one leaf"]
    found = answers(CLASSIFIER, train, *texts)
    assert found == ["red", "green", "blue", "blue", "green"]
    assert answers(CLASSIFIER, train, *texts) == found


def test_few_rows_of_many_labels_are_no_reason_to_warn() -> None:
    train = rows(*[(f"word{k} thing", f"label {k}") for k in range(30)])
    assert answers(CLASSIFIER, train, "word7 thing") == ["label 7"]


def test_with_a_pattern_the_text_is_that_of_the_nearest_row_with_the_label() -> None:
    question = "an invoice for the boots, please return them"
    assert answers("majority", TICKETS, question, pattern=QUEUE) == ["Queue: returns\nReply: We exchange the boots."]
    found = answers(CLASSIFIER, TICKETS, "the invoice is missing", "return the jacket", pattern=QUEUE)
    assert found == [
        "Queue: billing\nReply: Here is the invoice again.",
        "Queue: returns\nReply: The jacket is refunded.",
    ]


def test_rows_in_which_the_pattern_finds_no_label_teach_no_label() -> None:
    broken = [*rows(*[("the boots", "I do not know")] * 9), *TICKETS]
    assert answers("majority", broken, "the boots", pattern=QUEUE)[0].startswith("Queue: returns")
    assert answers("nearest neighbour", broken, "the boots", pattern=QUEUE) == ["I do not know"]
    with pytest.raises(DataError, match="matches nothing in the 9 training rows"):
        answers("majority", broken[:9], "x", pattern=QUEUE)


def test_conversations_are_asked_by_all_their_turns() -> None:
    train: list[Record] = [
        Conversation(
            messages=(system("be brief"), user("about trains"), assistant("yes?"), user("go"), assistant("t"))
        ),
        Conversation(messages=(system("be brief"), user("about ships"), assistant("yes?"), user("go"), assistant("s"))),
    ]
    prompt = (user("ships"), assistant("yes?"), user("go"))
    assert nearest_neighbour(train, [prompt]) == ["s"]


def test_nothing_to_learn_from_is_said() -> None:
    with pytest.raises(DataError, match="needs training rows"):
        majority([], asked("x"))
    with pytest.raises(DataError, match="no completion"):
        nearest_neighbour([Comparison(prompt=(user("a"),), chosen=(assistant("b"),), rejected=(assistant("c"),))], [])
    with pytest.raises(DataError, match="hold no words"):
        answers(CLASSIFIER, rows(("?", "a"), ("!", "b")), "x")


def test_without_scikit_learn_only_the_classifier_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    assert answers("majority", ANIMALS, "x") == ["dog"]
    with pytest.raises(MissingDependencyError, match="sklearn") as error:
        answers(CLASSIFIER, ANIMALS, "x")
    assert "tailor-llm[eval]" in str(error.value.hint)
