"""The `base` block of a recipe: a plain name will do, in the file, under overrides, and below another file."""

from __future__ import annotations

from pathlib import Path

import pytest

from tailor.config import load_recipe
from tailor.errors import ConfigError
from tailor.recipes.tune_settings import BaseSettings, TuneRecipe

REST = "data: {train: rows.jsonl}\ntechnique: lora\noutput: {name: mine}\n"


def base_of(folder: Path, text: str, *overrides: str) -> BaseSettings:
    path = folder / "recipe.yaml"
    path.write_text(text + REST)
    return load_recipe(path, TuneRecipe, overrides).recipe.base


@pytest.mark.parametrize(
    ("text", "overrides", "expected"),
    [
        ("", (), BaseSettings()),
        ("base: tailor-nano\n", (), BaseSettings(name="tailor-nano")),
        ("base: {name: my-folder, device: cpu}\n", (), BaseSettings(name="my-folder", device="cpu")),
        ("", ("base=my-folder",), BaseSettings(name="my-folder")),
        ("base: {name: a, device: cpu}\n", ("base=my-folder",), BaseSettings(name="my-folder")),
        ("base: a\n", ("base.name=my-folder",), BaseSettings(name="my-folder")),
        ("base: my-folder\n", ("base.dtype=float32",), BaseSettings(name="my-folder", dtype="float32")),
    ],
)
def test_spellings(text: str, overrides: tuple[str, ...], expected: BaseSettings, tmp_path: Path) -> None:
    assert base_of(tmp_path, text, *overrides) == expected


def test_a_name_below_and_settings_above(tmp_path: Path) -> None:
    (tmp_path / "below.yaml").write_text("base: my-folder\n")
    assert base_of(tmp_path, "extends: below.yaml\nbase: {device: cpu}\n") == BaseSettings(
        name="my-folder", device="cpu"
    )


def test_mistakes_are_still_told_in_place(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"recipe.yaml:1: base.nme: unknown setting \(did you mean 'name'"):
        base_of(tmp_path, "base: {nme: tailor-nano}\n")
    with pytest.raises(ConfigError, match=r"recipe.yaml:1: base: wants a mapping"):
        base_of(tmp_path, "base: 3\n")
