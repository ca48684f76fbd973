"""PEFT reads our files and we read PEFT's: the same logits on the same tiny model, and not the base's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peft_files import CLOSE, IDS, MARKS, read, shake, their_logits, write
from tailor.errors import ConfigError
from tailor.models.base import Base
from tailor.models.slots import Slot
from tailor.techniques.lora import LoRA
from tailor.techniques.prompt_tuning import PromptTuning
from tiny_models import tiny_base, tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

pytestmark = MARKS

ARCHITECTURES = ["llama", "gpt2", "gpt_neox", "phi3", "qwen3"]
QUERY_VALUE = {"gpt2": ["c_attn"], "gpt_neox": ["query_key_value"], "phi3": ["qkv_proj"]}


def loaded_by_peft(model_type: str, folder: Path) -> Any:
    """Every warning is an error here: PEFT only warns of keys that match nothing."""
    return peft.PeftModel.from_pretrained(tiny_model(model_type), str(folder)).eval()


def our_logits(base: Base, slot: Slot) -> Tensor:
    return base.logits([*slot.virtual_ids, *IDS], slot.number)


def differs_from_base(logits: Tensor, base: Base) -> None:
    assert float((logits[-len(IDS) :] - base.logits(IDS)).abs().max()) > 1e-2


LORAS = {
    "all-linear": {"rank": 3, "alpha": 7.0},
    "query-value": {"rank": 2, "alpha": 4.0, "target_modules": "query-value", "dropout": 0.1},
    "some layers": {"rank": 4, "alpha": 2.0, "target_layers": (0, 2)},
}


@pytest.mark.parametrize("settings", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_peft_reads_our_lora(model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    base = tiny_base(model_type)
    technique = LoRA(**settings)
    slot = base.host.attach([technique], seed=3)
    shake(slot.parameters.values())
    model = loaded_by_peft(model_type, write(tmp_path, technique.to_peft(slot)))
    found = their_logits(model)
    torch.testing.assert_close(found, our_logits(base, slot), **CLOSE)
    differs_from_base(found, base)
    trained = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
    assert trained == slot.num_parameters


@pytest.mark.parametrize("targets", ["all-linear", "query-value", "one pattern"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_we_read_peft_lora(model_type: str, targets: str, tmp_path: Path) -> None:
    base = tiny_base(model_type)
    names = base.host.linear_names()
    modules: Any = {
        "all-linear": "all-linear",
        "query-value": QUERY_VALUE.get(model_type, ["q_proj", "v_proj"]),
        "one pattern": rf".*\.1\..*{names[0].rpartition('.')[2]}",
    }[targets]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=modules, task_type="CAUSAL_LM", fan_in_fan_out=model_type == "gpt2"
    )
    model = peft.get_peft_model(tiny_model(model_type), config).eval()
    shake(p for n, p in model.named_parameters() if "lora_" in n)
    model.save_pretrained(str(tmp_path))
    technique, state = LoRA.from_peft(*read(tmp_path))
    assert (technique.rank, technique.alpha) == (3, 5)
    slot = base.host.attach([technique])
    slot.load(state)
    expected = their_logits(model)
    torch.testing.assert_close(our_logits(base, slot), expected, **CLOSE)
    differs_from_base(expected, base)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_peft_reads_our_prompt_table(model_type: str, tmp_path: Path) -> None:
    base = tiny_base(model_type)
    technique = PromptTuning(num_virtual_tokens=4)
    slot = base.host.attach([technique], seed=3)
    shake(slot.parameters.values())
    found = their_logits(loaded_by_peft(model_type, write(tmp_path, technique.to_peft(slot))))
    assert len(found) == 4 + len(IDS), "PEFT's output is longer by the virtual tokens"
    torch.testing.assert_close(found, our_logits(base, slot), **CLOSE)
    differs_from_base(found, base)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_we_read_peft_prompt_tables(model_type: str, tmp_path: Path) -> None:
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    model = peft.get_peft_model(tiny_model(model_type), config).eval()
    shake(p for n, p in model.named_parameters() if "prompt_encoder" in n)
    model.save_pretrained(str(tmp_path))
    technique, state = PromptTuning.from_peft(*read(tmp_path))
    assert technique.num_virtual_tokens == 5
    base = tiny_base(model_type)
    slot = base.host.attach([technique])
    slot.load(state)
    expected = their_logits(model)
    torch.testing.assert_close(our_logits(base, slot), expected, **CLOSE)
    differs_from_base(expected, base)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_there_and_back_is_the_same_file(model_type: str, tmp_path: Path) -> None:
    """PEFT saves what it loaded from us: same tensors under the same names."""
    base = tiny_base(model_type)
    technique = LoRA(rank=2)
    slot = base.host.attach([technique])
    shake(slot.parameters.values())
    files = technique.to_peft(slot)
    (tmp_path / "ours").mkdir()
    loaded_by_peft(model_type, write(tmp_path / "ours", files)).save_pretrained(str(tmp_path / "theirs"))
    config, tensors = read(tmp_path / "theirs")
    assert tensors.keys() == files[1].keys()
    assert all(torch.equal(t, files[1][name]) for name, t in tensors.items())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (2, 32.0, "LORA")


# ------------------------------------------------------------------------------------------------ refusals

UNSUPPORTED = {
    "lora_bias": {"lora_bias": True},
    "bias": {"bias": "lora_only"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [3, 4]},
    "init_lora_weights": {"init_lora_weights": "pissa"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", UNSUPPORTED)
def test_settings_that_would_be_ignored_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """Adapters as PEFT itself saves them; without the refusal each would load and give other answers."""
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", **UNSUPPORTED[name])
    model = peft.get_peft_model(tiny_model("llama"), config)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(ConfigError, match=rf"sets {name}="):
        LoRA.from_peft(*read(tmp_path))


@pytest.mark.parametrize("init", ["olora", "pissa_niter_4", "corda", "loftq", "lora_ga"])
def test_starts_that_change_the_base_are_refused(init: str) -> None:
    with pytest.raises(ConfigError, match="sets init_lora_weights="):
        LoRA.from_peft({"r": 2, "init_lora_weights": init}, {"x": torch.zeros(1)})


@pytest.mark.parametrize("init", [True, False, "gaussian", "orthogonal", "eva", None])
def test_starts_that_leave_the_base_alone_are_read(init: Any) -> None:
    base = tiny_base()
    config, tensors = LoRA(rank=2).to_peft(base.host.attach([LoRA(rank=2)]))
    technique, state = LoRA.from_peft(config | {"init_lora_weights": init}, tensors)
    assert technique.rank == 2
    assert len(state) == len(tensors)


def test_a_plain_config_is_enough() -> None:
    """The fields servers need; keys may carry the adapter's name."""
    base = tiny_base()
    technique = LoRA(rank=2, alpha=6.0)
    slot = base.host.attach([technique], seed=1)
    shake(slot.parameters.values())
    config, tensors = technique.to_peft(slot)
    short = {k: config[k] for k in ("peft_type", "r", "lora_alpha", "target_modules", "task_type")}
    named = {
        k.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default."): t for k, t in tensors.items()
    }
    found, state = LoRA.from_peft(short, named)
    other = base.host.attach([found])
    other.load(state)
    assert torch.equal(our_logits(base, other), our_logits(base, slot))


