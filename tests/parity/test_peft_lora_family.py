"""rsLoRA, DoRA, PiSSA, patterns and starts against PEFT, in both directions, unmerged and merged."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import technique_cases as cases
from peft_files import CLOSE, IDS, MARKS, read, shake, their_logits, write
from tailor.artifacts.files import merged_weights
from tailor.data.examples import Example
from tailor.data.packing import Placed
from tailor.errors import ConfigError
from tailor.models.base import Base
from tailor.models.slots import Slot
from tailor.techniques.lora import LoRA
from tiny_models import tiny_base, tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

pytestmark = MARKS

MODELS = ["llama", "gpt2", "gpt_neox"]  # plain, Conv1D, with biases
ENDS = {"llama": ("q_proj", "down_proj"), "gpt2": ("c_attn", "c_fc"), "gpt_neox": ("query_key_value", "dense_4h_to_h")}


def merged_logits(base: Base, slot: Slot, model_type: str) -> Tensor:
    """Of a model whose weights the slot was folded into."""
    model = tiny_model(model_type)
    with torch.no_grad():
        for name, tensor in merged_weights(base, slot).items():
            model.get_parameter(name).copy_(tensor)
    return their_logits(model)


def same_everywhere(base: Base, slot: Slot, model: Any, model_type: str) -> None:
    """Ours, theirs, ours merged and theirs merged; and not the base."""
    found = base.logits(IDS, slot.number)
    assert float((found - base.logits(IDS)).abs().max()) > 1e-2
    torch.testing.assert_close(their_logits(model), found, **CLOSE)
    torch.testing.assert_close(merged_logits(base, slot, model_type), found, **CLOSE)
    torch.testing.assert_close(their_logits(model.merge_and_unload()), found, **CLOSE)


OURS: dict[str, dict[str, Any]] = {
    "rslora": {"rank": 4, "alpha": 5.0, "rslora": True},
    "dora": {"rank": 3, "alpha": 7.0, "dora": True},
    "dora and rslora": {"rank": 4, "alpha": 5.0, "dora": True, "rslora": True, "dropout": 0.1},
    "pissa": {"rank": 3, "alpha": 6.0, "init": "pissa"},
    "pissa and rslora": {"rank": 3, "alpha": 2.0, "init": "pissa", "rslora": True},
    "pissa and dora": {"rank": 3, "alpha": 3.0, "init": "pissa", "dora": True},
    "patterns": {"rank": 2, "alpha": 4.0, "rank_pattern": {"*.1.*": 5, "END": 3}, "alpha_pattern": {"END": 9.0}},
    "one whole end": {"rank": 2, "rank_pattern": {"END": 3}, "exclude_modules": ("*.0.*",)},
    "pissa with patterns": {"rank": 2, "alpha": 2.0, "init": "pissa", "rank_pattern": {"END": 3}, "rslora": True}
    | {"alpha_pattern": {"*.2.*": 3.0}},
    "starts": {"rank": 2, "init_a": "zero", "init_b": "xavier", "lora_plus_ratio": 16.0},
}


def for_model(settings: dict[str, Any], model_type: str) -> LoRA:
    named = {
        key: {k.replace("END", ENDS[model_type][1]): v for k, v in value.items()} if key.endswith("pattern") else value
        for key, value in settings.items()
    }
    return LoRA(**named)


@pytest.mark.parametrize("settings", OURS.values(), ids=OURS)
@pytest.mark.parametrize("model_type", MODELS)
def test_peft_reads_ours_and_we_read_it_back(model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_base(model_type)
    technique = for_model(settings, model_type)
    slot = base.host.attach([technique], seed=3)
    shake(slot.parameters.values())
    slot.bake()
    files = technique.to_peft(slot)
    # every warning is an error here: PEFT only warns of keys that match nothing
    model = peft.PeftModel.from_pretrained(tiny_model(model_type), str(write(tmp_path, files))).eval()
    assert sum(p.numel() for n, p in model.named_parameters() if "lora_" in n) == slot.num_parameters
    (tmp_path / "theirs").mkdir()
    model.save_pretrained(str(tmp_path / "theirs"))
    config, tensors = read(tmp_path / "theirs")
    assert tensors.keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in tensors.items())
    assert {key: config[key] for key in files[0] if key != "target_modules"} == {
        key: value for key, value in files[0].items() if key != "target_modules"
    }
    found, state = LoRA.from_peft(config, tensors)
    other = base.host.attach([found])
    other.load(state)
    assert torch.equal(base.logits(IDS, other.number), base.logits(IDS, slot.number))
    same_everywhere(base, slot, model, model_type)


THEIRS: dict[str, dict[str, Any]] = {
    "rslora": {"r": 4, "lora_alpha": 5, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 7, "use_dora": True},
    "patterns": {"r": 2, "lora_alpha": 4, "rank_pattern": {r".*\.1\..*": 5, "END": 3}, "alpha_pattern": {"END": 9}},
    "anchored pattern": {"r": 2, "rank_pattern": {"^.*[02].*$": 4}, "alpha_pattern": {r"(a|.*\.1\..*)": 2}},
    "gaussian": {"r": 3, "init_lora_weights": "gaussian"},
    "all at once": {"r": 2, "use_dora": True, "use_rslora": True, "rank_pattern": {"END": 3}},
}


@pytest.mark.filterwarnings("ignore:.*rank_pattern.*:UserWarning")
@pytest.mark.parametrize("settings", THEIRS.values(), ids=THEIRS)
@pytest.mark.parametrize("model_type", MODELS)
def test_we_read_peft(model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    named = {
        key: {k.replace("END", ENDS[model_type][1]): v for k, v in value.items()} if key.endswith("pattern") else value
        for key, value in settings.items()
    }
    config = peft.LoraConfig(
        target_modules=list(ENDS[model_type]), task_type="CAUSAL_LM", fan_in_fan_out=model_type == "gpt2", **named
    )
    model = peft.get_peft_model(tiny_model(model_type), config).eval()
    shake(p for n, p in model.named_parameters() if "lora_" in n)
    model.save_pretrained(str(tmp_path))
    technique, state = LoRA.from_peft(*read(tmp_path))
    base = tiny_base(model_type)
    slot = base.host.attach([technique])
    slot.load(state)
    same_everywhere(base, slot, model, model_type)


def test_pissa_starts_where_peft_starts() -> None:
    """Same A and B, up to a sign that both share; PEFT takes their product out of the base's weight."""
    base = tiny_base()
    slot = base.host.attach([LoRA(rank=3, alpha=6.0, init="pissa", target_modules=("q_proj",))])
    config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"], init_lora_weights="pissa")
    model = peft.get_peft_model(tiny_model(), config)
    theirs = dict(model.named_parameters())
    for name, ours in slot.parameters.items():
        key = name.replace(".pissa_", ".lora_").replace(".weight", ".default.weight")
        found = theirs[f"base_model.model.{key}"]
        torch.testing.assert_close(ours.detach().abs(), found.detach().abs(), **CLOSE)
    torch.testing.assert_close(their_logits(model.eval()), base.logits(IDS, slot.number), **CLOSE)


