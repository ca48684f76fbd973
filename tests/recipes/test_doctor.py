"""`tailor doctor`: what it says of this machine, of broken surroundings and of bases."""

from __future__ import annotations

import importlib.metadata
import json
import re
import tomllib
from pathlib import Path

import pytest

from tailor.cli.main import run
from tailor.recipes import doctor as checks
from tailor.recipes.doctor import Checked, check_base, check_extras, check_folders, check_hub, check_packages, doctor
from tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_home")

ROOT = Path(__file__).parents[2]


def by_name(found: list[Checked]) -> dict[str, Checked]:
    return {one.name: one for one in found}


def test_the_command_passes_here_and_says_so_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json", "--base", "tailor-nano"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["counts"]["FAIL"] == 0
    topics = {one["topic"] for one in report["checks"]}
    assert topics == {"system", "torch", "packages", "extras", "folders", "hub", "embedded base", "tailor-nano"}
    turn = next(one for one in report["checks"] if one["topic"] == "embedded base" and one["name"] == "end of turn")
    assert "<|end|> is in the loss" in turn["detail"]
    assert all(one["fix"] for one in report["checks"] if one["status"] != "PASS")


def test_every_extra_of_the_project_is_looked_at() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    found = {one.name: one for one in check_extras()}
    assert set(found) == set(project["optional-dependencies"])
    for name, one in found.items():
        assert one.status == "PASS" or one.fix == f'pip install "tailor-llm[{name}]"'
    core = {re.split(r"[<>=!]", line)[0].replace("ruamel.yaml", "ruamel-yaml") for line in project["dependencies"]}
    assert {one.name for one in check_packages()} == core


def test_packages_that_are_missing_or_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [
        "nothing-of-the-kind>=1",
        "numpy>=999",
        "torch>=2",
        'openai>=2; extra == "hosted"',
        'numpy; extra == "all"',
    ]
    wanted += ['tailor-llm[all,hosted]; extra == "every"', 'openai[x]>=2; extra == "other"']
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "openai":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(checks.metadata, "requires", lambda name: wanted)
    monkeypatch.setattr(checks.metadata, "version", version)
    core = by_name(list(check_packages()))
    assert [core[name].status for name in ("nothing-of-the-kind", "numpy", "torch")] == ["FAIL", "FAIL", "PASS"]
    assert core["numpy"].fix == 'pip install "numpy>=999"'
    extras = by_name(list(check_extras()))
    assert {name: one.status for name, one in extras.items()} == {
        "hosted": "WARN",
        "all": "PASS",
        "every": "WARN",
        "other": "WARN",
    }
    assert extras["every"].detail == "not there: openai (not installed)"


def test_a_home_that_is_a_file_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TAILOR_HOME", str(tmp_path / "file"))
    found = by_name(list(check_folders()))
    assert found["TAILOR_HOME"].status == "FAIL"
    assert "set TAILOR_HOME" in str(found["TAILOR_HOME"].fix)


def test_looking_writes_nothing(tmp_path: Path) -> None:
    assert by_name(list(check_folders()))["TAILOR_HOME"].status == "PASS"
    assert list(tmp_path.iterdir()) == []


def test_offline_is_a_warning_and_a_token_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = list(check_hub())
    assert by_name(found)["downloads"].status == "WARN"
    assert by_name(found)["HF_TOKEN"].detail == "set"
    assert not any("hf_secret" in one.detail for one in found)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert by_name(list(check_hub()))["downloads"].status == "PASS"


def test_a_check_that_breaks_is_a_failure_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> list[Checked]:
        raise OSError("libtorch.so is gone")

    monkeypatch.setattr(checks, "check_torch", broken)
    assert run(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAIL  check: OSError: libtorch.so is gone" in out
    assert "PASS  tailor-nano" in out


def test_a_base_that_is_not_there_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--base", "tailor-nanno"]) == 1
    assert "did you mean 'tailor-nano'" in capsys.readouterr().out


def test_a_base_with_its_own_ways(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    hf = tiny_tokenizer(chat=False).hf
    hf.save_pretrained(tmp_path)
    found = by_name(list(check_base(str(tmp_path))))
    assert found["template"].detail.startswith("none")
    assert found["end of turn"].detail.startswith("<|eos|> is in the loss")
    assert found["context"].detail == "256 tokens"
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "vocab_size": 100}))
    assert by_name(list(check_base(str(tmp_path))))["vocabulary"].status == "FAIL"


def test_a_template_that_never_ends_a_turn_fails(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().hf.save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    found = [one for one in doctor(str(tmp_path)) if one.topic == str(tmp_path)]
    assert [one.status for one in found] == ["FAIL"]
    assert "never learn to stop" in found[0].detail
