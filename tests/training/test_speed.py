"""The measurement of speed runs for every kind of base and technique, and gives weights to few layers only."""

from __future__ import annotations

import math
from dataclasses import astuple
from pathlib import Path

import pytest
import torch
from torch import nn

from tailor.models.base import Base
from tailor.models.slots import Slot
from tailor.techniques import Technique
from tailor.techniques.full import Full
from tailor.techniques.lora import LoRA
from tailor.techniques.p_tuning import PTuning
from tailor.techniques.prefix_tuning import PrefixTuning
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.training import speed
from tailor.training.speed import layer_kinds, measure_speed
from tailor.training.trace import weightless_base
from tiny_models import tiny_model, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "SECONDS", 0.0)
    monkeypatch.setattr(speed, "REPEATS", 1)


def sketch(folder: Path, technique: Technique, model_type: str = "llama") -> tuple[Base, Slot]:
    tiny_model(model_type).save_pretrained(folder)
    tiny_tokenizer().hf.save_pretrained(folder)
    base = weightless_base(str(folder), torch.float32, torch.device("cpu"))
    return base, base.host.attach([technique])


@pytest.mark.parametrize(
    ("technique", "trained", "flows"),
    [
        (LoRA(rank=2), [True, True, True], [False, True, True]),
        (LoRA(rank=2, target_layers=(1,)), [False, True, False], [False, False, True]),
        (Full(), [True, True, True], [True, True, True]),
        (Full(parameters=("layers.2.*",)), [False, False, True], [False, False, False]),
        (PromptTuning(num_virtual_tokens=3), [False, False, False], [True, True, True]),
        (PrefixTuning(num_virtual_tokens=3), [False, False, False], [False, True, True]),
    ],
    ids=["lora", "one layer", "full", "top layer", "prompt tuning", "prefix tuning"],
)
def test_kinds_say_what_is_trained_and_where_gradients_flow(
    tmp_path: Path, technique: Technique, trained: list[bool], flows: list[bool]
) -> None:
    kinds = layer_kinds(*sketch(tmp_path, technique))
    assert [bool(kind.trained) for kind in kinds] == trained
    assert [kind.flows for kind in kinds] == flows


@pytest.mark.parametrize(
    ("model_type", "technique"),
    [
        ("llama", LoRA(rank=2, dropout=0.1)),
        ("llama", PromptTuning(num_virtual_tokens=3)),
        ("llama", PTuning(num_virtual_tokens=3, encoder="lstm", encoder_hidden=6)),
        ("llama", PrefixTuning(num_virtual_tokens=3)),
        ("qwen3_moe", Full()),
        ("gpt2", Full()),
        *((name, LoRA(rank=2)) for name in ("gemma3_text", "opt", "phi3", "smollm3")),
    ],
    ids=str,
)
def test_every_part_is_measured(tmp_path: Path, model_type: str, technique: Technique) -> None:
    base, slot = sketch(tmp_path, technique, model_type)
    found = measure_speed(base, slot, [40, 30, 20], 12, CPU)
    assert all(math.isfinite(value) and value >= 0 for value in astuple(found))
    assert min(found.head, found.head_forward, found.per_pass, found.per_step) > 0


def test_one_layer_of_each_kind_gets_weights_and_the_words_none(tmp_path: Path) -> None:
    base, slot = sketch(tmp_path, LoRA(rank=2))
    layers: nn.ModuleList = base.model.get_submodule(base.host.placement.layers(base.model))  # type: ignore[assignment]
    measure_speed(base, slot, [40], 12, CPU)
    filled = [not any(p.is_meta for p in layer.parameters()) for layer in layers]
    assert filled == [True, True, False]  # the lowest, through which no gradient flows, and one of the others
    assert base.model.get_input_embeddings().weight.is_meta  # type: ignore[operator]


def test_long_rows_are_cut_when_a_part_of_them_tells_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ENOUGH", -1.0)
    monkeypatch.setattr(speed, "FEW", 50)
    base, slot = sketch(tmp_path, LoRA(rank=2))
    assert speed._Decoder(base, slot, CPU).enough([40, 30, 20]) == [40, 10]
    monkeypatch.setattr(speed, "ENOUGH", math.inf)
    assert speed._Decoder(*sketch(tmp_path, LoRA(rank=2)), CPU).enough([40, 30, 20]) == [40, 30, 20]