def test_doras_first_gradients_are_pefts(tmp_path: Path) -> None:
    base = tiny_base("gpt2")
    technique = LoRA(rank=3, alpha=6.0, dora=True)
    slot = base.host.attach([technique], seed=3)
    shake(slot.parameters.values())
    write(tmp_path, technique.to_peft(slot))
    model = peft.PeftModel.from_pretrained(tiny_model("gpt2"), str(tmp_path), is_trainable=True).eval()
    ids = torch.tensor([IDS])
    model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    example = Example(list(IDS), [0] + [1] * (len(IDS) - 1))
    _, gradients = cases.losses_and_gradients(base, [Placed(example, slot.number, 0)])
    theirs = {name.replace(".default", ""): p.grad for name, p in model.named_parameters() if "lora_" in name}
    for name, ours in gradients[slot.number].items():
        key = name if name.endswith(".weight") else f"{name}.weight"
        torch.testing.assert_close(ours, theirs[f"base_model.model.{key}"], **CLOSE)


# ------------------------------------------------------------------------------------------------ refusals


def files_of(**settings: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    technique = LoRA(rank=2, target_modules=("q_proj",), **settings)
    return technique.to_peft(tiny_base().host.attach([technique]))


def test_lengths_of_rows_without_dora_are_refused() -> None:
    config, tensors = files_of(dora=True)
    with pytest.raises(ConfigError, match=r"lora_magnitude_vector' is not part of a plain LoRA adapter"):
        LoRA.from_peft({**config, "use_dora": False}, tensors)


def test_dora_without_lengths_of_rows_is_refused() -> None:
    config, tensors = files_of()
    technique, state = LoRA.from_peft({**config, "use_dora": True}, tensors)
    with pytest.raises(ConfigError, match="3 tensors are missing"):
        tiny_base().host.attach([technique]).load(state)


def test_names_that_peft_wrote_otherwise_are_read() -> None:
    config, tensors = files_of(dora=True)
    for ending in (".default", ".weight", ".default.weight"):
        renamed = {k.replace("_vector", f"_vector{ending}"): tensor for k, tensor in tensors.items()}
        assert LoRA.from_peft(config, renamed)[1].keys() == LoRA.from_peft(config, tensors)[1].keys()


@pytest.mark.parametrize("changes", [{"r": 3}, {"rank_pattern": {"q_proj": 3}}])
def test_a_rank_that_is_not_the_tensors_is_refused(changes: dict[str, Any]) -> None:
    """The scale is alpha over what the config says."""
    config, tensors = files_of()
    with pytest.raises(ConfigError, match=r"q_proj.lora_A.weight has rank 2, its config says 3"):
        LoRA.from_peft({**config, **changes}, tensors)


def test_a_pattern_that_is_no_expression_is_refused() -> None:
    config, tensors = files_of()
    with pytest.raises(ConfigError, match="is no regular expression"):
        LoRA.from_peft({**config, "alpha_pattern": {"*.q_proj": 3}}, tensors)


def test_an_unbaked_pissa_has_no_files() -> None:
    with pytest.raises(AssertionError, match="bake the slot first"):
        files_of(init="pissa")
