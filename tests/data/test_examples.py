"""Record → Example: rewriting, truncation, and errors that name file and line."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tailor.data.examples import Example, Rendering, make_examples
from tailor.data.records import Conversation, Document, PromptCompletion, Source
from tailor.errors import DataError
from tailor.text.messages import Message, assistant, system, user
from tailor.text.render import make_renderer
from tailor.text.tokenizer import VIRTUAL
from tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
RENDERER = make_renderer(TOKENIZER)
PREFIX = (VIRTUAL, VIRTUAL + 1)


def rendering(**changes: Any) -> Rendering:
    return replace(Rendering(RENDERER, 100), **changes)


def with_system(turns: tuple[Message, ...]) -> tuple[Message, ...]:
    return (system("S"), *turns)


def row(prompt: str = "one two", completion: str = "three", line: int = 7) -> PromptCompletion:
    return PromptCompletion(prompt=prompt, completion=completion, source=Source("rows.jsonl", line))


def test_a_row_becomes_tokens_and_mask() -> None:
    example = rendering(prefix_ids=PREFIX).example(row())
    assert example is not None
    assert TOKENIZER.decode(example.token_ids) == "<|bos|><|user|>one two<|end|><|assistant|>three<|end|>"
    assert tuple(example.token_ids[:2]) == PREFIX
    counted = [t for t, m in zip(example.token_ids, example.loss_mask, strict=True) if m]
    assert TOKENIZER.decode(counted) == "three<|end|>"
    assert example.num_targets == len(counted)
    assert example.source == Source("rows.jsonl", 7)


def test_the_prompt_is_a_prefix_of_the_example() -> None:
    shown = rendering(prefix_ids=PREFIX, compose=lambda turns: (system("Be short."), *turns))
    example = shown.example(row())
    assert example is not None
    prompt = shown.prompt((user("one two"),))
    assert list(example.token_ids[: len(prompt)]) == prompt
    assert "Be short." in TOKENIZER.decode(prompt)


def test_the_first_token_never_counts() -> None:
    assert Example([1, 2, 3], [1, 1, 0]).num_targets == 1


def test_a_conversation_trains_all_answers_or_the_last() -> None:
    record = Conversation(messages=(user("U"), assistant("A"), user("V"), assistant("B")))
    for turns, text in (("all", "A<|end|>B<|end|>"), ("last", "B<|end|>")):
        example = rendering(trained_turns=turns).example(record)
        assert example is not None
        assert TOKENIZER.decode([t for t, m in zip(example.token_ids, example.loss_mask, strict=True) if m]) == text


def test_a_rewritten_conversation_trains_its_last_answer_only() -> None:
    """A prompting technique rewrites everything before the answer, so earlier answers are its text, not the row's."""
    record = Conversation(messages=(user("U"), assistant("A"), user("V"), assistant("B")))
    example = rendering(compose=with_system, trained_turns="last").example(record)
    assert example is not None
    assert TOKENIZER.decode(example.token_ids).startswith(
        "<|bos|><|system|>S<|end|><|user|>U<|end|><|assistant|>A<|end|>"
    )
    assert TOKENIZER.decode([t for t, m in zip(example.token_ids, example.loss_mask, strict=True) if m]) == "B<|end|>"


def test_several_answers_to_train_behind_a_rewritten_prompt_must_be_settled_by_name() -> None:
    turns = (user("U"), assistant("A"), user("V"), assistant("B"))
    with pytest.raises(DataError, match=r"^chat.jsonl:3: this row has several assistant turns to train") as caught:
        rendering(compose=with_system).example(Conversation(messages=turns, source=Source("chat.jsonl", 3)))
    assert "data.trained_turns: last" in str(caught.value.hint)
    # one answer, or one that counts: "all" and "last" are the same, so nothing has to be said
    context = Message("assistant", "A", weight=0)
    for messages in (turns[:2], (turns[0], context, *turns[2:])):
        record = Conversation(messages=messages)
        assert rendering(compose=with_system).example(record) == rendering(
            compose=with_system, trained_turns="last"
        ).example(record)


def length(record: PromptCompletion, **changes: Any) -> int:
    example = rendering(**changes).example(record)
    assert example is not None
    return len(example.token_ids)


def test_a_row_that_fits_exactly_is_left_alone() -> None:
    size = length(row())
    for truncation in ("error", "prompt", "drop"):
        example = rendering(max_seq_len=size, truncation=truncation).example(row())
        assert example == rendering().example(row())


def test_a_longer_row_is_an_error_unless_a_rule_is_named() -> None:
    size = length(row())
    with pytest.raises(DataError, match=rf"^rows.jsonl:7: {size} tokens, but at most {size - 1} fit") as caught:
        rendering(max_seq_len=size - 1).example(row())
    assert "data.truncation" in str(caught.value.hint)


def test_drop_leaves_the_row_out_and_says_which() -> None:
    short, long = row(line=1), row(prompt="many " * 50, line=2)
    examples, dropped = make_examples([short, long], rendering(truncation="drop"))
    assert [e.source.line for e in examples] == [1]
    assert dropped == [long]
    with pytest.raises(DataError, match="no row is left: all 1 are longer than 100 tokens"):
        make_examples([long], rendering(truncation="drop"))


@pytest.mark.parametrize("prefix_ids", [(), PREFIX])
def test_prompt_truncation_drops_the_oldest_prompt_tokens_after_the_first(prefix_ids: tuple[int, ...]) -> None:
    whole = rendering(prefix_ids=prefix_ids).example(row())
    assert whole is not None
    size, keep = len(whole.token_ids), len(prefix_ids) + 1
    room = list(whole.loss_mask).index(1) - keep
    for excess in range(1, room + 1):
        cut = rendering(prefix_ids=prefix_ids, max_seq_len=size - excess, truncation="prompt").example(row())
        assert cut is not None
        assert list(cut.token_ids) == [*whole.token_ids[:keep], *whole.token_ids[keep + excess :]]
        assert list(cut.loss_mask) == [*whole.loss_mask[:keep], *whole.loss_mask[keep + excess :]]
        assert cut.num_targets == whole.num_targets, "the completion stays whole"
    with pytest.raises(DataError, match="its completion alone does not fit"):
        rendering(prefix_ids=prefix_ids, max_seq_len=size - room - 1, truncation="prompt").example(row())


def test_errors_name_file_and_line() -> None:
    with pytest.raises(
        DataError, match=r"^rows.jsonl:7: the assistant text holds the special token '<.end.>'"
    ) as caught:
        rendering().example(row(completion="a<|end|>b"))
    assert "remove it" in str(caught.value.hint)
    silent = Conversation(messages=(user("U"), Message("assistant", "A", weight=0)), source=Source("chat.jsonl", 3))
    with pytest.raises(DataError, match=r"^chat.jsonl:3: every assistant turn has weight 0"):
        rendering().example(silent)


def test_a_document_has_no_completion() -> None:
    with pytest.raises(TypeError, match="Document has no single completion"):
        rendering().example(Document(text="x"))
