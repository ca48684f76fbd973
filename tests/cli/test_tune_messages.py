"""What `tailor tune` says about settings that cannot mean anything, and about what was trained."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tailor.cli.main import run

ROWS = [{"prompt": f"what is {k}?", "completion": f"number {k}"} for k in range(20)]


@pytest.fixture(autouse=True)
def rows(tmp_path: Path, own_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))


def tuned(*arguments: str) -> int:
    return run(["tune", *arguments, "--quiet", "train.num_steps=2", "train.batch_size=2", "output.verify=false"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--add-tokens", "<sku>,<sku>"], "--add-tokens: technique.0.tokens: a token is named twice"),
        (["--add-tokens", ","], "--add-tokens: technique.0.tokens: wants at least 1 items"),
        (["-t", "full", "--add-tokens", "<sku>"], "--add-tokens: technique: full changes the base itself"),
        (["-t", "adapter", "technique.target_layers=[]"], "technique.target_layers: wants at least 1 items"),
        (["-t", "lora", "technique.target_layers=[]"], "technique.target_layers: wants at least 1 items"),
        (["-t", "ia3", "technique.target_layers=[]"], "technique.target_layers: wants at least 1 items"),
        (["-t", "ia3", "technique.target_modules=[]"], "technique.target_modules: wants at least 1 items"),
        (["-t", "prompt_tuning", "technique.num_virtual_tokens=5000"], "5000 virtual tokens fill the base's context"),
        (["-t", "p_tuning", "technique.num_virtual_tokens=5000"], "5000 virtual tokens fill the base's context"),
    ],
)
def test_what_cannot_have_an_effect_is_told(
    arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuned("rows.jsonl", *arguments) != 0
    error = capsys.readouterr().err
    assert told in error
    assert "pydantic" not in error


def test_going_on_takes_the_same_technique_and_settings(capsys: pytest.CaptureFixture[str]) -> None:
    soft = ("-t", "p_tuning", "technique.num_virtual_tokens=3")
    assert tuned("rows.jsonl", "-n", "first", *soft) == 0
    assert "saved as 768" in capsys.readouterr().out  # 3 × 256; the encoder is trained too
    assert tuned("rows.jsonl", "-n", "second", "-t", "lora", "start=first") != 0
    assert "start: first is p_tuning, and lora is to be trained" in capsys.readouterr().err
    assert tuned("rows.jsonl", "-n", "second", "-t", "p_tuning", "start=first") != 0
    assert "start: first was trained with other settings: prompt_encoder" in capsys.readouterr().err
    assert tuned("rows.jsonl", "-n", "second", *soft, "start=first") == 0


def test_an_override_names_the_recipe_that_it_does_not_suit(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("lora", "ia3"):
        Path(f"{name}.yaml").write_text(f"data: {{train: rows.jsonl}}\ntechnique: {name}\noutput: {{name: {name}}}\n")
    assert tuned("lora.yaml", "ia3.yaml", "technique.rank=2") != 0
    assert "ia3.yaml: override 'technique.rank=2'" in capsys.readouterr().err
