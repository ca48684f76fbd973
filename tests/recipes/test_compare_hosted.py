"""A hosted base in a comparison: its own line and prompting's are measured by text, the others say what they lack."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from comparison_runs import cells_of, row_of
from hosted_stub import Stub, stub_endpoint
from mood_rows import write_moods
from tailor.inference.load import load
from tailor.recipes.compare import compare
from tailor.recipes.compare_settings import CompareRecipe


@pytest.fixture
def stub(own_home: Path) -> Iterator[Stub]:
    with stub_endpoint() as running:
        yield running


def recipe(stub: Stub, tmp_path: Path, **more: Any) -> CompareRecipe:
    return CompareRecipe.model_validate(
        {
            "name": "mine",
            "base": [f"openai:m@{stub.url}"],
            "data": {"train": str(write_moods(tmp_path))},
            "techniques": ["prompting", "lora"],
            "baselines": False,
            **more,
        }
    )


def test_a_hosted_base_alone(stub: Stub, tmp_path: Path) -> None:
    stub.answer = lambda asked: "glad" if "glad" in asked["messages"][-1]["content"] else "sad"
    result = compare(recipe(stub, tmp_path))
    base, prompting, lora = (row_of(result, name) for name in ("base", "prompting", "lora"))
    assert base["metrics"]["accuracy"]["mean"] == prompting["metrics"]["accuracy"]["mean"] == 1.0
    assert any(note.startswith("no perplexity: ") for note in base["notes"])
    assert any("requests" in note for note in base["notes"])
    assert lora["status"] == "failed"
    assert lora["error"]["message"] == f"lora needs the base's weights, and openai:m@{stub.url} is hosted"
    assert "tailor hosted tune" in lora["error"]["hint"]
    shown = {len(body["messages"]) for body in stub.bodies("/v1/chat/completions")}
    assert shown == {1, 9}  # plain, and behind four shots
    assert load(prompting["artifact"]).generate("I feel glad") == "glad"
    asked = len(stub.asked)
    compare(recipe(stub, tmp_path))
    assert len(stub.asked) == asked, "what is on disk is not asked again"


def test_beside_a_base_that_is_here(stub: Stub, tmp_path: Path) -> None:
    few = {"metrics": ["accuracy"], "sampling": {"max_new_tokens": 2}}
    bases = ["tailor-nano", f"openai:m@{stub.url}"]
    done = compare(recipe(stub, tmp_path, base=bases, techniques=["prompting"], evaluation=few, save=False))
    lines = {row["id"]: row["status"] for row in done.report["rows"]}
    assert {lines[f"{base}/{name}"] for base in bases for name in ("base", "prompting")} == {"ok"}


def test_an_endpoint_that_fails_takes_its_rows(stub: Stub, tmp_path: Path) -> None:
    stub.oddities.add("error_body")
    done = compare(recipe(stub, tmp_path, techniques=["prompting"]))
    cells = [cell for cell in cells_of(done).values() if cell["base"] is not None]
    assert {cell["status"] for cell in cells} == {"failed"}
    assert "the provider behind is down" in cells[0]["error"]["message"]
