"""Which shots a prompt gets by similarity, and what a chain of thought with worked examples says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tailor.data.examples import Rendering
from tailor.data.records import PromptCompletion, Record
from tailor.errors import ConfigError
from tailor.inference.local import LocalBackend
from tailor.models.text_vectors import text_vectors
from tailor.techniques.prompting import STEP_BY_STEP, Prompting, Shot
from tailor.text.messages import user
from tiny_models import tiny_base

POOL = (
    Shot(prompt="where is my red bike", completion="1"),
    Shot(prompt="where is my red bike now", completion="2"),
    Shot(prompt="my bike is broken", completion="3"),
    Shot(prompt="send the invoice", completion="4"),
)


def chosen(technique: Prompting, prompt: str, embed: Any = None) -> list[str]:
    turns = technique.composer(embed)((user(prompt),))
    return [m.content for m in turns if m.role == "assistant"]


def test_nearest_stands_last() -> None:
    technique = Prompting(shots=2, selection="nearest", examples=POOL)
    assert chosen(technique, "my bike is broken again") == ["1", "3"]
    assert chosen(technique, "where is my red bike") == ["3", "2"]  # its own row is never a shot


def test_mmr_takes_the_second_of_two_twins_last() -> None:
    settings: dict[str, Any] = {"shots": 2, "selection": "mmr", "examples": POOL}
    prompt = "where is my red bike please"
    assert chosen(Prompting(**settings, relevance_weight=1.0), prompt) == chosen(
        Prompting(shots=2, selection="nearest", examples=POOL), prompt
    )
    assert set(chosen(Prompting(**settings, relevance_weight=0.3), prompt)) != {"1", "2"}
    assert chosen(Prompting(**settings, relevance_weight=0.3), prompt)[-1] == "1"


def by_length(texts: list[str]) -> Tensor:
    """Texts of the same number of words are alike."""
    rows = torch.tensor([[1.0, float(len(text.split()))] for text in texts])
    return torch.nn.functional.normalize(rows, dim=1)


def test_by_embedding() -> None:
    technique = Prompting(shots=1, selection="nearest", similarity="embedding", examples=POOL)
    assert chosen(technique, "one two three", by_length) == ["4"]
    assert chosen(technique, "a b c d e f g", by_length) == ["2"]
    with pytest.raises(ConfigError, match="need a base that embeds"):
        technique.compose((user("one"),))
    fixed = Prompting(shots=1, selection="fixed", similarity="embedding", examples=POOL)
    assert chosen(fixed, "one") == ["1"]  # similarity is not asked


def test_a_slot_embeds_with_its_own_base() -> None:
    base = tiny_base()
    slot = base.host.attach([Prompting(shots=2, selection="mmr", similarity="embedding", examples=POOL)])
    assert slot.compose is not None
    turns = slot.compose((user("my bike is broken again"),))
    backend = LocalBackend(base)
    prompts = [shot.prompt for shot in POOL]
    cosines = backend.embed(prompts) @ backend.embed(["my bike is broken again"])[0]
    assert turns[-2].content == POOL[int(cosines.argmax())].completion
    torch.testing.assert_close(text_vectors(base.host, base.renderer, prompts), backend.embed(prompts), rtol=0, atol=0)
    assert text_vectors(base.host, base.renderer, []).shape == (0, 32)
    rendering = base.rendering(slot)
    assert rendering.prompt((user("hello there"),)) == rendering.prompt((user("hello there"),))


def test_each_text_is_embedded_once() -> None:
    asked: list[str] = []

    def embed(texts: list[str]) -> Tensor:
        asked.extend(texts)
        return by_length(texts)

    compose = Prompting(shots=1, selection="nearest", similarity="embedding", examples=POOL).composer(embed)
    for _ in range(3):
        compose((user("what now"),))
    assert sorted(asked) == sorted([*(shot.prompt for shot in POOL), "what now"])


ROWS: list[Record] = [
    PromptCompletion(prompt="2 and 2?", completion="4", meta={"reasoning": "Two more than two is four."}),
    PromptCompletion(prompt="3 and 3?", completion="6"),
    PromptCompletion(prompt="1 and 4?", completion="5", meta={"rationale": "One is added to four."}),
    PromptCompletion(prompt="9 and 1?", completion="#### 10", meta={"reasoning": "Nine and one."}),
]


def test_chain_of_thought_shows_the_reasoning_of_rows_that_have_one() -> None:
    technique = Prompting(shots=3, selection="fixed", reasoning=True).prepare(ROWS, seed=0)
    turns = technique.compose((user("5 and 5?"),))
    assert [m.content for m in turns if m.role == "user"] == [
        f"{prompt}\n{STEP_BY_STEP}" for prompt in ("2 and 2?", "1 and 4?", "9 and 1?", "5 and 5?")
    ]
    assert [m.content for m in turns if m.role == "assistant"] == [
        "Two more than two is four.\nThe answer is 4",
        "One is added to four.\nThe answer is 5",
        "Nine and one.\n#### 10",  # says it in a way that the pattern reads
    ]
    assert technique.pattern is not None


def test_shots_without_reasoning_still_answer_where_it_is_looked_for() -> None:
    technique = Prompting(shots=4, selection="fixed", reasoning=True).prepare(ROWS, seed=0)
    answers = [m.content for m in technique.compose((user("?"),)) if m.role == "assistant"]
    assert answers[1] == "The answer is 6"
    plain = Prompting(shots=4, selection="fixed").prepare(ROWS, seed=0)
    assert [m.content for m in plain.compose((user("?"),)) if m.role == "assistant"] == ["4", "6", "5", "#### 10"]


def test_a_pattern_of_ones_own_decides_what_is_added() -> None:
    technique = Prompting(
        shots=1,
        reasoning=True,
        answer_pattern=r"^=(\d+)$",
        examples=(Shot(prompt="a", completion="=3", reasoning="b"),),
    )
    assert technique.compose((user("?"),))[1].content == "b\n=3"


def test_votes() -> None:
    assert Prompting(shots=0, votes=3).voting is not None
    assert Prompting(shots=0, system="x").voting is None
    slot = tiny_base().host.attach([Prompting(shots=0, votes=3, vote_temperature=0.5)])
    assert slot.votes is not None
    assert (slot.votes.num, slot.votes.temperature) == (3, 0.5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shots": 0}, "changes nothing"),
        ({"bootstrap": True}, "bootstrap is for the reasoning"),
        ({"selection": "near"}, "nearest"),
        ({"relevance_weight": 1.5}, "relevance_weight"),
    ],
)
def test_wrong_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Prompting(**settings)


def test_many_rows_are_rendered_by_processes_that_embed(few_are_many: int, tmp_path: Any) -> None:
    from tailor.data.formats import FORMATS
    from tailor.data.readers import read_rows
    from tailor.data.tokenise import tokenise

    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "thing {k}", "completion": "{k}"}}\n' for k in range(12)))
    records = read_rows(path, FORMATS).records
    base = tiny_base()
    technique = Prompting(shots=1, selection="nearest", similarity="embedding").prepare(list(records), 0)
    slot = base.host.attach([technique])
    rendering = base.rendering(slot, trained_turns="last")

    def make(record: Record, how: Rendering) -> list[Any]:
        found = how.example(record)
        return [found] if found is not None else []

    bundles, dropped = tokenise(records, make, rendering)
    assert not dropped
    alone = [rendering.example(record) for record in records]
    assert [list(bundle[0].token_ids) for bundle in bundles] == [list(e.token_ids) for e in alone if e is not None]
