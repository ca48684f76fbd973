"""`tailor sweep` on the command line: flags become a recipe, the result is told, `tailor resume` and `tune` go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("optuna")

from mood_rows import write_moods
from tailor.cli.main import run
from tailor.recipes import sweep_train
from tiny_models import tiny_model, tiny_tokenizer

SHORT = ["train.num_steps=4", "train.batch_size=4"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "tiny-llama"
    tiny_model("llama", num_hidden_layers=2).save_pretrained(folder)
    tiny_tokenizer().hf.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def rows(own_home: Path, tmp_path: Path) -> str:
    return str(write_moods(tmp_path))


def test_from_a_data_file(base: str, rows: str, own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--base", base, "-t", "lora", "-t", "ia3", "--trials", "3", "-k", "3"]
    assert run(["sweep", rows, *flags, *SHORT, "search.lora.rank=[2,4]"]) == 0
    told = capsys.readouterr()
    folder = own_home / "sweeps" / "moods-sweep"
    assert "validation loss" in told.out.splitlines()[0]
    assert "the lowest of 3 trials" in told.out
    assert all(f"trial {number}: " in told.err for number in range(3))
    assert f"tailor tune {folder / 'best.yaml'}" in told.err
    report = json.loads((folder / "report.json").read_text())
    assert report["space"] == {"lora.rank": [2, 4]}
    assert {trial["technique"] for trial in report["trials"]} == {"lora", "ia3"}
    assert run(["tune", str(folder / "best.yaml"), "--quiet", "--no-verify"]) == 0
    assert (own_home / "artifacts" / "moods-sweep-best").is_dir()


def test_an_interrupted_one_is_resumed(
    base: str, rows: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["sweep", rows, "--base", base, "--name", "mine", "--trials", "2", "--json", *SHORT]
    tell = sweep_train._tell
    monkeypatch.setattr(sweep_train, "_tell", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    assert run(flags) == 130
    capsys.readouterr()
    monkeypatch.setattr(sweep_train, "_tell", tell)
    assert run(["resume", "mine", "--json", "--quiet"]) == 0
    told = capsys.readouterr()
    report = json.loads(told.out)
    assert told.err == ""
    assert (report["schema_version"], report["status"], report["artifact"]) == (1, "finished", "mine")
    assert [trial["state"] for trial in report["trials"]] == ["complete", "complete"]
    assert run(flags) == 0  # the same command shows it again
    assert json.loads(capsys.readouterr().out)["trials"] == report["trials"]


def test_a_sweep_of_failures_has_a_report_and_an_exit_code(
    base: str, rows: str, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = 'search={"technique.target_modules": [["no_proj"], ["nor_this"]]}'
    assert run(["sweep", rows, "--base", base, "--trials", "2", "--name", "bad", search]) == 1
    told = capsys.readouterr()
    assert "none of 2 trials came to its end: target 'no" in told.err
    assert "None of 2 trials" in (own_home / "sweeps" / "bad" / "report.html").read_text()


def test_wrong_words(base: str, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sweep", rows, "--trials", "0"]) == 2
    assert run(["sweep", rows, "-t", "full"]) == 3
    assert "full changes the base itself and cannot share it" in capsys.readouterr().err
    assert run(["sweep", rows, "search.technique.rnak=[1,2]"]) == 3
    assert "did you mean 'rank'?" in capsys.readouterr().err
