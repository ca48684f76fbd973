"""Task templates: markers, splits, fields, loss and truncation, with the tokens written out by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tailor.data.dataset import DataSettings, ReadSettings, load_dataset, read
from tailor.data.examples import Rendering
from tailor.data.prompts import question_of, read_prompts
from tailor.data.records import PromptCompletion, Source, prompt_of
from tailor.data.rows import BadRowsError
from tailor.errors import ConfigError, DataError, NotFoundError
from tailor.inference.backend import Request, SamplingParams
from tailor.inference.local import LocalBackend
from tailor.techniques.p_tuning import PTuning
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.techniques.prompting import Prompting
from tailor.techniques.soft_prompt import SoftPrompt, templates_of
from tailor.text.messages import Message, assistant, system, user
from tailor.text.render import make_renderer
from tailor.text.template import Template
from tailor.text.tokenizer import VIRTUAL
from tiny_models import tiny_base, tiny_tokenizer

SQUAD = "<|VIRTUAL_PROMPT_0|> Context: {context} <|VIRTUAL_PROMPT_1|> Question: {question} Answer:{answer}"
NEMO = {
    "taskname": "squad",
    "prompt_template": SQUAD,
    "total_virtual_tokens": 5,
    "virtual_token_splits": [3, 2],
    "truncate_field": "context",
    "answer_only_loss": True,
    "answer_field": "answer",
}
ROW = {"taskname": "squad", "context": "The fox jumps.", "question": "Who jumps?", "answer": "the fox"}
PLAIN = tiny_tokenizer(chat=False)
CHAT = tiny_tokenizer()
V = VIRTUAL


def nemo(**changes: Any) -> dict[str, Any]:
    return {key: value for key, value in {**NEMO, **changes}.items() if value is not None}


def tuning(**changes: Any) -> PromptTuning:
    return PromptTuning(template=nemo(**changes))


def rendering(technique: SoftPrompt, chat: bool = False, **settings: Any) -> Rendering:
    """As `Base.rendering` gives it, without a base."""
    slot = tiny_base().host.attach([technique])
    tokenizer = CHAT if chat else PLAIN
    return replace(Rendering(make_renderer(tokenizer), 200, tasks=slot.prompts), **settings)


def rows(tmp_path: Path, *lines: Mapping[str, Any], name: str = "rows.jsonl") -> str:
    path = tmp_path / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def record(tmp_path: Path, technique: SoftPrompt, row: Mapping[str, Any] = ROW) -> Any:
    path = rows(tmp_path, row)
    return read(path, ReadSettings(), templates=templates_of([technique]), training=True).records[0]


# ------------------------------------------------------------------------------------------------ settings


def test_a_nemo_task_template_is_taken_as_it_stands() -> None:
    technique = tuning()
    assert (technique.task, technique.num_virtual_tokens) == ("squad", 5)
    assert technique.template == Template(
        prompt_template=SQUAD, virtual_token_splits=(3, 2), truncate_field="context", answer_field="answer"
    )
    again = PromptTuning(**technique.model_dump(mode="json"))
    assert again == technique
    pasted: Any = {k: v for k, v in NEMO.items() if k != "total_virtual_tokens"}
    assert PTuning(template=pasted).num_virtual_tokens == 5, "the splits alone say how many"


def test_a_text_is_a_template() -> None:
    short: Any = "<|VIRTUAL_PROMPT_0|>{prompt}"
    technique = PromptTuning(template=short, num_virtual_tokens=4)
    assert technique.template == Template(prompt_template=short)
    assert technique.template is not None
    assert not technique.template.is_free


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"virtual_token_splits": [3, 3]}, r"virtual_token_splits 3 \+ 3 = 6, but num_virtual_tokens is 5"),
        ({"virtual_token_splits": [5]}, r"virtual_token_splits has 1 numbers \(5\) for 2 markers"),
        ({"virtual_token_splits": [5, 0]}, "needs one for each, at least 1"),
        ({"virtual_token_splits": None}, "2 markers: virtual_token_splits must say how many tokens stand at each"),
        ({"prompt_template": SQUAD.replace("PROMPT_1", "PROMPT_2")}, "numbered 0 to 1, each standing once"),
        ({"prompt_template": SQUAD.replace("PROMPT_1", "PROMPT_0")}, "numbered 0 to 1, each standing once"),
        ({"prompt_template": SQUAD.replace("PROMPT_1|", "PROMPT|")}, r"is no marker: write <\|VIRTUAL_PROMPT_0\|>"),
        ({"prompt_template": SQUAD.replace("PROMPT_1|", "PROMPT_01|")}, r"'<\|VIRTUAL_PROMPT_01\|>' is no marker"),
        ({"prompt_template": "{context} {question} {answer}"}, "has no marker"),
        ({"prompt_template": SQUAD + "."}, r"the answer \{answer\} must stand once, as the last thing"),
        ({"prompt_template": SQUAD.replace("Context:", "{answer}")}, "must stand once, as the last thing"),
        ({"answer_field": "answr"}, "answer_field 'answr' is not in the template; did you mean 'answer'"),
        ({"truncate_field": "answer"}, "the answer is never cut"),
        ({"truncate_field": "contxt"}, "truncate_field 'contxt' is not in the template; did you mean 'context'"),
        ({"total_virtual_tokens": 6}, "but num_virtual_tokens is 6"),
        ({"prompt_template": "<|VIRTUAL_PROMPT_0|><|VIRTUAL_PROMPT_1|>{answer}"}, "no field that asks something"),
    ],
)
def test_what_nemo_asserts_is_said(changes: dict[str, Any], told: str) -> None:
    if "{context}" not in str(changes.get("prompt_template", SQUAD)):
        changes["truncate_field"] = None
    with pytest.raises(ConfigError, match=told):
        tuning(**changes)


def test_two_ways_to_say_one_thing_must_agree() -> None:
    with pytest.raises(ConfigError, match="task is 'boolq', but the template's taskname is 'squad'"):
        PromptTuning(task="boolq", template=nemo())
    assert PromptTuning(task="squad", num_virtual_tokens=5, template=nemo()) == tuning()


# ------------------------------------------------------------------------------------------------ tokens


def test_markers_cut_the_text_of_a_plain_base(tmp_path: Path) -> None:
    shown = rendering(tuning())
    example = shown.example(record(tmp_path, tuning()))
    assert example is not None
    prompt = [V, V + 1, V + 2, *PLAIN.encode(" Context: The fox jumps. "), V + 3, V + 4]
    prompt += PLAIN.encode(" Question: Who jumps? Answer:", continues=True)
    answer = [*PLAIN.encode("the fox", continues=True), PLAIN.eos_id]
    assert list(example.token_ids) == [*prompt, *answer]
    assert list(example.loss_mask) == [0] * len(prompt) + [1] * len(answer)


def test_the_chat_template_stands_around_the_text(tmp_path: Path) -> None:
    example = rendering(tuning(), chat=True).example(record(tmp_path, tuning()))
    assert example is not None
    opening = CHAT.encode("<|bos|><|user|>")
    middle = CHAT.encode(" Context: The fox jumps. ", continues=True)
    last = CHAT.encode(" Question: Who jumps? Answer:<|end|><|assistant|>", continues=True)
    answer = CHAT.encode("the fox<|end|>", continues=True)
    prompt = [*opening, V, V + 1, V + 2, *middle, V + 3, V + 4, *last]
    assert list(example.token_ids) == [*prompt, *answer]
    assert list(example.loss_mask) == [0] * len(prompt) + [1] * len(answer)


def test_splits_belong_to_numbers_not_to_places() -> None:
    text = "a<|VIRTUAL_PROMPT_1|>b {prompt}<|VIRTUAL_PROMPT_0|>"
    technique = PromptTuning(template={"prompt_template": text, "virtual_token_splits": (1, 3)})  # type: ignore[arg-type]
    ids = rendering(technique).prompt((user("c"),))
    assert ids == [*PLAIN.encode("a"), V + 1, V + 2, V + 3, *PLAIN.encode("b c", continues=True), V]


def test_all_words_may_be_learned_in_training_and_only_there(tmp_path: Path) -> None:
    technique = tuning(answer_only_loss=False)
    row = record(tmp_path, technique)
    trained = rendering(technique, training=True).example(row)
    asked = rendering(technique).example(row)
    assert trained is not None
    assert asked is not None
    assert list(trained.loss_mask) == [int(token < V) for token in trained.token_ids]
    assert sum(asked.loss_mask) == len(PLAIN.encode("the fox", continues=True)) + 1


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("text", ["<|VIRTUAL_PROMPT_0|>{prompt}", "It is {prompt}.<|VIRTUAL_PROMPT_0|>{completion}"])
def test_the_plain_shape_needs_no_fields(text: str, chat: bool) -> None:
    technique = PromptTuning(num_virtual_tokens=2, template=text)  # type: ignore[arg-type]
    shown = rendering(technique, chat)
    example = shown.example(PromptCompletion("a fox", "yes"))
    assert example is not None
    prompt = shown.prompt((user("a fox"),))
    assert list(example.token_ids[: len(prompt)]) == prompt
    assert [token for token in prompt if token >= V] == [V, V + 1]
    if chat and text.startswith("It"):
        asked = [*CHAT.encode("<|bos|><|user|>"), *CHAT.encode("It is a fox.", continues=True), V, V + 1]
        assert prompt == [*asked, *CHAT.encode("<|end|><|assistant|>", continues=True)]


@pytest.mark.parametrize("chat", [False, True])
def test_what_is_trained_is_what_is_served(tmp_path: Path, chat: bool) -> None:
    """The ids of a row, of a message with its fields, and of the same fields as JSON in a request."""
    shown = rendering(tuning(), chat)
    row = record(tmp_path, tuning())
    example = shown.example(row)
    assert example is not None
    first = list(example.loss_mask).index(1)
    asked = {key: ROW[key] for key in ("question", "context")}
    for turns in (prompt_of(row), (user(json.dumps(asked)),), (user(json.dumps({"taskname": "squad", **asked})),)):
        assert shown.prompt(turns) == list(example.token_ids[:first])
    assert row.prompt == "Context: The fox jumps.  Question: Who jumps? Answer:", "what people see has no markers"


def test_earlier_turns_and_prompting_stay_around_the_template() -> None:
    technique = PromptTuning(num_virtual_tokens=1, template="<|VIRTUAL_PROMPT_0|>{prompt}")  # type: ignore[arg-type]
    slot = tiny_base().host.attach([Prompting(system="Be quick.", template="Q: {prompt}", shots=0), technique])
    shown = Rendering(make_renderer(CHAT), 200, compose=slot.compose, tasks=slot.prompts)
    ids = shown.prompt((user("a"), assistant("b"), user("c")))
    before = CHAT.encode("<|bos|><|system|>Be quick.<|end|><|user|>a<|end|><|assistant|>")
    before += CHAT.encode("b<|end|>") + CHAT.encode("<|user|>")
    assert ids == [*before, V, *CHAT.encode("Q: c<|end|><|assistant|>")]
    with pytest.raises(ConfigError, match=r"a template beside it can only ask for \{prompt\}"):
        replace(rendering(tuning()), compose=slot.compose)


# ------------------------------------------------------------------------------------------------ texts of people


@pytest.mark.parametrize("field", ["context", "question", "answer"])
def test_a_marker_in_a_row_is_an_error(tmp_path: Path, field: str) -> None:
    row = record(tmp_path, tuning(), {**ROW, field: "one <|VIRTUAL_PROMPT_0|> two"})
    with pytest.raises(
        DataError, match=r"rows.jsonl:1: .*'<\|VIRTUAL_PROMPT_0\|>', which only a template may"
    ) as error:
        rendering(tuning()).example(row)
    assert ("assistant text" if field == "answer" else "user text") in error.value.message


def test_a_marker_in_a_request_is_an_error_and_plain_text_elsewhere() -> None:
    shown = rendering(PromptTuning(num_virtual_tokens=2, template="<|VIRTUAL_PROMPT_0|>{prompt}"))  # type: ignore[arg-type]
    for turns in ((user("<|VIRTUAL_PROMPT_7|>"),), (system("<|VIRTUAL_PROMPT_0|>"), user("hi"))):
        with pytest.raises(DataError, match="which only a template may"):
            shown.prompt(turns)
    lead = rendering(PromptTuning(num_virtual_tokens=2))
    assert lead.prompt((user("<|VIRTUAL_PROMPT_0|>"),)) == [V, V + 1, *PLAIN.encode("<|VIRTUAL_PROMPT_0|>")]


def test_a_marker_put_together_from_pieces_is_no_marker() -> None:
    shown = rendering(PromptTuning(num_virtual_tokens=2, template="<|VIRTUAL_PROMPT_0|> <|VIRTUAL{prompt}"))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="markers"):
        shown.prompt((user("_PROMPT_0|>"),))


def test_braces_of_a_text_are_its_own(tmp_path: Path) -> None:
    row = record(tmp_path, tuning(), {**ROW, "context": "{question} {answer}", "question": "{context}?"})
    ids = rendering(tuning()).prompt(prompt_of(row))
    assert "Context: {question} {answer} " in PLAIN.decode(ids)
    assert "Question: {context}? " in PLAIN.decode(ids)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("who jumps?", "no JSON object of texts"),
        ('{"context": 3, "question": "q"}', "no JSON object of texts"),
        ('{"context": "c"}', "field 'question' is missing"),
        ('{"context": "c", "question": "q", "answr": "a"}', "the template has no field 'answr'"),
    ],
)
def test_a_request_must_give_the_fields(text: str, told: str) -> None:
    with pytest.raises(DataError, match=told):
        rendering(tuning()).prompt((user(text),))


# ------------------------------------------------------------------------------------------------ length


def test_the_named_field_is_cut_at_its_end(tmp_path: Path) -> None:
    long = " ".join(["The fox jumps over the dog."] * 20)
    technique = tuning()
    row = record(tmp_path, technique, {**ROW, "context": long})
    shown = rendering(technique, max_seq_len=60)
    example = shown.example(row)
    assert example is not None
    assert 55 <= len(example.token_ids) <= 60
    text = PLAIN.decode(example.token_ids)
    kept = text.split("Context: ")[1].split("  Question")[0]
    assert kept
    assert long.startswith(kept)
    assert text.endswith("  Question: Who jumps? Answer:the fox<|eos|>")
    assert sorted(token for token in example.token_ids if token >= V) == [V, V + 1, V + 2, V + 3, V + 4]
    assert len(shown.prompt(prompt_of(row), reserve=20)) <= 40, "a request leaves room for its answer"


def test_without_a_field_to_cut_a_long_row_is_an_error(tmp_path: Path) -> None:
    technique = tuning(truncate_field=None)
    row = record(tmp_path, technique, {**ROW, "context": "fox " * 100})
    with pytest.raises(DataError, match=r"rows.jsonl:1: \d+ tokens, but at most 60 fit") as error:
        rendering(technique, max_seq_len=60).example(row)
    assert "truncate_field" in str(error.value.hint)
    assert rendering(technique, max_seq_len=60, truncation="drop").example(row) is None
    with pytest.raises(ConfigError, match="would cut virtual tokens out of a template"):
        rendering(technique, truncation="prompt")
    cut = record(tmp_path, tuning(), {**ROW, "question": "fox " * 100})
    with pytest.raises(DataError, match="at most 60 fit"):
        rendering(tuning(), max_seq_len=60).example(cut)


# ------------------------------------------------------------------------------------------------ rows


def test_rows_are_read_by_the_template(tmp_path: Path) -> None:
    found = record(tmp_path, tuning())
    assert isinstance(found, PromptCompletion)
    assert found.completion == "the fox"
    assert dict(found.fields) == {key: ROW[key] for key in ("taskname", "context", "question")}
    assert found.source == Source(str(tmp_path / "rows.jsonl"), 1)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({k: v for k, v in ROW.items() if k != "question"}, ":1: field 'question' is missing"),
        ({**ROW, "questoin": "x"}, ":1: field 'questoin' has no place in the template; did you mean 'question'"),
        ({**ROW, "answer": ""}, ":1: field 'answer' is empty"),
        ({**ROW, "answer": 3}, r":1: field 'answer' is a number \(3\), it must be text"),
        ({**ROW, "taskname": "sqaud"}, ":1: there is no task 'sqaud' here; did you mean 'squad'"),
    ],
)
def test_bad_rows_are_told_with_their_place(tmp_path: Path, row: dict[str, Any], told: str) -> None:
    with pytest.raises(BadRowsError, match=told):
        record(tmp_path, tuning(), row)


def test_evaluation_takes_rows_with_more_columns_and_prompts_without_answers(tmp_path: Path) -> None:
    templates = templates_of([tuning()])
    path = rows(tmp_path, {**ROW, "id": "7"})
    reading = read(path, ReadSettings(), templates=templates)
    assert reading.records[0].meta == {"id": "7"}
    asked = rows(tmp_path, {k: v for k, v in ROW.items() if k != "answer"}, name="asked.jsonl")
    (only,) = read_prompts(asked, templates=templates).records
    assert dict(question_of(only)[0].fields)["question"] == "Who jumps?"


def test_tasks_of_one_file_are_told_apart_row_by_row(tmp_path: Path) -> None:
    mood = PromptTuning(task="mood", num_virtual_tokens=3)
    path = rows(tmp_path, ROW, {"taskname": "mood", "prompt": "so glad", "completion": "good"})
    templates = templates_of([tuning(), mood])
    records = read(path, ReadSettings(), templates=templates).records
    slot = tiny_base().host.attach([tuning(), mood])
    shown = Rendering(make_renderer(PLAIN), 200, tasks=slot.prompts)
    examples = [shown.example(row) for row in records]
    assert all(examples)
    virtual = [[t - V for t in e.token_ids if t >= V] for e in examples if e is not None]
    assert virtual == [[0, 1, 2, 3, 4], [5, 6, 7]]
    assert shown.prompt((user("so glad"),)[:0] + prompt_of(records[1])) == [
        V + 5,
        V + 6,
        V + 7,
        *PLAIN.encode("so glad"),
    ]
    with pytest.raises(BadRowsError, match=":1: there is no task 'modo' here; did you mean 'mood'"):
        read(rows(tmp_path, {**ROW, "taskname": "modo"}), ReadSettings(), templates=templates)


def test_the_task_of_a_request() -> None:
    slot = tiny_base().host.attach(
        [PromptTuning(task="mood", num_virtual_tokens=3), PromptTuning(task="topic", num_virtual_tokens=2)]
    )
    both = Rendering(make_renderer(PLAIN), 200, tasks=slot.prompts)
    assert replace(both, task="topic").prompt((user("x"),))[:2] == [V + 3, V + 4]
    named = (Message("user", "x", fields=(("taskname", "topic"),)),)
    assert both.prompt(named) == replace(both, task="topic").prompt((user("x"),))
    with pytest.raises(DataError, match=r"several tasks \(mood, topic\), and nothing says which"):
        both.prompt((user("x"),))
    with pytest.raises(NotFoundError, match="there is no task 'topci'") as error:
        replace(both, task="topci").prompt((user("x"),))
    assert "did you mean 'topic'" in str(error.value.hint)
    with pytest.raises(NotFoundError, match="no tasks by name"):
        replace(rendering(PromptTuning()), task="mood").prompt((user("x"),))


def test_many_rows_are_kept_apart_by_template(tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The caches of rows on disk know the template: another one over the same file reads it anew."""
    monkeypatch.setattr("tailor.data.readers.MANY_ROWS", 3)
    path = rows(tmp_path, *({**ROW, "question": f"Who {k}?"} for k in range(12)))
    found = {}
    for word in ("Question", "Q"):
        technique = tuning(prompt_template=SQUAD.replace("Question", word))
        for _ in range(2):
            dataset = load_dataset(DataSettings(train=path), 0, templates=templates_of([technique]))
            found[word] = {str(record.prompt) for record in dataset.train}  # type: ignore[attr-defined]
    assert len(found["Q"]) == len(found["Question"]) >= 9
    assert all(" Q: Who" in prompt for prompt in found["Q"])
    assert all(" Question: Who" in prompt for prompt in found["Question"])


