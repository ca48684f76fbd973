"""Prompt tables: tasks added one by one, their bytes kept, served and scored by name, exported one at a time."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from tailor.artifacts.artifact import every, find, save, update_manifest
from tailor.cli.main import run
from tailor.config import load_recipe
from tailor.errors import ConfigError, ConflictError, NotFoundError
from tailor.inference.load import load
from tailor.recipes.evaluate import evaluate
from tailor.recipes.export import export
from tailor.recipes.tune import tune
from tailor.recipes.tune_save import TuneResult
from tailor.recipes.tune_settings import TuneRecipe
from tailor.recipes.verify import verify
from tailor.techniques.prompt_tuning import PromptTuning
from tiny_models import tiny_base

SIZES = ("small", "large", "tiny", "huge")
TEMPLATE = {
    "taskname": "size",
    "prompt_template": "<|VIRTUAL_PROMPT_0|>A {thing}<|VIRTUAL_PROMPT_1|> is:{size}",
    "total_virtual_tokens": 5,
    "virtual_token_splits": [2, 3],
    "truncate_field": None,
    "answer_only_loss": True,
    "answer_field": "size",
}


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    """24 rows of a task with fields of its own."""
    path = tmp_path / "sizes.jsonl"
    rows = [{"taskname": "size", "thing": f"thing {k}", "size": SIZES[k % 4]} for k in range(24)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def tuned(base: Path, rows: Path, technique: dict[str, Any], **output: Any) -> TuneResult:
    settings: dict[str, Any] = {
        "base": {"name": str(base), "dtype": "float32", "device": "cpu"},
        "data": {"train": str(rows)},
        "technique": {"num_virtual_tokens": 3, **technique},
        "train": {"num_steps": 3, "batch_size": 4, "learning_rate": 0.01},
        "output": {"name": "table", "add": True, **output},
    }
    return tune(load_recipe(None, TuneRecipe, (), settings).recipe, quiet=True)


def colour(base: Path, rows: Path, **output: Any) -> TuneResult:
    return tuned(base, rows, {"type": "prompt_tuning", "task": "colour"}, **output)


def size(base: Path, rows: Path, **output: Any) -> TuneResult:
    technique = {"type": "p_tuning", "encoder_hidden": 8, "template": TEMPLATE, "num_virtual_tokens": 5}
    return tuned(base, rows, technique, **output)


def raw(path: Path, key: str) -> bytes:
    """The bytes of one tensor as they stand in a safetensors file, found through its header."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    first, last = json.loads(data[8:start])[key]["data_offsets"]
    return data[start + first : start + last]


@pytest.fixture
def table(tiny_folder: Path, rows: Path, sizes: Path) -> Path:
    """A prompt-tuned task, and a p-tuned one with a template beside it."""
    colour(tiny_folder, rows)
    return size(tiny_folder, sizes).artifact.folder


def test_a_task_is_added_without_touching_another(tiny_folder: Path, rows: Path, sizes: Path) -> None:
    first = colour(tiny_folder, rows)
    file = first.artifact.folder / "prompt_table.safetensors"
    before, told = raw(file, "colour"), find("table").manifest["tasks"]["colour"]
    assert len(before) == 3 * 32 * 4
    second = size(tiny_folder, sizes)
    assert second.artifact.task == "size"
    assert raw(file, "colour") == before
    artifact = find("table")
    assert artifact.tasks == ("colour", "size")
    assert artifact.kind == "prompt_tuning+p_tuning"
    assert artifact.manifest["tasks"]["colour"] == told
    with safe_open(file, "pt") as tensors:
        assert {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()} == {  # noqa: SIM118
            "colour": (3, 32),
            "size": (5, 32),
        }
    for task, result in (("colour", first), ("size", second)):
        facts = artifact.manifest["tasks"][task]
        assert facts["parity"]["passed"]
        assert facts["metrics"]["num_steps"] == 3
        assert facts["data"]["content_hash"] == result.dataset.content_hash
        assert facts["techniques"][0]["task"] == task
        assert facts["run"] == result.run.name if result.run else False
    assert artifact.manifest["num_parameters"] == 3 * 32 + 5 * 32
    kept = artifact.folder / "training_state.safetensors"
    with safe_open(kept, "pt") as tensors:
        assert all(key.startswith("size/prompt_encoder") for key in tensors.keys())  # noqa: SIM118
    colour(tiny_folder, rows, force=True)
    assert raw(file, "size") == raw(second.artifact.folder / "prompt_table.safetensors", "size")
    assert kept.is_file()


