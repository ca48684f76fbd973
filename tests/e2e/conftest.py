"""A tiny base on disk, a few rows, a finished comparison of them, and a TAILOR_HOME of its own for every test."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import pytest

from comparison_runs import recipe
from mood_rows import write_lines
from tailor.recipes.compare import CompareResult, compare
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with its tokenizer, in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder)
    tiny_tokenizer().hf.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def imports_are_kept(tiny_folder: Path) -> None:
    """What is imported by now stays: a comparison asks for garbage often, and would look through all of it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def own_home(own_home: Path) -> Path:
    """Every test here has its own TAILOR_HOME."""
    return own_home


COLOURS = ("red", "green", "blue", "white")


def write_rows(path: Path) -> Path:
    return write_lines(path, ({"prompt": f"thing number {k}?", "completion": COLOURS[k % 4]} for k in range(40)))


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """40 rows: name the colour of a thing."""
    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture(scope="session")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], CompareResult]:
    """A comparison of everything at two sizes, made once; nobody may change it."""
    home = tmp_path_factory.mktemp("finished")
    rows = write_rows(home / "rows.jsonl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILOR_HOME", str(home))
        result = compare(recipe(tiny_folder, rows, sizes=[8, "all"]), command="tailor compare rows.jsonl")
    return lambda: result
