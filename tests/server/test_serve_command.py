"""`tailor serve` and `tailor keys` as they are typed."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tailor.artifacts.artifact import Artifact
from tailor.cli.main import run
from tailor.cli.serve import chosen
from tailor.errors import ConfigError, NotFoundError


def artifact(folder: Path, base: str) -> Artifact:
    return Artifact(folder.name, folder, {"name": folder.name, "techniques": [], "base": {"name": base}})


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Artifact]:
    """What is in TAILOR_HOME, for `chosen`."""
    kept: list[Artifact] = []
    monkeypatch.setattr("tailor.artifacts.artifact.survey", lambda: (kept, {}))

    def find(name: str) -> Artifact | None:
        if name.startswith("base"):
            return None
        known = {one.name: one for one in kept}
        if name not in known:
            raise NotFoundError(f"there is no artifact or base {name!r}")
        return known[name]

    monkeypatch.setattr("tailor.inference.load.find_or_none", find)
    return kept


@pytest.mark.parametrize(
    ("made_on", "models", "bases", "expected"),
    [
        ([], [], [], (["tailor-nano"], None)),
        (["base-a", "base-a"], [], [], (["base-a"], None)),
        (["base-a", "base-b"], ["m1"], [], (["base-b"], ["m1"])),
        (["base-a", "openai:gpt@http://127.0.0.1:1/v1"], [], [], (["base-a"], None)),
        (["base-a", "base-b"], [], ["base-b", "base-b"], (["base-b"], None)),
        (["base-a"], ["base-c"], [], (["base-c"], [])),
        (["base-a"], ["base-c", "m0"], ["base-a"], (["base-a", "base-c"], ["m0"])),
    ],
)
def test_bases_follow_from_the_artifacts(
    found: list[Artifact], tmp_path: Path, made_on: Sequence[str], models: list[str], bases: list[str], expected: Any
) -> None:
    found += [artifact(tmp_path / f"m{k}", base) for k, base in enumerate(made_on)]
    assert chosen(models, bases) == expected


def test_several_bases_must_be_named(found: list[Artifact], tmp_path: Path) -> None:
    found += [artifact(tmp_path / "m0", "base-a"), artifact(tmp_path / "m1", "base-b")]
    with pytest.raises(ConfigError, match="2 bases: base-a, base-b"):
        chosen([], [])
    with pytest.raises(NotFoundError):
        chosen(["m2"], [])


def test_what_answers_elsewhere_is_not_served_here(found: list[Artifact], tmp_path: Path) -> None:
    found += [artifact(tmp_path / "m0", "openai:gpt@http://127.0.0.1:1/v1")]
    with pytest.raises(ConfigError, match="m0: made on a hosted model"):
        chosen(["m0"], [])


def test_an_open_address_without_a_key_is_refused(own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--host", "0.0.0.0"]) == 3
    assert "no API key" in capsys.readouterr().err


def test_a_port_in_use_is_said(own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert run(["serve", "--port", str(taken.getsockname()[1])]) == 8
    assert "cannot be listened on" in capsys.readouterr().err


def test_keys_are_made_listed_and_revoked(own_home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["keys", "create", "me", "--scope", "files", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["key"].startswith("sk-tailor-")
    assert run(["keys", "list"]) == 0
    shown = capsys.readouterr().out
    assert made["id"] in shown
    assert made["key"] not in shown
    assert run(["keys", "revoke", made["id"]]) == 0
    assert run(["keys", "revoke", made["id"]]) == 6
    assert run(["keys", "create", "me", "--scope", "file"]) == 3
    assert "did you mean 'files'" in capsys.readouterr().err


def test_it_serves_until_it_is_interrupted(own_home: Path) -> None:
    start = "from tailor.cli.main import main; main()"
    command = [sys.executable, "-c", start, "serve", "--port", "0", "--json", "--api-key", "secret"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as server:
        assert server.stdout is not None
        told = json.loads(server.stdout.readline())
        assert told["models"] == ["tailor-nano"]
        body = {"model": "tailor-nano", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
        headers = {"authorization": "Bearer secret", "content-type": "application/json"}
        asked = urllib.request.Request(f"{told['url']}/chat/completions", json.dumps(body).encode(), headers)
        with urllib.request.urlopen(asked, timeout=60) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] <= 4
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
    assert server.returncode == 0
    assert "Traceback" not in errors