def test_tasks_that_are_added_at_the_same_time_are_all_kept(own_home: Path) -> None:
    base = tiny_base()
    made = [PromptTuning(num_virtual_tokens=2, task=f"task {k}") for k in range(6)]
    slots = [base.host.attach([technique]) for technique in made]

    def add(k: int) -> None:
        artifact = save("table", base, slots[k], [made[k]], {}, add=True)
        update_manifest(artifact, parity={"passed": True})

    with ThreadPoolExecutor(len(made)) as pool:
        list(pool.map(add, range(len(made))))
    artifact = find("table")
    assert sorted(artifact.tasks) == [f"task {k}" for k in range(6)]
    assert all(facts["parity"]["passed"] for facts in artifact.manifest["tasks"].values())
    with safe_open(artifact.folder / "prompt_table.safetensors", "pt") as tensors:
        assert set(tensors.keys()) == set(artifact.tasks)
    assert [found.name for found in every()] == ["table"]


def test_every_task_answers_as_it_was_trained(table: Path, tiny_folder: Path, rows: Path, sizes: Path) -> None:
    whole = load("table")
    asked = {"colour": "thing number 3?", "size": json.dumps({"thing": "thing 3"})}
    together = whole.backend
    for task, prompt in asked.items():
        alone = load("table", task=task)
        assert alone.slot is not None
        assert len(alone.slot.prompts) == 1
        assert alone.generate(prompt, max_new_tokens=4) == whole.generate(prompt, task=task, max_new_tokens=4)
        assert verify("table", task=task).passed
    assert whole.slot is not None
    assert {task: len(prompt.ids) for task, prompt in whole.slot.prompts.items()} == {"colour": 3, "size": 5}
    assert together.rendering("table", "size").tasks["size"].template is not None
    with pytest.raises(NotFoundError, match="there is no task 'colur'") as error:
        whole.generate("x", task="colur")
    assert "did you mean 'colour'" in str(error.value.hint)
    with pytest.raises(NotFoundError, match="table has no task 'colur'"):
        load("table", task="colur")
    with pytest.raises(ConfigError, match="table holds 2 tasks") as several:
        verify("table")
    assert "colour, size" in str(several.value.hint)


def test_a_mixed_file_is_scored_row_by_row(table: Path, tmp_path: Path) -> None:
    mixed = tmp_path / "mixed.jsonl"
    rows: list[dict[str, str]] = []
    for k in range(6):
        rows.append({"taskname": "colour", "prompt": f"thing number {k}?", "completion": "red"})
        rows.append({"taskname": "size", "thing": f"thing {k}", "size": "tiny"})
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = evaluate(load("table"), mixed)
    parts = {}
    for task in ("colour", "size"):
        own = tmp_path / f"{task}.jsonl"
        own.write_text("".join(json.dumps(row) + "\n" for row in rows if row["taskname"] == task))
        parts[task] = evaluate(load("table", task=task), own)
    found = [row.completion for row in whole.rows]
    limit = min(len(str(row.completion)) for part in parts.values() for row in part.rows)
    for k, task in enumerate(("colour", "size")):
        expected = [str(row.completion)[:limit] for row in parts[task].rows]
        assert [str(text)[:limit] for text in found[k::2]] == expected


def test_what_cannot_be_added(tiny_folder: Path, rows: Path, sizes: Path, tmp_path: Path) -> None:
    colour(tiny_folder, rows)
    with pytest.raises(ConflictError, match="prompt table 'table' has a task 'colour' already"):
        colour(tiny_folder, rows)
    with pytest.raises(ConfigError, match=r"output\.add adds one task to a prompt table"):
        tuned(tiny_folder, rows, {"type": "prompt_tuning"})
    tuned(tiny_folder, rows, {"type": "prompt_tuning"}, name="plain", add=False)
    with pytest.raises(ConflictError, match="artifact 'plain' is no prompt table"):
        colour(tiny_folder, rows, name="plain")
    assert find("table").tasks == ("colour",)
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other-llama"
    other.mkdir()
    for path in tiny_folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    tensors = load_file(other / "model.safetensors")
    save_file({k: t * 1.5 for k, t in tensors.items()}, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConflictError, match="has other weights"):
        size(other, sizes)


