from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest

from tailor import store
from tailor.errors import ConflictError


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_write_replaces_and_leaves_nothing_beside(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    store.write_text(path, "one\r\n")
    store.write_text(path, "zwei ü\n")
    assert path.read_bytes() == "zwei ü\n".encode()
    assert names(path.parent) == ["a.txt"]


def test_new_files_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o022)
    try:
        store.write_text(tmp_path / "a", "x")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    store.write_text(path, "old")

    def fail(*args: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        store.write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_json_is_sorted_indented_and_strict(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    store.write_json(path, {"b": 1, "a": ["ü", 1e-05]})
    assert path.read_text("utf-8") == '{\n  "a": [\n    "ü",\n    1e-05\n  ],\n  "b": 1\n}\n'
    with pytest.raises(ValueError, match=r"a\.json"):
        store.write_json(path, {"loss": float("nan")})
    assert json.loads(path.read_text("utf-8"))["b"] == 1


def test_json_keeps_lone_surrogates(tmp_path: Path) -> None:
    store.write_json(tmp_path / "a.json", {"x": "\ud800"})
    assert json.loads((tmp_path / "a.json").read_bytes()) == {"x": "\ud800"}


def test_folder_appears_whole(tmp_path: Path) -> None:
    path = tmp_path / "made" / "artifact"
    with store.atomic_folder(path) as folder:
        assert folder.parent == path.parent
        assert not path.exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "w").write_text("1")
    assert (path / "sub" / "w").read_text() == "1"
    assert names(path.parent) == ["artifact"]


def test_folder_vanishes_when_the_block_raises(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    path.mkdir()
    (path / "w").write_text("old")

    def interrupted() -> None:
        with store.atomic_folder(path, force=True) as folder:
            (folder / "w").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (path / "w").read_text() == "old"
    assert names(tmp_path) == ["artifact"]


def test_existing_folder_needs_force(tmp_path: Path) -> None:
    path = tmp_path / "artifact"
    path.mkdir()
    (path / "stale").write_text("old")
    with pytest.raises(ConflictError, match="artifact"), store.atomic_folder(path):
        pytest.fail("the block must not start")
    with store.atomic_folder(path, force=True) as folder:
        (folder / "w").write_text("new")
        assert (path / "stale").exists()
    assert names(path) == ["w"]
    assert names(tmp_path) == ["artifact"]


def test_a_folder_made_meanwhile_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "artifact"

    def race() -> None:
        with store.atomic_folder(path) as folder:
            (folder / "w").write_text("mine")
            path.mkdir()
            (path / "w").write_text("theirs")

    with pytest.raises(ConflictError):
        race()
    assert (path / "w").read_text() == "theirs"
    assert names(tmp_path) == ["artifact"]


def test_a_failed_swap_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "artifact"
    path.mkdir()
    (path / "w").write_text("old")
    rename = os.rename

    def fail_to_place(source: Path, target: Path) -> None:
        if str(source).endswith(".tmp"):
            raise OSError("no")
        rename(source, target)

    monkeypatch.setattr(store, "_exchange", lambda new, path: False)
    monkeypatch.setattr(os, "rename", fail_to_place)
    with pytest.raises(OSError, match="no"), store.atomic_folder(path, force=True) as folder:
        (folder / "w").write_text("new")
    assert (path / "w").read_text() == "old"
    assert names(tmp_path) == ["artifact"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names in one step")
def test_there_is_always_a_folder_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "artifact"
    path.mkdir()
    (path / "w").write_text("old")
    monkeypatch.setattr(os, "rename", None)
    with store.atomic_folder(path, force=True) as folder:
        (folder / "w").write_text("new")
    assert (path / "w").read_text() == "new"
    assert names(tmp_path) == ["artifact"]


@pytest.mark.parametrize("exchange", [True, False])
def test_a_link_is_replaced_and_not_what_it_points_to(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exchange:
        monkeypatch.setattr(store, "_exchange", lambda new, path: False)
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "w").write_text("old")
    path = tmp_path / "artifact"
    path.symlink_to("real")
    with store.atomic_folder(path, force=True) as folder:
        (folder / "w").write_text("new")
    assert not path.is_symlink()
    assert [(path / "w").read_text(), (tmp_path / "real" / "w").read_text()] == ["new", "old"]
    assert names(tmp_path) == ["artifact", "real"]


def killed_between_the_renames(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave what a kill leaves where two names cannot be exchanged: the old folder and the draft, aside."""
    path.mkdir()
    (path / "w").write_text("old")
    rename = os.rename

    def kill(source: Path, target: Path) -> None:
        if Path(source) == path:
            rename(source, target)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(store, "_exchange", lambda new, path: False)
        patch.setattr(shutil, "rmtree", lambda *given, **options: None)
        patch.setattr(os, "rename", kill)
        with pytest.raises(SystemExit), store.atomic_folder(path, force=True) as folder:
            (folder / "w").write_text("new")
    assert not path.exists()


def test_recover_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "check[point]"
    killed_between_the_renames(path, monkeypatch)
    assert store.recover(path)
    assert (path / "w").read_text() == "old"
    assert not store.recover(path)
    assert not store.recover(tmp_path / "nothing" / "there")


def test_the_next_writer_recovers_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "checkpoint"
    killed_between_the_renames(path, monkeypatch)
    with pytest.raises(ConflictError), store.atomic_folder(path):
        pytest.fail("the block must not start")
    assert (path / "w").read_text() == "old"


def test_what_a_kill_left_is_removed_after_a_day(tmp_path: Path) -> None:
    now = time.time()
    ages = {
        ".a.0123abcd.tmp": 2 * store.DAY,
        ".a.0123abcd.old": 2 * store.DAY,
        ".a.ffffffff.tmp": store.DAY / 2,
        ".b.0123abcd.tmp": 2 * store.DAY,
        ".a.mine.tmp": 2 * store.DAY,
    }
    (tmp_path / "a").mkdir()
    for name, age in ages.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "w").write_text("1")
        os.utime(tmp_path / name, (now - age, now - age))
    with store.atomic_folder(tmp_path / "a", force=True):
        pass
    assert names(tmp_path) == [".a.ffffffff.tmp", ".a.mine.tmp", ".b.0123abcd.tmp", "a"]


@pytest.mark.parametrize("way", [".", "sub/..", ""])
def test_a_folder_without_a_name_of_its_own(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    (here / "sub").mkdir(parents=True)
    monkeypatch.chdir(here)
    with pytest.raises(ConflictError, match="here"), store.atomic_folder(Path(way)):
        pytest.fail("the block must not start")
    with store.atomic_folder(Path(way), force=True) as folder:
        (folder / "w").write_text("new")
    assert names(here) == ["w"]
    assert names(tmp_path) == ["here"]


def test_hashes(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert store.file_hash(tmp_path / "a") == store.text_hash("abc") == expected
    assert store.text_hash("ü") == hashlib.sha256(b"\xc3\xbc").hexdigest()
