"""`tailor import-openai`: a job's files come home as rows of ours, with what cannot be read reported, and a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hosted_stub import Stub, stub_endpoint
from tailor.config import load_recipe
from tailor.data.readers import read_records
from tailor.errors import ConflictError, NotFoundError
from tailor.objectives import OBJECTIVES
from tailor.recipes.import_openai import Imported, import_openai
from tailor.recipes.tune_settings import TuneRecipe


@pytest.fixture
def stub(own_home: Path) -> Iterator[Stub]:
    with stub_endpoint() as running:
        yield running


def job(stub: Stub, train: list[Any], validation: list[Any] | None = None, **more: Any) -> str:
    """A finished job with these rows; a text stands for a line as it is."""
    for key, rows in (("file-t", train), ("file-v", validation)):
        if rows is not None:
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            stub.files[key] = ("rows.jsonl", "".join(f"{line}\n" for line in lines).encode())
    given = {"n_epochs": 3, "batch_size": 4, "learning_rate_multiplier": 1.8}
    stub.jobs["ftjob-1"] = {
        "id": "ftjob-1",
        "object": "fine_tuning.job",
        "created_at": 1,
        "model": "gpt-x",
        "seed": 11,
        "organization_id": "o",
        "result_files": [],
        "status": "succeeded",
        "training_file": "file-t",
        "validation_file": None if validation is None else "file-v",
        "hyperparameters": given,
        "method": {"type": "supervised", "supervised": {"hyperparameters": given}},
        "looks": 9,
        "suffix": "s",
        **more,
    }
    return "ftjob-1"


def chat(question: str, answer: str, *before: dict[str, str]) -> dict[str, Any]:
    turns = [*before, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return {"messages": turns}


def imported(stub: Stub, tmp_path: Path, **more: Any) -> Imported:
    return import_openai("ftjob-1", tmp_path / "home-again", place=f"openai:any@{stub.url}", **more)


def test_plain_chats_become_prompts_and_completions(stub: Stub, tmp_path: Path) -> None:
    job(stub, [chat(f"q{k}", f"a{k}") for k in range(12)], [chat("v", "w")])
    found = imported(stub, tmp_path)
    assert (found.sides, found.format) == ({"train": 12, "validation": 1}, "prompt and completion")
    lines = (found.folder / "train.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"prompt": "q0", "completion": "a0"}
    assert found.recipe is not None
    recipe = load_recipe(found.recipe, TuneRecipe).recipe
    assert (recipe.train.num_epochs, recipe.train.batch_size, recipe.train.seed) == (3, 4, 11)
    assert recipe.train.learning_rate is None
    assert any("learning_rate_multiplier 1.8" in note for note in found.notes)
    assert recipe.data.validation == str(found.folder / "validation.jsonl")
    assert json.loads((found.folder / "import.json").read_text())["rows"] == {"train": 12, "validation": 1}


def test_what_only_a_chat_can_hold_stays_one(stub: Stub, tmp_path: Path) -> None:
    rows = [chat("q", "a"), chat("q2", "a", {"role": "system", "content": "be kind"})]
    job(stub, rows)
    found = imported(stub, tmp_path)
    assert found.format == "chat"
    lines = (found.folder / "train.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == rows


def test_rows_that_cannot_be_read_are_told_and_kept_in_the_original(stub: Stub, tmp_path: Path) -> None:
    job(stub, [chat("q", "a"), "{broken", {"messages": [{"role": "user", "content": "alone"}]}, chat("q2", "a")])
    found = imported(stub, tmp_path)
    assert found.sides == {"train": 2}
    told = [note for note in found.notes if note.startswith("original-train.jsonl:")]
    assert [note.split(":")[1] for note in told] == ["2", "3"]
    assert (found.folder / "original-train.jsonl").read_bytes() == stub.files["file-t"][1]


def test_preferences(stub: Stub, tmp_path: Path) -> None:
    side = [{"role": "assistant", "content": "x"}], [{"role": "assistant", "content": "y"}]
    rows = [
        {
            "input": {"messages": [{"role": "user", "content": f"q{k}"}]},
            "preferred_output": side[0],
            "non_preferred_output": side[1],
        }
        for k in range(3)
    ]
    method = {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0.1, "n_epochs": 2}}}
    job(stub, [*rows, "{broken"], method=method)
    found = imported(stub, tmp_path)
    assert len(read_records(found.folder / "train.jsonl").records) == 3
    assert found.job["hyperparameters"]["beta"] == 0.1
    assert (found.recipe is not None) == ("dpo" in OBJECTIVES)


def test_jobs_of_the_older_kind_with_auto_numbers(stub: Stub, tmp_path: Path) -> None:
    auto = {"n_epochs": "auto", "batch_size": "auto", "learning_rate_multiplier": "auto"}
    job(stub, [chat(f"q{k}", "a") for k in range(4)], method=None, hyperparameters=auto)
    found = imported(stub, tmp_path)
    assert found.recipe is not None
    train = load_recipe(found.recipe, TuneRecipe).recipe.train
    assert (train.num_epochs, train.batch_size) == (None, None)


def test_a_deleted_file_and_a_folder_in_use(stub: Stub, tmp_path: Path) -> None:
    job(stub, [chat("q", "a")])
    imported(stub, tmp_path)
    with pytest.raises(ConflictError, match="exists already"):
        imported(stub, tmp_path)
    stub.files.clear()
    with pytest.raises(NotFoundError, match="no longer at"):
        imported(stub, tmp_path, force=True)
    assert (tmp_path / "home-again" / "train.jsonl").is_file(), "what was there stays"
