"""A plan agrees with the run it plans, loads nothing, and suggests only what fits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from mood_rows import write_lines, write_moods
from tailor.data.dataset import load_dataset
from tailor.errors import ConfigError, DataError, ResourceError
from tailor.models.files import EMBEDDED
from tailor.recipes import plan as plans
from tailor.recipes import plan_estimate
from tailor.recipes.plan import plan
from tailor.recipes.plan_estimate import estimate_tune, sketch_tune
from tailor.recipes.tune import tune
from tailor.recipes.tune_settings import TuneRecipe
from tiny_models import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("own_home")

MIB = 2**20


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_moods(tmp_path, repeats=8)


def recipe_for(rows: Path, technique: Any = "lora", **train: Any) -> TuneRecipe:
    return TuneRecipe(data={"train": str(rows)}, technique=technique, train=train, output={"name": "moods"})


@pytest.mark.parametrize(
    "technique", ["lora", {"type": "prompt_tuning", "num_virtual_tokens": 7}, "full", {"type": "lora", "dropout": 0.1}]
)
def test_a_plan_counts_what_the_run_does(rows: Path, tmp_path: Path, own_home: Path, technique: Any) -> None:
    tiny_model().save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().hf.save_pretrained(tmp_path / "tiny")
    recipe = TuneRecipe(
        base=str(tmp_path / "tiny"),
        data={"train": str(rows)},
        technique=technique,
        train={"num_steps": 3, "batch_size": 100, "tokens_per_batch": 500, "eval_every": 2},
        output={"name": "moods", "verify": False},
    )
    found = plan(recipe, measure=False)
    work, disk = found.estimate.work, found.estimate.disk
    assert work is not None
    result = tune(recipe, quiet=True)
    metrics = result.artifact.manifest["metrics"]
    assert found.sketch.slot.num_parameters == result.artifact.manifest["num_parameters"]
    assert work.num_tokens == metrics["num_tokens"]  # a step takes all rows, so the draw does not matter
    assert (work.num_steps, work.num_validations) == (3, 2)
    assert found.estimate.heaviest is not None
    assert found.estimate.heaviest.tokens <= 500
    artifact = sum(p.stat().st_size for p in result.artifact.folder.glob("*.safetensors"))
    checkpoint = sum(p.stat().st_size for p in own_home.glob("runs/*/checkpoint/*.safetensors"))
    assert disk.artifact == pytest.approx(artifact, abs=20_000)  # headers
    assert disk.checkpoint == pytest.approx(checkpoint, abs=20_000)
    assert disk.download == 0


def test_no_weights_are_read_or_allocated(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were asked for")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr("safetensors.torch.load_file", refuse)
    found = plan(recipe_for(rows, "full", num_steps=2), measure=False)
    assert all(parameter.is_meta for parameter in found.sketch.base.model.parameters())
    assert found.seconds is None
    assert found.verdict in ("fits", "tight")
    found.check()


def test_the_base_of_a_plan_is_the_one_on_disk(rows: Path) -> None:
    found = plan(recipe_for(rows), measure=False)
    stored = (EMBEDDED["tailor-nano"] / "model.safetensors").stat().st_size
    assert found.estimate.needs.converted == stored  # bfloat16 there, float32 here
    assert found.estimate.needs.weights == pytest.approx(2 * stored, rel=0.01)
    narrow = TuneRecipe(base={"dtype": "bfloat16"}, data={"train": str(rows)}, technique="lora", output={"name": "m"})
    assert plan(narrow, measure=False).estimate.needs.converted == 0


def test_memory_grows_with_tokens_per_batch_and_falls_with_what_is_trained(rows: Path) -> None:
    dataset = load_dataset(recipe_for(rows).data, 0)
    peaks = {}
    for technique in ("prompting", "lora", "full"):
        chosen = {"type": technique, "shots": 2} if technique == "prompting" else technique
        sketch = sketch_tune(recipe_for(rows, chosen, batch_size=100), dataset)
        peaks[technique] = [estimate_tune(sketch, tokens).peak.bytes for tokens in (64, 256)]
    assert peaks["prompting"][0] == peaks["prompting"][1]
    assert peaks["lora"][0] < peaks["lora"][1]
    assert peaks["full"][0] < peaks["full"][1]
    assert peaks["prompting"][1] < peaks["lora"][1] < peaks["full"][1]


def test_prompting_trains_nothing(rows: Path) -> None:
    found = plan(recipe_for(rows, {"type": "prompting", "shots": 2}))
    assert found.estimate.work is None
    assert found.seconds == 0.0
    assert found.to_dict()["training"] is None
    assert [moment.name for moment in found.estimate.moments] == ["loading", "verification"]


def test_what_does_not_fit_gets_suggestions_that_do(rows: Path) -> None:
    recipe = recipe_for(rows, "full", batch_size=100, learning_rate=1e-4)
    fitting = plan(recipe, measure=False).estimate.peak.bytes
    free = round(0.97 * fitting)
    found = plan(recipe, memory=free, measure=False)
    assert found.verdict == "does not fit"
    with pytest.raises(ResourceError, match="free") as caught:
        found.check()
    assert caught.value.exit_code == 5
    assert caught.value.hint is not None
    assert "technique=lora train.learning_rate=null" in caught.value.hint
    assert {"technique=lora", "base.dtype=bfloat16"} <= {part for s in found.suggestions for part in s.overrides}
    path = rows.parent / "recipe.yaml"
    path.write_text(json.dumps(recipe.model_dump(mode="json")))
    for suggestion in found.suggestions:
        changed = plan(path, suggestion.overrides, memory=free, measure=False)
        assert changed.misfit is None
        assert changed.estimate.peak.bytes == suggestion.bytes


def test_fewer_tokens_per_batch_are_suggested_when_they_are_enough(rows: Path) -> None:
    recipe = recipe_for(rows, batch_size=100, tokens_per_batch=1024)
    dataset = load_dataset(recipe.data, 0)
    sketch = sketch_tune(recipe, dataset)
    free = round(1.11 * estimate_tune(sketch, 128).peak.bytes)
    assert estimate_tune(sketch).peak.bytes > free
    first = plan(recipe, memory=free, measure=False).suggestions[0]
    assert first.overrides[0].startswith("train.tokens_per_batch=")
    tokens = int(first.overrides[0].partition("=")[2])
    assert 128 <= tokens < 1024
    assert estimate_tune(sketch, tokens).peak.bytes == first.bytes < free


def test_nothing_is_suggested_when_nothing_fits(rows: Path) -> None:
    found = plan(recipe_for(rows), memory=100 * MIB, measure=False)
    assert found.suggestions == ()
    with pytest.raises(ResourceError) as caught:
        found.check()
    assert caught.value.hint == "choose a smaller base, or a machine with more memory"


def test_a_full_disk_is_told(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    found = plan(recipe_for(rows), measure=False)
    assert found.misfit is not None
    assert "write" in found.misfit
    assert found.verdict == "does not fit"


def test_rows_beyond_the_sample_are_taken_to_be_alike(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan(recipe_for(rows, batch_size=8, num_epochs=2), measure=False)
    monkeypatch.setattr(plan_estimate, "SAMPLED_TRAIN", 7)
    monkeypatch.setattr(plan_estimate, "SAMPLED_VALIDATION", 1)
    part = plan(recipe_for(rows, batch_size=8, num_epochs=2), measure=False)
    assert part.sketch.num_train == whole.sketch.num_train
    assert part.sketch.resolved == whole.sketch.resolved
    assert len(part.sketch.train) == 7
    assert part.sketch.sampled
    assert any("7 of" in note for note in part.notes)
    assert part.estimate.work is not None
    assert whole.estimate.work is not None
    assert part.estimate.work.num_tokens == pytest.approx(whole.estimate.work.num_tokens, rel=0.3)


def test_mistakes_are_those_of_tune(rows: Path) -> None:
    with pytest.raises(ConfigError, match="unknown"):
        plan(recipe_for(rows).model_copy(update={"objective": "sfd"}))
    with pytest.raises(ConfigError, match="overrides"):
        plan(recipe_for(rows), ["train.num_steps=2"])
    short = TuneRecipe(data={"train": str(rows), "max_seq_len": 8}, technique="lora", output={"name": "moods"})
    with pytest.raises(DataError, match=r"moods\.jsonl:"):
        plan(short)
    lines = [{"prompt": f"p {k}", "chosen": "a", "rejected": "b"} for k in range(6)]
    pairs = recipe_for(write_lines(rows.parent / "pairs.jsonl", lines))
    for mistaken in (lambda: plan(pairs), lambda: tune(pairs)):
        with pytest.raises(DataError, match=r"a Comparison, but objective sft wants PromptCompletion or Conversation"):
            mistaken()


def test_the_speed_is_measured_for_a_run_that_fits(rows: Path) -> None:
    found = plan(recipe_for(rows, num_steps=4))
    assert found.seconds is not None
    assert found.seconds > 0
    assert found.to_dict()["seconds"] == found.seconds
    assert plan(recipe_for(rows, num_steps=4), memory=MIB).seconds is None
