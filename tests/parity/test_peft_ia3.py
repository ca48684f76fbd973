"""PEFT reads our IA3 and we read PEFT's: the same logits on the same tiny model, and not the base's."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peft_files import CLOSE, IDS, MARKS, read, shake, their_logits, write
from tailor.artifacts import artifact as artifacts
from tailor.errors import ConfigError
from tailor.models.base import Base
from tailor.models.slots import Slot
from tailor.techniques.ia3 import IA3
from tiny_models import ARCHITECTURES, tiny_base, tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

pytestmark = MARKS


def attached(base: Base, technique: IA3) -> Slot:
    slot = base.host.attach([technique], seed=3)
    shake(slot.parameters.values(), 0.2)
    return slot


def differs_from_base(logits: Tensor, base: Base) -> None:
    assert float((logits - base.logits(IDS)).abs().max()) > 1e-2


OURS = {
    "default": IA3(),
    "some layers": IA3(target_layers=(0, 2)),
    "whole modules": IA3(target_modules=("*.0.*", "*.2.*"), feedforward_modules=("*.2.*",)),
}


@pytest.mark.parametrize("technique", OURS.values(), ids=OURS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_peft_reads_our_ia3(model_type: str, technique: IA3, tmp_path: Path) -> None:
    """Every warning is an error: PEFT only warns of keys that match nothing. Biases, Conv1D and fused ones too."""
    base = tiny_base(model_type)
    slot = attached(base, technique)
    files = technique.to_peft(slot)
    found = their_logits(peft.PeftModel.from_pretrained(tiny_model(model_type), str(write(tmp_path, files))).eval())
    torch.testing.assert_close(found, base.logits(IDS, slot.number), **CLOSE)
    differs_from_base(found, base)
    slot.bake()
    baked = technique.to_peft(slot)
    assert baked[0] == files[0]
    assert all(torch.equal(tensor, baked[1][name]) for name, tensor in files[1].items())


THEIRS: dict[str, tuple[list[str], list[str]]] = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "qwen2": (["q_proj", "v_proj", "down_proj"], ["down_proj"]),
    "opt": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt_neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "phi3": (["qkv_proj", "down_proj"], ["down_proj"]),
    "mixtral": (["k_proj", "v_proj"], []),
}


@pytest.mark.parametrize("model_type", THEIRS)
def test_we_read_peft_ia3(model_type: str, tmp_path: Path) -> None:
    targets, feedforward = THEIRS[model_type]
    config = peft.IA3Config(
        task_type="CAUSAL_LM",
        target_modules=targets,
        feedforward_modules=feedforward,
        fan_in_fan_out=model_type == "gpt2",
    )
    model = peft.get_peft_model(tiny_model(model_type), config).eval()
    shake((p for name, p in model.named_parameters() if "ia3_l" in name), 0.2)
    model.save_pretrained(str(tmp_path))
    base = tiny_base(model_type)
    slot = artifacts.attach(base, artifacts.find(tmp_path))
    expected = their_logits(model)
    torch.testing.assert_close(base.logits(IDS, slot.number), expected, **CLOSE)
    differs_from_base(expected, base)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "qwen3"])
def test_we_read_what_peft_takes_for_its_defaults(model_type: str, tmp_path: Path) -> None:
    """They differ by family (qwen 3: queries instead of keys), so the targets are those the tensors name."""
    config = peft.IA3Config(task_type="CAUSAL_LM", fan_in_fan_out=model_type == "gpt2")
    model = peft.get_peft_model(tiny_model(model_type), config).eval()
    shake((p for name, p in model.named_parameters() if "ia3_l" in name), 0.2)
    model.save_pretrained(str(tmp_path))
    technique, state = IA3.from_peft(*read(tmp_path))
    base = tiny_base(model_type)
    slot = base.host.attach([technique])
    slot.load(state)
    torch.testing.assert_close(base.logits(IDS, slot.number), their_logits(model), **CLOSE)


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_there_and_back_is_the_same_file(model_type: str, tmp_path: Path) -> None:
    base = tiny_base(model_type)
    files = IA3().to_peft(attached(base, IA3()))
    (tmp_path / "ours").mkdir()
    model = peft.PeftModel.from_pretrained(tiny_model(model_type), str(write(tmp_path / "ours", files)))
    model.save_pretrained(str(tmp_path / "theirs"))
    config, tensors = read(tmp_path / "theirs")
    assert tensors.keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in tensors.items())
    assert sorted(config["target_modules"]) == files[0]["target_modules"]
    assert sorted(config["feedforward_modules"]) == files[0]["feedforward_modules"]


def test_the_names_are_short_where_they_say_the_same() -> None:
    config, tensors = IA3().to_peft(attached(tiny_base(), IA3()))
    assert config["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert config["feedforward_modules"] == ["down_proj"]
    shapes = {name.removeprefix("base_model.model.model.layers.0."): tuple(t.shape) for name, t in tensors.items()}
    assert shapes["self_attn.k_proj.ia3_l"] == (16, 1)
    assert shapes["mlp.down_proj.ia3_l"] == (1, 48)


# ------------------------------------------------------------------------------------------------ refusals


def test_files_that_are_no_ia3_are_refused() -> None:
    config, tensors = IA3().to_peft(attached(tiny_base(), IA3()))
    name, tensor = next(iter(tensors.items()))
    with pytest.raises(ConfigError, match="not part of an IA3 adapter"):
        IA3.from_peft(config, tensors | {name.replace("ia3_l", "lora_A.weight"): tensor})
    with pytest.raises(ConfigError, match="not part of an IA3 adapter"):
        IA3.from_peft(config, {name.removeprefix("base_model.model."): tensor})
    with pytest.raises(ConfigError, match=r"has shape \(4, 4\); IA3's are"):
        IA3.from_peft(config, {name: torch.ones(4, 4)})
    with pytest.raises(ConfigError, match="holds no tensors"):
        IA3.from_peft(config, {})
    with pytest.raises(ConfigError, match="sets modules_to_save="):
        IA3.from_peft(config | {"modules_to_save": ["lm_head"]}, tensors)
    with pytest.raises(ConfigError, match="matches no linear layer"):
        tiny_base("gpt2").host.attach([IA3.from_peft(config, tensors)[0]])
