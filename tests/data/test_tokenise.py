"""Many rows tokenised, kept and read back are the examples that one row after the other gives."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_readers import CASES

from tailor.data.columns import Columns, Numbers
from tailor.data.examples import Bundle, Example, Rendering
from tailor.data.readers import read_records
from tailor.data.record_store import StoredRecords
from tailor.data.records import Comparison, Conversation, Record, Source
from tailor.data.token_store import TokenStore, join_pieces, pack_piece
from tailor.data.tokenise import tokenise
from tailor.errors import DataError
from tailor.objectives.sft import SFT
from tailor.text.messages import system
from tailor.text.render import PlainRenderer, make_renderer
from tailor.text.tokenizer import VIRTUAL
from tiny_models import CHAT_TEMPLATE, tiny_tokenizer

RENDERING = Rendering(make_renderer(tiny_tokenizer()), 400, prefix_ids=(VIRTUAL, VIRTUAL + 1))
SFT_ROWS = ("prompt_completion", "trl_prompt_completion", "openai_chat", "alpaca", "sharegpt")
MADE_BY = ["sft"]


def examples(record: Record, rendering: Rendering) -> Sequence[Example]:
    return SFT().examples(record, rendering)


def pair(record: Record, rendering: Rendering) -> Sequence[Example]:
    """Two sequences per row, with columns and a value, as an objective that compares answers makes them."""
    assert isinstance(record, Comparison)
    sides = [
        rendering.example(Conversation((*record.prompt, *side), source=record.source))
        for side in (record.chosen, record.rejected)
    ]
    return [
        replace(
            side,
            group=record.source.line,
            columns={"reference": [-0.1 * k for k in range(len(side.token_ids))]},
            values={"margin": record.margin + k},
        )
        for k, side in enumerate(sides)
        if side is not None
    ]


def rows_of(path: Path, rows: Sequence[dict[str, Any]], **options: Any) -> StoredRecords:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_records(path, **options).records
    assert isinstance(records, StoredRecords)
    return records


def questions(num: int) -> list[dict[str, str]]:
    return [{"prompt": f"question {k} " + "why " * (k % 5), "completion": f"answer {k % 3}"} for k in range(num)]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize("name", SFT_ROWS)
def test_rows_of_every_format(name: str, kept: bool, few_are_many: int, tmp_path: Path, own_home: Path) -> None:
    rows = [row for case, row, _ in CASES if case == name] * few_are_many
    records = rows_of(tmp_path / "rows.jsonl", rows, format=name)
    expected = [tuple(examples(record, RENDERING)) for record in records]
    for _ in range(2):  # made, then found in the cache
        bundles, dropped = tokenise(records, examples, RENDERING, made_by=MADE_BY if kept else None)
        assert isinstance(bundles, TokenStore)
        assert list(bundles) == expected
        assert len(dropped) == 0
    assert (own_home / "cache" / "tokens").exists() == kept
    assert bundles.num_tokens == sum(len(example.token_ids) for (example,) in expected)


@pytest.mark.usefixtures("few_are_many")
def test_sequences_that_are_compared_keep_their_group_columns_and_values(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{k}", "chosen": "good " * (k + 1), "rejected": "bad", "margin": k / 3} for k in range(20)
    ]  # chosen and rejected differ in length
    records = rows_of(tmp_path / "rows.jsonl", rows)
    for _ in range(2):
        bundles, _ = tokenise(records, pair, RENDERING, made_by=["pair"])
        assert list(bundles) == [tuple(pair(record, RENDERING)) for record in records]
    assert {len(bundle) for bundle in bundles} == {2}
    assert bundles[7][1].values == {"margin": 7 / 3 + 1}
    assert bundles[3:5] == [bundles[3], bundles[4]]
    assert bundles[-1] == bundles[19]
    with pytest.raises(IndexError):
        bundles[20]


@pytest.mark.usefixtures("few_are_many")
def test_rows_that_are_dropped_are_named(tmp_path: Path) -> None:
    rows = questions(30)
    for k in (0, 11, 12, 29):
        rows[k]["prompt"] = "long " * 400
    records = rows_of(tmp_path / "rows.jsonl", rows)
    rendering = replace(RENDERING, truncation="drop")
    for _ in range(2):
        bundles, dropped = tokenise(records, examples, rendering, made_by=MADE_BY)
        assert isinstance(dropped, StoredRecords)
        assert [record.source.line for record in dropped] == [1, 12, 13, 30]
        assert [example.source.line for (example,) in bundles] == [k for k in range(2, 30) if k not in (12, 13)]
    few, out = tokenise(list(records), examples, rendering)
    assert (few, out) == (list(bundles), list(dropped))
    nothing, all_of_them = tokenise(records, examples, replace(rendering, max_seq_len=4), made_by=MADE_BY)
    assert (len(nothing), list(all_of_them)) == (0, list(records))


@pytest.mark.usefixtures("few_are_many")
def test_the_first_row_that_cannot_be_rendered_is_named(tmp_path: Path, own_home: Path) -> None:
    rows = questions(30)
    rows[20]["completion"] = rows[25]["completion"] = "a<|end|>b"
    records = rows_of(tmp_path / "rows.jsonl", rows)
    for made_by in (MADE_BY, None):
        with pytest.raises(DataError, match=rf"^{tmp_path}/rows.jsonl:21: the assistant text holds the special token"):
            tokenise(records, examples, RENDERING, made_by=made_by)
    assert list((own_home / "cache" / "tokens").iterdir()) == []


@pytest.mark.usefixtures("few_are_many")
def test_everything_that_ids_depend_on_has_a_part_in_the_key(tmp_path: Path, own_home: Path) -> None:
    records = rows_of(tmp_path / "rows.jsonl", questions(30))
    other = tiny_tokenizer(template=CHAT_TEMPLATE.replace("<|end|>{% endfor %}", "<|end|>\n{% endfor %}"))
    renderings = [
        RENDERING,
        replace(RENDERING, max_seq_len=399),
        replace(RENDERING, prefix_ids=(VIRTUAL,)),
        replace(RENDERING, trained_turns="last"),
        replace(RENDERING, truncation="drop"),
        replace(RENDERING, renderer=PlainRenderer(tiny_tokenizer())),
        replace(RENDERING, renderer=make_renderer(other)),
        replace(RENDERING, renderer=make_renderer(tiny_tokenizer(leading_bos=True))),
    ]

    def made(chosen: Sequence[Record], rendering: Rendering, made_by: Sequence[str]) -> Sequence[Bundle]:
        bundles, _ = tokenise(chosen, examples, rendering, made_by=made_by)
        assert list(bundles) == [tuple(examples(record, rendering)) for record in chosen]
        return bundles

    for rendering in renderings:
        made(records, rendering, MADE_BY)
    shown = replace(RENDERING, compose=lambda turns: (system("Be short."), *turns))
    made(records, shown, ["sft", "prompting: Be short."])
    made(records[1:], RENDERING, MADE_BY)
    made(records[:-1], RENDERING, MADE_BY)
    kept = list((own_home / "cache" / "tokens").iterdir())
    assert len(kept) == len(renderings) + 3
    times = {entry: (entry / "columns.json").stat().st_mtime_ns for entry in kept}
    made(read_records(tmp_path / "rows.jsonl").records, RENDERING, MADE_BY)
    assert times == {entry: (entry / "columns.json").stat().st_mtime_ns for entry in kept}


@pytest.mark.usefixtures("few_are_many")
def test_a_damaged_store_is_made_again(tmp_path: Path, own_home: Path) -> None:
    records = rows_of(tmp_path / "rows.jsonl", questions(30))
    expected = list(tokenise(records, examples, RENDERING, made_by=MADE_BY)[0])
    (folder,) = (own_home / "cache" / "tokens").iterdir()
    ids = folder / "token_ids"
    for content in (ids.read_bytes()[:-4], b"\x01" * ids.stat().st_size, None):
        ids.write_bytes(content) if content is not None else ids.unlink()
        assert list(tokenise(records, examples, RENDERING, made_by=MADE_BY)[0]) == expected
        assert [entry.name for entry in (own_home / "cache" / "tokens").iterdir()] == [folder.name]


@pytest.mark.usefixtures("few_are_many")
def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    records = rows_of(tmp_path / "rows.jsonl", questions(10))
    tokenise(records, examples, RENDERING, progress=lambda *args: told.append(args))
    assert told == [
        ("tokenise rows", 3, 10),
        ("tokenise rows", 6, 10),
        ("tokenise rows", 9, 10),
        ("tokenise rows", 10, 10),
    ]


IDS = st.integers(0, 2**31 - 1)


@st.composite
def bundles_of(draw: st.DrawFn) -> list[Bundle]:
    """Any bundles with the same columns and values, empty ones and empty sequences among them."""
    columns = draw(st.lists(st.sampled_from(["logprobs", "advantages"]), unique=True))
    values = draw(st.lists(st.sampled_from(["margin", "label"]), unique=True))
    number = st.floats(allow_nan=False)

    def example() -> Example:
        ids = draw(st.lists(IDS, max_size=5))
        size = len(ids)
        return Example(
            ids,
            draw(st.lists(st.integers(0, 1), min_size=size, max_size=size)),
            draw(st.integers(-1, 9)),
            {name: draw(st.lists(number, min_size=size, max_size=size)) for name in columns},
            {name: draw(number) for name in values},
            Source("rows.jsonl", draw(st.integers(0, 2**32 - 1))),
        )

    return [tuple(example() for _ in range(draw(st.integers(0, 3)))) for _ in range(draw(st.integers(1, 6)))]


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=60)
@given(bundles=bundles_of(), cut=st.integers(1, 4))
def test_packing_any_bundles_in_any_pieces(bundles: list[Bundle], cut: int) -> None:
    parts: dict[str, list[Numbers]] = {}
    pieces = [pack_piece(bundles[start : start + cut]) for start in range(0, len(bundles), cut)]
    join_pieces(pieces, lambda name, numbers: parts.setdefault(name, []).append(numbers))
    store = TokenStore(Columns({name: np.concatenate(part) for name, part in parts.items()}, {}), "rows.jsonl")
    assert list(store) == [bundle for bundle in bundles if bundle]
    assert store.dropped.tolist() == [k for k, bundle in enumerate(bundles) if not bundle]


def test_few_rows_stay_in_memory(tmp_path: Path, own_home: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in questions(50)))
    bundles, dropped = tokenise(read_records(path).records, examples, RENDERING, made_by=MADE_BY)
    assert isinstance(bundles, list)
    assert (len(bundles), dropped) == (50, [])
    assert not (own_home / "cache").exists()