def test_training_goes_on_from_a_task(table: Path, tiny_folder: Path, sizes: Path) -> None:
    recipe = load_recipe(None, TuneRecipe, (), find("table").of_task("size").manifest["recipe"]).recipe
    output = recipe.output.model_copy(update={"force": True})
    before = raw(table / "prompt_table.safetensors", "colour")
    again = tune(recipe.model_copy(update={"start": "table", "output": output}), quiet=True)
    assert again.artifact.task == "size"
    assert raw(table / "prompt_table.safetensors", "colour") == before
    assert find("table").tasks == ("colour", "size")


def test_one_task_is_exported_for_peft_when_its_tokens_lead(table: Path, tmp_path: Path) -> None:
    assert export("table", tmp_path / "out", "peft", task="colour").passed
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["peft_type"], config["num_virtual_tokens"]) == ("PROMPT_TUNING", 3)
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as tensors:
        (key,) = tensors.keys()
        exported = tensors.get_tensor(key)
    with safe_open(table / "prompt_table.safetensors", "pt") as tensors:
        assert torch.equal(exported, tensors.get_tensor("colour"))
    with pytest.raises(ConfigError, match="table holds 2 tasks"):
        export("table", tmp_path / "all", "peft")
    with pytest.raises(ConfigError, match=r"stand at 2 marker\(s\) of a template"):
        export("table", tmp_path / "size", "peft", task="size")
    assert not (tmp_path / "size").exists()


def test_markers_without_a_task_are_no_peft_files(tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    text = "It is <|VIRTUAL_PROMPT_0|>{prompt}"
    result = tuned(tiny_folder, rows, {"type": "prompt_tuning", "template": text}, name="marked", add=False)
    assert result.artifact.manifest["parity"]["passed"]
    assert sorted(path.name for path in result.artifact.folder.iterdir()) == ["prompt_table.safetensors", "tailor.json"]
    assert load("marked").generate("thing number 3?", max_new_tokens=3) is not None
    assert verify("marked").passed
    with pytest.raises(ConfigError, match=r"marked cannot be exported for PEFT: .* template"):
        export("marked", tmp_path / "out", "peft")


def test_from_the_command_line(
    tiny_folder: Path, rows: Path, sizes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--base", str(tiny_folder), "--device", "cpu", "--dtype", "float32", "-n", "cli", "--add", "-q"]
    steps = ["train.num_steps=2", "technique.num_virtual_tokens=2", "--no-verify"]
    assert run(["tune", str(rows), "-t", "prompt_tuning", "--task", "colour", *common, *steps]) == 0
    text = "technique.template=A {thing} is<|VIRTUAL_PROMPT_0|>{size}"
    field = "technique.template.answer_field=size"
    assert run(["tune", str(sizes), "-t", "prompt_tuning", "--task", "size", text, field, *common, *steps]) == 0
    capsys.readouterr()
    assert run(["artifacts", "list"]) == 0
    assert "(colour, size)" in " ".join(capsys.readouterr().out.split())
    assert run(["artifacts", "show", "cli", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)["tasks"]) == ["colour", "size"]
    assert run(["generate", "cli", "thing number 3?", "--task", "colour", "--max-new-tokens", "3"]) == 0
    assert run(["generate", "cli", '{"thing": "thing 3"}', "--task", "size", "--max-new-tokens", "3"]) == 0
    assert run(["generate", "cli", "--file", str(sizes), "--max-new-tokens", "2"]) == 0
    assert run(["generate", "cli", "hello"]) == 4
    assert "several tasks (colour, size)" in capsys.readouterr().err
    assert run(["generate", "cli", "hello", "--task", "colur"]) == 6
    assert "did you mean 'colour'" in capsys.readouterr().err
    assert run(["eval", "cli", str(sizes), "--task", "size", "--max-rows", "4", "-q", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_rows"] == 4
    assert run(["artifacts", "export", "cli", str(tmp_path / "peft"), "--task", "colour"]) == 0
    assert [artifact.name for artifact in every()] == ["cli"]
