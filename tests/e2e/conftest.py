"""A tiny base on disk, a few rows, and a TAILOR_HOME of its own for every test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with its tokenizer, in the Hugging Face layout."""
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder)
    tiny_tokenizer().hf.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test has its own TAILOR_HOME."""
    monkeypatch.setenv("TAILOR_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


COLOURS = ("red", "green", "blue", "white")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """40 rows: name the colour of a thing."""
    path = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"thing number {k}?", "completion": COLOURS[k % 4]} for k in range(40)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
