"""`tailor init` writes a recipe that loads as it stands, for every technique, and never over another file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tailor.cli.main import run
from tailor.config import load_recipe
from tailor.recipes.tune_settings import TuneRecipe
from tailor.techniques import TECHNIQUES


def fresh(path: Path, technique: str, *flags: str) -> TuneRecipe:
    assert run(["init", str(path), "--technique", technique, *flags]) == 0
    return load_recipe(path, TuneRecipe).recipe


@pytest.mark.parametrize("technique", [name for name, kind in TECHNIQUES.items() if kind.has_defaults()])
def test_the_recipe_is_the_defaults(tmp_path: Path, technique: str) -> None:
    recipe = fresh(tmp_path / "recipe.yaml", technique, "--data", "my rows/tickets v2.jsonl.gz")
    data, output = {"train": "my rows/tickets v2.jsonl.gz"}, {"name": f"tickets-v2-{technique}"}
    assert recipe == TuneRecipe.model_validate({"data": data, "technique": technique, "output": output})


def test_every_setting_is_there_with_its_description(tmp_path: Path) -> None:
    fresh(tmp_path / "recipe.yaml", "lora")
    text = (tmp_path / "recipe.yaml").read_text("utf-8")
    models = [TuneRecipe, *TECHNIQUES.values()]
    models += [TuneRecipe.model_fields[name].annotation for name in ("base", "data", "train", "output")]
    missing = []
    for model in models:
        for name, field in model.model_fields.items():
            if f"{name}:" not in text or (field.description or "") not in text:
                missing.append(f"{model.__name__}.{name}")
    assert missing == []


@pytest.mark.parametrize("other", [name for name, kind in TECHNIQUES.items() if name != "lora" and kind.has_defaults()])
def test_a_commented_technique_can_take_the_place_of_the_other(tmp_path: Path, other: str) -> None:
    path = tmp_path / "recipe.yaml"
    fresh(path, "lora")
    lines = path.read_text("utf-8").splitlines()
    start, end = lines.index(next(x for x in lines if x.startswith("technique:"))), lines.index("")
    end = lines.index("", start)
    at = lines.index(f"#   type: {other}")
    block = ["technique:"]
    for line in lines[at:end]:
        if line.startswith("# or:"):
            break
        block.append(line.removeprefix("# "))
    path.write_text("\n".join([*lines[:start], *block, *lines[end:]]), "utf-8")
    assert load_recipe(path, TuneRecipe).recipe.technique == (TECHNIQUES[other](),)


def test_a_setting_without_default_has_an_example(tmp_path: Path) -> None:
    (technique,) = fresh(tmp_path / "recipe.yaml", "new_tokens").technique
    assert technique.model_dump()["tokens"] == ("<sku>", "<order>")


def test_nothing_is_overwritten_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("mine")
    assert run(["init", str(path)]) == 8
    assert path.read_text() == "mine"
    assert "exists already" in capsys.readouterr().err
    assert run(["init", str(path), "--force"]) == 0
    assert path.read_text("utf-8").startswith("# A tuning recipe")
    assert run(["init", str(tmp_path), "--force"]) == 3
    (tmp_path / "folder.yaml").mkdir()
    assert run(["init", str(tmp_path / "folder.yaml"), "--force"]) == 8


def test_wrong_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", str(tmp_path / "recipe.txt")]) == 3
    assert "does not end in .yaml" in capsys.readouterr().err
    assert run(["init", str(tmp_path / "r.yaml"), "--technique", "lroa"]) == 3
    assert "did you mean 'lora'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
