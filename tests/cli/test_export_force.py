"""`tailor artifacts export --force` replaces models and adapters, nothing else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from tailor.cli.main import run
from tailor.recipes import export as export_recipe


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The folders that the recipe was asked to write."""
    written: list[Path] = []

    def export(name: str, folder: Path, format: str, **settings: object) -> SimpleNamespace:
        written.append(folder)
        return SimpleNamespace(to_dict=lambda: {"hops": [{"max_difference": 0.0}]})

    monkeypatch.setattr(export_recipe, "export", export)
    return written


@pytest.mark.parametrize("name", ["config.json", "adapter_config.json", "tailor.json"])
def test_an_earlier_export_is_replaced(name: str, exported: list[Path], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("{}")
    assert run(["artifacts", "export", "mine", str(tmp_path / "out"), "--force"]) == 0
    assert exported == [tmp_path / "out"]


def test_new_and_empty_folders_are_fine(exported: list[Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        assert run(["artifacts", "export", "mine", str(tmp_path / name), "--force"]) == 0
    assert len(exported) == 2


def test_other_folders_and_files_are_kept(
    exported: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    for target in (tmp_path / "thesis", tmp_path / "thesis" / "chapter.tex"):
        assert run(["artifacts", "export", "mine", str(target), "--force"]) == 8
        assert f"{target} is no model or adapter" in capsys.readouterr().err
    assert exported == []


@pytest.mark.parametrize("folder", [".", "..", "../inside"])
def test_the_folder_one_is_in_is_kept(
    folder: str,
    exported: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path / "inside")
    assert run(["artifacts", "export", "mine", folder, "--force"]) == 8
    assert "the folder you are in" in capsys.readouterr().err
    assert exported == []
