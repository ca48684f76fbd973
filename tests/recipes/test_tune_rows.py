"""What `tune` takes from its rows: bundles, the note on dropped ones, and the label set."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailor.data.examples import Rendering
from tailor.data.readers import read_records
from tailor.data.records import PromptCompletion, Source
from tailor.data.token_store import TokenStore
from tailor.errors import DataError
from tailor.evaluation.task import MAX_LABELS, find_task
from tailor.objectives.sft import SFT
from tailor.recipes.tune_prepare import bundles_of, dropped_note
from tailor.recipes.tune_save import labels_of
from tailor.techniques.prompting import Prompting
from tailor.text.render import make_renderer
from tiny_models import tiny_tokenizer

RENDERING = Rendering(make_renderer(tiny_tokenizer()), 100, truncation="drop")


def rows(completions: list[str]) -> list[PromptCompletion]:
    return [PromptCompletion(f"q{k}", text, source=Source("rows.jsonl", k + 1)) for k, text in enumerate(completions)]


@given(st.lists(st.sampled_from(["a", "b", "c ", "", "d\ne", "long " * 20]), min_size=1, max_size=12))
def test_the_label_set_is_that_of_all_completions(completions: list[str]) -> None:
    task = find_task(completions, completions)
    assert labels_of(rows(completions)) == (list(task.labels) if task.kind == "labels" else None)


@pytest.mark.parametrize("num_labels", [1, 2, MAX_LABELS, MAX_LABELS + 1])
@pytest.mark.parametrize("repeated", [1, 2, 3])
def test_the_label_set_at_its_limits(num_labels: int, repeated: int) -> None:
    completions = [f"label {k}" for k in range(num_labels)] * repeated
    random.Random(0).shuffle(completions)
    for part in (completions, completions[:-1] or completions):
        task = find_task(part, part)
        assert labels_of(rows(part)) == (list(task.labels) if task.kind == "labels" else None)


def test_dropped_rows_are_counted_and_the_first_ten_named() -> None:
    records = rows(["word " * (200 if k % 2 else 1) for k in range(24)])
    bundles, dropped = bundles_of(records, SFT(), RENDERING)
    assert [example.source.line for (example,) in bundles] == list(range(1, 25, 2))
    assert dropped_note(([], []), RENDERING) == []
    named = ", ".join(f"rows.jsonl:{line}" for line in range(2, 22, 2))
    assert dropped_note((dropped[:10], []), RENDERING) == [
        f"10 rows are longer than 100 tokens and were dropped ({named})"
    ]
    assert dropped_note((dropped[:5], dropped[5:]), RENDERING) == [
        f"12 rows are longer than 100 tokens and were dropped ({named}, …)"
    ]
    with pytest.raises(DataError, match="none of the 12 rows fits into 100 tokens"):
        bundles_of(dropped, SFT(), RENDERING)


@pytest.mark.usefixtures("few_are_many")
def test_what_rewrites_prompts_has_a_part_in_what_is_kept(tmp_path: Path, own_home: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "q{k}", "completion": "a"}}\n' for k in range(20)))
    records = read_records(path).records

    def kept() -> int:
        return len(list((own_home / "cache" / "tokens").iterdir()))

    for text in ("Be short.", "Be long.", "Be short."):
        technique = Prompting(system=text, shots=0)
        shown = replace(RENDERING, compose=technique.compose)
        bundles, _ = bundles_of(records, SFT(), shown, [technique])
        assert isinstance(bundles, TokenStore)
        assert text in tiny_tokenizer().decode(bundles[7][0].token_ids)
    assert kept() == 2
    bundles_of(records, SFT(), shown)  # nobody says what rewrites, so it is not kept
    assert kept() == 2
    bundles_of(records, SFT(), RENDERING, [technique])
    bundles_of(records, SFT(), RENDERING)  # techniques that rewrite nothing make no difference
    assert kept() == 3
