"""A run on rows that are kept on disk comes to the numbers of a run on rows in memory, cold, cached and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_tune import interrupt_at, losses, recipe

from tailor.data.token_store import TokenStore
from tailor.errors import InterruptedRunError
from tailor.models.base import load_base
from tailor.recipes.tune import resume, tune
from tailor.recipes.tune_prepare import prepare, read_rows
from tailor.runs import Run


def facts(result: Any) -> dict[str, Any]:
    manifest = result.artifact.manifest
    kept = {key: manifest[key] for key in ("data", "labels", "notes")}
    return {**kept, "validation_loss": manifest["metrics"]["validation_loss"], "passed": manifest["parity"]["passed"]}


@pytest.mark.parametrize("technique", ["lora", "prompt_tuning"])
def test_rows_on_disk_train_as_rows_in_memory(
    technique: str, tiny_folder: Path, rows: Path, own_home: Path, request: pytest.FixtureRequest
) -> None:
    in_memory = tune(recipe(tiny_folder, rows, technique, "memory"), quiet=True)
    assert in_memory.run is not None
    assert not (own_home / "cache").exists()
    request.getfixturevalue("few_are_many")
    for name in ("cold", "cached"):
        result = tune(recipe(tiny_folder, rows, technique, name), quiet=True)
        assert result.run is not None
        assert losses(result.run) == losses(in_memory.run)
        assert facts(result) == facts(in_memory)
    kept = {kind.name: len(list(kind.iterdir())) for kind in (own_home / "cache").iterdir()}
    assert kept == {"records": 1, "splits": 1, "tokens": 2}


@pytest.mark.usefixtures("few_are_many")
def test_a_run_on_rows_on_disk_is_resumed(
    tiny_folder: Path, rows: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tune(recipe(tiny_folder, rows, "lora", "whole"), quiet=True)
    interrupt_at(monkeypatch, 5)
    with pytest.raises(InterruptedRunError):
        tune(recipe(tiny_folder, rows, "lora", "stopped"), quiet=True)
    for entry in (own_home / "cache").glob("tokens/*/token_ids"):
        entry.write_bytes(b"damaged")
    again = resume("stopped", quiet=True)
    assert whole.run is not None
    assert losses(Run.open("stopped")) == losses(whole.run)
    assert facts(again) == facts(whole)


@pytest.mark.usefixtures("few_are_many")
def test_what_a_person_sees_while_many_rows_are_read(
    tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tailor.data.progress.SECONDS_BETWEEN_LINES", 0.0)
    settings = recipe(tiny_folder, rows, "lora")
    prepared = prepare(settings, read_rows(settings, quiet=False), load_base(tiny_folder), quiet=False)
    assert isinstance(prepared.train, TokenStore)
    assert isinstance(prepared.validation, TokenStore)
    shown = capsys.readouterr().err.splitlines()
    assert {"read rows 40/40", "split rows 40/40", "tokenise rows 36/36"} <= set(shown)
