"""`--technique`: every registered one by its name, several with + between, and their settings as overrides."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

from tailor.cli.compare import _parts
from tailor.cli.tune import recipe_from
from tailor.config import load_recipe
from tailor.errors import ConfigError
from tailor.recipes.compare_settings import CompareRecipe
from tailor.recipes.tune_settings import TuneRecipe
from tailor.techniques import TECHNIQUES, Technique
from tailor.techniques.lora import LoRA
from tailor.techniques.prompt_tuning import PromptTuning

ROOT = Path(__file__).parents[2]
OTHERS = [name for name, technique in TECHNIQUES.items() if technique.traits.frozen_base and name != "lora"]


def asked(technique: str | None, *overrides: str) -> TuneRecipe:
    return recipe_from("rows.jsonl", {"technique": technique}, None, overrides)


def made(name: str) -> Technique:
    """The technique with no more than it must be given."""
    return TECHNIQUES[name](**TECHNIQUES[name].example)  # type: ignore[arg-type]


def needed(name: str, path: str) -> list[str]:
    """The overrides that say so."""
    return [f"{path}.{key}={json.dumps(value)}" for key, value in TECHNIQUES[name].example.items()]


@pytest.mark.parametrize("name", TECHNIQUES)
def test_every_technique_is_a_choice(name: str) -> None:
    recipe = asked(name, *needed(name, "technique"))
    assert recipe.technique == (made(name),)
    assert recipe.output.name == f"rows-{name}"


def test_what_is_no_technique_is_told_with_the_choices() -> None:
    for wrong in ("lroa", "prompt_tuning+lroa"):
        with pytest.raises(ConfigError, match=rf"'lroa' \(did you mean 'lora'\?.*choices: {', '.join(TECHNIQUES)}\)"):
            asked(wrong)
    with pytest.raises(ConfigError, match="full changes the base itself and cannot be combined"):
        asked("full+lora")


@pytest.mark.parametrize("second", OTHERS)
def test_several_at_once(second: str) -> None:
    recipe = asked(f"lora+{second}", "technique.0.rank=2", *needed(second, "technique.1"))
    assert recipe.technique == (LoRA(rank=2), made(second))
    assert recipe.output.name == f"rows-lora-{second}"


def test_the_short_form_of_several_stands_in_recipes_and_comparisons_too(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("data: {train: x}\noutput: {name: y}\ntechnique: lora + prompt_tuning\n")
    assert load_recipe(tmp_path / "recipe.yaml", TuneRecipe).recipe.technique == (LoRA(), PromptTuning())
    entries = CompareRecipe(name="x", data={"train": "x"}, techniques=_parts("full,lora+prompt_tuning")).techniques
    assert [entry.title for entry in entries] == ["full", "lora+prompt_tuning"]
    assert entries[1].technique == (LoRA(), PromptTuning())


@pytest.mark.parametrize("name", TECHNIQUES)
def test_the_examples_in_the_documents_work(name: str, tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    line, command = build.example_lines(TECHNIQUES[name])
    (tmp_path / "recipe.yaml").write_text(f"data: {{train: x}}\noutput: {{name: y}}\n{line}\n")
    assert load_recipe(tmp_path / "recipe.yaml", TuneRecipe).recipe.technique == (made(name),)
    program, verb, rows, option, technique, *overrides = shlex.split(command)
    assert (program, verb, rows, option) == ("tailor", "tune", "rows.jsonl", "-t")
    assert asked(technique, *overrides).technique == (made(name),)
