"""What a sweep's recipe may say: paths, values, techniques; and what it is told when it says something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tailor.config import dump_yaml, load_recipe
from tailor.errors import ConfigError
from tailor.recipes.sweep_settings import HalvingPruning, NoPruning, SweepRecipe
from tailor.recipes.sweep_space import OWN_RATE, Place, Range
from tailor.techniques import TECHNIQUES
from tailor.training.settings import TrainSettings

RANGE = {"low": 1e-4, "high": 1e-2}


def recipe(**more: Any) -> SweepRecipe:
    return SweepRecipe.model_validate({"name": "mine", "data": {"train": "rows.jsonl"}, **more})


def test_a_path_goes_where_it_is_meant() -> None:
    found = recipe(
        search={
            "technique": ["lora", "prompt_tuning", ["ia3", "prompt_tuning"]],
            "lora.rank": [4, 8],
            "technique.num_virtual_tokens": {"low": 4, "high": 32},
            "train.learning_rate": RANGE,
            "lora.train.learning_rate": {"low": 1e-3, "high": 1e-2},
            "train.num_epochs": [1, 3],
        }
    ).space
    places = {one.title: one.places for one in found.alternatives}
    epochs = {"train.num_epochs": Place(None, ("num_epochs",))}
    rate = {"train.learning_rate": Place(None, ("learning_rate",))}
    assert places == {
        "lora": {
            "lora.rank": Place(0, ("rank",)),
            "lora.train.learning_rate": Place(None, ("learning_rate",)),
            **epochs,
        },
        "prompt_tuning": {"technique.num_virtual_tokens": Place(0, ("num_virtual_tokens",)), **rate, **epochs},
        "ia3+prompt_tuning": {"technique.num_virtual_tokens": Place(1, ("num_virtual_tokens",)), **rate, **epochs},
    }
    last = found.named("ia3+prompt_tuning")
    assert last.is_whole("technique.num_virtual_tokens")
    assert not last.is_whole("train.learning_rate")
    techniques, train = last.settings(
        {"technique.num_virtual_tokens": 7, "train.num_epochs": 3}, TrainSettings(num_steps=50, batch_size=2)
    )
    assert [technique.type for technique in techniques] == ["ia3", "prompt_tuning"]
    assert techniques[1].model_dump()["num_virtual_tokens"] == 7
    assert train == TrainSettings(num_epochs=3, batch_size=2)  # either way to say how long replaces both


def test_nested_and_dotted_paths_are_the_same(tmp_path: Path) -> None:
    nested = recipe(search={"train": {"batch_size": [4, 8], "learning_rate": RANGE}, "technique": {"rank": [2, 4]}})
    assert nested == recipe(search={"train.batch_size": [4, 8], "train.learning_rate": RANGE, "technique.rank": [2, 4]})
    path = tmp_path / "sweep.yaml"
    path.write_text(dump_yaml(nested.model_dump(mode="json")))
    assert load_recipe(path, SweepRecipe).recipe == nested
    overrides = ["search.technique.rank=[8, 16]", "search.train.batch_size=[1,2]", "pruner=halving"]
    changed = load_recipe(path, SweepRecipe, overrides).recipe
    assert changed.search["technique.rank"] == (8, 16)
    assert changed.search["train.batch_size"] == (1, 2)
    assert changed.pruner == HalvingPruning()
    assert recipe(pruner=None).pruner == NoPruning()


def test_without_paths_every_technique_has_its_own_space() -> None:
    space = recipe().space
    assert [one.title for one in space.alternatives] == ["lora"]
    assert space.spaces == {"technique.rank": (4, 8, 16, 32), "train.learning_rate": OWN_RATE}
    both = recipe(search={"technique": ["lora", "prompt_tuning"]}).space
    assert set(both.spaces) == {
        *("lora.rank", "lora.train.learning_rate"),
        *("prompt_tuning.num_virtual_tokens", "prompt_tuning.train.learning_rate"),
    }
    assert both.start(both.named("prompt_tuning"), TrainSettings()) == {
        "technique": "prompt_tuning",
        "prompt_tuning.num_virtual_tokens": 50,
        "prompt_tuning.train.learning_rate": 1.0,
    }


def test_what_is_fixed_is_not_searched(tmp_path: Path) -> None:
    fixed = recipe(technique={"type": "lora", "rank": 64})
    assert set(fixed.space.spaces) == {"train.learning_rate"}
    path = tmp_path / "sweep.yaml"
    path.write_text(dump_yaml(fixed.model_dump(mode="json")))
    assert load_recipe(path, SweepRecipe).recipe.space == fixed.space, "a resolved recipe searches the same"
    assert set(recipe(train={"learning_rate": 1e-5}).space.spaces) == {"technique.rank"}
    with pytest.raises(Exception, match="nothing is left to search"):
        recipe(technique="ia3", train={"learning_rate": 1e-5})
    named = recipe(train={"learning_rate": 1e-5}, search={"train.learning_rate": RANGE})
    assert set(named.space.spaces) == {"train.learning_rate"}, "what is named is searched"


SEARCHED = [
    name
    for name, kind in TECHNIQUES.items()
    if kind.traits.defaults is not None
    and kind.traits.frozen_base
    and not any(field.is_required() for field in kind.model_fields.values())
]


@pytest.mark.parametrize("name", SEARCHED)
def test_the_own_space_of_every_technique_can_be_searched_around_its_defaults(name: str) -> None:
    space = recipe(technique=name).space
    (alternative,) = space.alternatives
    assert space.start(alternative, TrainSettings()).keys() == space.spaces.keys()
    assert {key.rpartition(".")[2] for key in space.spaces} == {*TECHNIQUES[name].search, "learning_rate"}


def test_values_that_are_no_plain_ones_come_back_as_they_were() -> None:
    space = recipe(search={"technique.target_modules": ["all-linear", ["q_proj", "v_proj"]]}).space
    assert space.decoded("technique.target_modules", "all-linear") == "all-linear"
    assert space.decoded("technique.target_modules", '["q_proj", "v_proj"]') == ["q_proj", "v_proj"]
    twins = recipe(search={"technique": [{"type": "lora", "dora": True}, {"type": "lora", "rslora": True}, "lora"]})
    assert [one.title for one in twins.space.alternatives] == ["lora", "lora 2", "lora 3"]


WRONG: list[tuple[dict[str, Any], list[str]]] = [
    ({"technique.rnak": [4, 8]}, ["search.technique.rnak", "no setting 'rnak'", "did you mean 'rank'?"]),
    ({"train.lerning_rate": RANGE}, ["no setting 'lerning_rate'", "did you mean 'learning_rate'?"]),
    ({"trian.learning_rate": RANGE}, ["did you mean 'train'?"]),
    ({"ia3.train.learning_rate": RANGE}, ["ia3 is not among the techniques of this sweep (lora)"]),
    ({"technique.rank": [8]}, ["one value is no search"]),
    ({"technique.rank": [8, 8]}, ["one value is no search"]),
    ({"technique.rank": 8}, ["wants a list of values or {low, high}, got 8"]),
    ({"technique.rank": [8, "many"]}, ["'many'", "wants a whole number"]),
    ({"technique.rank": [8, 0]}, ["wants a number of at least 1"]),
    ({"technique.rank": {"low": 1, "high": 8.5}}, ["wants whole numbers"]),
    ({"technique.rank": {"low": 8, "high": 8}}, ["low must be less than high"]),
    ({"train.learning_rate": {"low": 1e-2, "high": 1e-4}}, ["low must be less than high, got low 0.01"]),
    ({"train.weight_decay": {"low": 0, "high": 1, "log": True}}, ["low must be greater than 0"]),
    ({"train.batch_size": {"low": 1, "high": 8, "relative": True}}, ["only train.learning_rate"]),
    ({"train.learning_rate": {**RANGE, "relativ": True}}, ["unknown setting (did you mean 'relative'?"]),
    ({"train.seed": [0, 1]}, ["train.seed is not searched: it decides the split"]),
    ({"technique": ["lora", "full"]}, ["full changes the base itself", "tailor compare --tune"]),
    ({"technique": ["lora", "prompting"]}, ["prompting trains nothing"]),
    ({"technique": ["lora", "lroa"]}, ["unknown type 'lroa' (did you mean 'lora'?"]),
    ({"technique": ["lora", {"type": "ia3", "rank": 4}]}, ["unknown setting"]),
    ({"train.num_steps": [8, 9], "lora.train.num_epochs": [1, 2]}, ["num_steps", "one would have no effect"]),
    ({"lora.rank": [1, 2], "technique.rank": [2, 4]}, ["search.technique.rank", "has no effect"]),
]


@pytest.mark.parametrize(("search", "told"), WRONG, ids=[str(search)[:60] for search, _ in WRONG])
def test_what_is_wrong_is_said(search: dict[str, Any], told: list[str], tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(dump_yaml({"name": "mine", "data": {"train": "rows.jsonl"}, "search": search}))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, SweepRecipe)
    assert [part for part in told if part not in caught.value.message] == [], caught.value.message
    lines = caught.value.message.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(f"{path}:")
    assert int(lines[0].removeprefix(f"{path}:").partition(":")[0]) >= 5  # below `search:`, where it was written


def test_two_ways_to_say_the_technique_are_refused() -> None:
    with pytest.raises(Exception, match="this one would have no effect"):
        recipe(technique="lora", search={"technique": ["lora", "ia3"]})
    with pytest.raises(Exception, match=r"write technique\.0\.dropout or technique\.1\.dropout"):
        recipe(technique=["lora", "adapter"], search={"technique.dropout": [0.0, 0.1]})
    found = recipe(technique=["lora", "adapter"], search={"technique.1.dropout": [0.0, 0.1]}).space
    assert found.alternatives[0].places == {"technique.1.dropout": Place(1, ("dropout",))}


def test_a_range_holds_what_it_was_given() -> None:
    assert Range(low=1, high=8) == Range.model_validate({"low": 1, "high": 8})
    with pytest.raises(ConfigError, match="low must be less than high"):
        Range(low=2, high=1)
