"""Merge, export, import, fingerprints, removal: an artifact on its way to other tools and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_tune import recipe

from tailor.artifacts import artifact as artifacts
from tailor.cli.main import run
from tailor.errors import ConfigError, ConflictError, NotFoundError, QualityError
from tailor.evaluation.parity import Parity
from tailor.inference.load import load
from tailor.recipes import export as export_recipe
from tailor.recipes.export import export, merge
from tailor.recipes.tune import tune
from tailor.recipes.verify import verify
from tailor.text.messages import user
from tiny_models import tiny_model, tiny_tokenizer


@pytest.fixture
def lora(tiny_folder: Path, rows: Path) -> str:
    tune(recipe(tiny_folder, rows, "lora", "mine", num_steps=4), quiet=True)
    return "mine"


def test_merged_is_a_base_that_answers_the_same(lora: str) -> None:
    artifact, parity = merge(lora, "mine-merged")
    assert parity.passed
    assert artifact.manifest["parent"] == lora
    merged, unmerged = load("mine-merged"), load(lora)
    assert merged.slot is None
    ids = unmerged.base.renderer.prompt([user("thing number 3?")])
    assert unmerged.slot is not None
    torch.testing.assert_close(
        merged.base.logits(ids), unmerged.base.logits(ids, unmerged.slot.number), atol=1e-5, rtol=0
    )
    with pytest.raises(ConflictError, match="already"):
        merge("mine-merged", "twice")


def test_an_export_that_differs_is_refused_and_leaves_nothing(
    lora: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = artifacts.write_merged

    def broken(base, slot, techniques, folder) -> None:  # type: ignore[no-untyped-def]
        write(base, slot, techniques, folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.norm.weight"] *= 1.1
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export_recipe.artifacts, "write_merged", broken)
    with pytest.raises(QualityError, match="merged weights"):
        export(lora, tmp_path / "out", "hf")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".*out*"))


def test_peft_export_loads_here_again_without_our_manifest(lora: str, tmp_path: Path, tiny_folder: Path) -> None:
    assert export(lora, tmp_path / "adapter", "peft").passed
    assert sorted(p.name for p in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again, first = load(tmp_path / "adapter", base=str(tiny_folder)), load(lora)
    prompts = ["thing number 3?", "thing number 9?"]
    assert [c.token_ids for c in again.complete(prompts, max_new_tokens=5)] == [
        c.token_ids for c in first.complete(prompts, max_new_tokens=5)
    ]


def test_prompt_tuning_cannot_be_merged(tiny_folder: Path, rows: Path) -> None:
    tune(recipe(tiny_folder, rows, "prompt_tuning", "soft", num_steps=2), quiet=True)
    with pytest.raises(ConfigError, match="prompt_tuning cannot be merged"):
        merge("soft", "never")


def test_a_base_with_other_weights_is_refused_by_name(lora: str, tmp_path: Path) -> None:
    tiny_model("llama", num_hidden_layers=2, seed=1).save_pretrained(tmp_path / "other")
    tiny_tokenizer().hf.save_pretrained(tmp_path / "other")
    with pytest.raises(ConflictError, match=r"mine.*other weights"):
        load(lora, base=str(tmp_path / "other"))


def test_an_adapter_that_matches_nothing_is_an_error(lora: str, tmp_path: Path, tiny_folder: Path) -> None:
    export(lora, tmp_path / "adapter", "peft")
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    renamed = {k.replace("base_model.model.model.", "base_model.model."): v for k, v in load_file(path).items()}
    save_file(renamed, path, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="28 match nothing"):
        load(tmp_path / "adapter", base=str(tiny_folder))


def test_list_show_rm(lora: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["artifacts", "list", "--json"]) == 0
    assert [a["name"] for a in json.loads(capsys.readouterr().out)["artifacts"]] == [lora]
    assert run(["artifacts", "show", lora]) == 0
    assert "fingerprint" in capsys.readouterr().out
    assert run(["artifacts", "rm", lora]) == 2  # nobody to ask
    assert run(["artifacts", "rm", lora, "--yes"]) == 0
    assert run(["artifacts", "show", lora]) == 6
    with pytest.raises(NotFoundError):
        artifacts.find(lora)


def test_verify_reads_the_held_out_rows_again(lora: str) -> None:
    parity = verify(lora)
    assert isinstance(parity, Parity)
    assert parity.passed
    assert parity.noise_floor < parity.gate


def test_a_model_of_its_own_takes_no_other_base(tiny_folder: Path, rows: Path) -> None:
    tune(recipe(tiny_folder, rows, "full", "own", num_steps=2), quiet=True)
    with pytest.raises(ConflictError, match="model of its own"):
        load("own", base=str(tiny_folder))


def test_changed_rows_are_not_taken_for_held_out_ones(lora: str, rows: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "others.jsonl"
    held_out.write_text(rows.read_text())
    rows.write_text(rows.read_text().replace("red", "pink"))
    with pytest.raises(ConflictError, match="changed"):
        verify(lora)
    assert verify(lora, data=str(held_out)).passed
    rows.unlink()
    with pytest.raises(ConflictError, match="gone"):
        merge(lora, "never")
    assert merge(lora, "now", data=str(held_out))[1].passed