# ------------------------------------------------------------------------------------------------ on a base


def test_a_batch_mixes_tasks_and_plain_rows() -> None:
    base = tiny_base()
    short = PromptTuning(task="short", num_virtual_tokens=2)
    middle = PromptTuning(
        task="middle",
        template={
            "prompt_template": "a <|VIRTUAL_PROMPT_1|>{prompt}<|VIRTUAL_PROMPT_0|>",
            "virtual_token_splits": (4, 1),
        },  # type: ignore[arg-type]
    )
    backend = LocalBackend(base, {"table": base.host.attach([short, middle], seed=3)})
    wanted = SamplingParams(max_new_tokens=5)
    requests = [
        Request((user(text),), artifact, wanted, task=task)
        for text in ("the fox", "hello")
        for artifact, task in (("table", "middle"), (None, None), ("table", "short"))
    ]
    mixed = backend.generate(requests)
    for request, together in zip(requests, mixed, strict=True):
        alone = LocalBackend(base, backend.slots).generate([request])[0]
        assert alone.token_ids == together.token_ids
        assert alone.logprobs == pytest.approx(together.logprobs, abs=1e-5)
        scored = backend.logprobs([request], ["dog"])[0]
        assert scored.isfinite().all()
    assert len({completion.logprobs[0] for completion in mixed[:3]}) == 3, "each has tokens of its own"


def test_markers_are_refused_by_peft_by_name() -> None:
    assert PromptTuning(task="x").beyond_peft() is None
    assert "stand at 2 marker(s) of a template" in str(tuning().beyond_peft())