def test_tensors_that_are_no_lora_are_refused() -> None:
    base = tiny_base()
    config, tensors = LoRA(rank=2).to_peft(base.host.attach([LoRA(rank=2)]))
    name, tensor = next(iter(tensors.items()))
    for stranger in (
        name.removeprefix("base_model.model."),
        name.replace("lora_A", "lora_embedding_A"),
        "lm_head.weight",
    ):
        with pytest.raises(ConfigError, match="not part of a plain LoRA adapter"):
            LoRA.from_peft(config, tensors | {stranger: tensor})
    with pytest.raises(ConfigError, match="holds no tensors"):
        LoRA.from_peft(config, {})


def test_an_adapter_for_another_base_is_refused() -> None:
    """PEFT warns and answers as the base; here a target that is not there is an error."""
    config, tensors = LoRA(rank=2).to_peft(tiny_base("gpt2").host.attach([LoRA(rank=2)]))
    technique, _ = LoRA.from_peft(config, tensors)
    with pytest.raises(ConfigError, match="matches no linear layer"):
        tiny_base("llama").host.attach([technique])
    config, tensors = PromptTuning(num_virtual_tokens=3).to_peft(
        tiny_base("opt").host.attach([PromptTuning(num_virtual_tokens=3)])
    )
    table, state = PromptTuning.from_peft(config, tensors)
    with pytest.raises(ConfigError, match="has shape"):
        tiny_base("llama").host.attach([table]).load(state)


def test_a_prompt_table_with_other_tensors_or_sizes_is_refused() -> None:
    table = torch.zeros(3, 32)
    with pytest.raises(ConfigError, match="holds one tensor, 'prompt_embeddings'; this one holds x"):
        PromptTuning.from_peft({"num_virtual_tokens": 3}, {"x": table})
    with pytest.raises(ConfigError, match="3 rows, its config says 4"):
        PromptTuning.from_peft({"num_virtual_tokens": 4}, {"prompt_embeddings": table})
