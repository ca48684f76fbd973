"""`tailor plan` as a person types it: a table, one JSON object, exit code 5 with what would help."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer

from mood_rows import write_moods
from tailor.cli.main import run
from tailor.cli.plan import num_bytes

pytestmark = pytest.mark.usefixtures("own_home")


@pytest.fixture
def rows(tmp_path: Path) -> str:
    return str(write_moods(tmp_path, column="question"))


def test_a_data_file_is_planned_as_tune_would_take_it(
    rows: str, own_home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["plan", rows, "-t", "lora", "--columns", "prompt=question", "technique.rank=4", "--dtype", "bfloat16"]
    assert run([*given, "--no-measure"]) == 0
    out = capsys.readouterr().out
    assert "lora on tailor-nano" in out
    assert "bfloat16 on cpu" in out
    for word in ("weights", "gradients", "optimizer", "activations", "logits", "best state", "sum", "disk:", "fits:"):
        assert word in out
    assert "time:" not in out
    assert not own_home.exists()  # nothing is written


def test_json_holds_everything_and_the_time(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", rows, "--columns", "prompt=question", "train.num_steps=5", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] in ("fits", "tight")
    assert found["techniques"] == ["lora"]
    assert found["training"]["num_steps"] == 5
    assert found["seconds"] > 0
    sums = {m["name"]: sum(c["bytes"] for c in m["components"]) for m in found["memory"]["moments"]}
    assert found["memory"]["peak"] == max(sums.values())
    assert sums[found["memory"]["peak_moment"]] == found["memory"]["peak"]
    assert found["work"]["num_tokens"] == pytest.approx(5 * found["work"]["tokens"], abs=1)


def test_a_recipe_and_its_overrides(rows: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"data: {{train: {rows}, columns: {{prompt: question}}}}\ntechnique: full\noutput: {{name: a}}\n")
    assert run(["plan", str(recipe), "train.num_steps=3", "--no-measure", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["techniques"], found["training"]["num_steps"]) == (["full"], 3)
    assert found["num_parameters"] == found["base"]["num_parameters"]


def test_what_does_not_fit_exits_5_with_suggestions(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", rows, "-t", "full", "--columns", "prompt=question", "--memory", "600MiB"]) == 5
    out, err = capsys.readouterr()
    assert "does not fit: about" in out
    assert "600 MiB are free" in err
    assert "hint: technique=lora" in err


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GiB", 8 * 2**30), ("8gi", 8 * 2**30), ("24G", 24 * 10**9), ("1.5 GB", 15 * 10**8), ("4096", 4096)],
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert num_bytes(text) == size


@pytest.mark.parametrize("text", ["much", "8 bananas", "-1", "iB"])
def test_what_is_no_size_is_refused(text: str, rows: str) -> None:
    with pytest.raises(typer.BadParameter):
        num_bytes(text)
    assert run(["plan", rows, f"--memory={text}"]) == 2


def test_mistakes_have_the_exit_codes_of_tune(rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "no-such-file.jsonl"]) == 6
    assert run(["plan", rows, "-t", "lroa"]) == 3
    assert "did you mean 'lora'" in capsys.readouterr().err
    assert run(["plan", rows, "--columns", "prompt=question", "-b", "tailor-nan"]) == 6
