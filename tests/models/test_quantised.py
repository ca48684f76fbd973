"""A base in 4 bits (QLoRA): its numbers, its passes, its memory, and what may be done with it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("bitsandbytes")

import technique_cases as cases
from tailor.artifacts import artifact as artifacts
from tailor.data.packing import Placed, pack
from tailor.errors import ConfigError, ConflictError
from tailor.evaluation.parity import stock_logprobs, twin
from tailor.inference.load import load
from tailor.models.base import Base, load_base
from tailor.models.linear import is_linear, linear_sizes
from tailor.models.nf4 import NF4Linear, nf4_layers, quantise
from tailor.models.slots import BASE_SLOT
from tailor.recipes.tune import tune
from tailor.recipes.tune_settings import BaseSettings, TuneRecipe
from tailor.recipes.verify import verify
from tailor.techniques.full import Full
from tailor.techniques.lora import LoRA
from tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

# the 16 levels of arXiv:2305.14314, appendix E
LEVELS = [
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
IDS = list(range(5, 17))


def stored(tmp_path: Path, model_type: str = "llama") -> Path:
    """A tiny base on disk."""
    folder = tmp_path / model_type
    tiny_model(model_type).save_pretrained(folder)
    tiny_tokenizer().hf.save_pretrained(folder)
    return folder


def quantised(tmp_path: Path, model_type: str = "llama") -> Base:
    return load_base(stored(tmp_path, model_type), "cpu", "float32", "nf4")


def both(tmp_path: Path, model_type: str = "llama") -> tuple[Base, Base]:
    """A base in 4 bits, and one with ordinary layers that hold the dequantised weights."""
    folder = stored(tmp_path, model_type)
    base, dense = load_base(folder, "cpu", "float32", "nf4"), load_base(folder, "cpu", "float32")
    with torch.no_grad():
        for name, layer in nf4_layers(base.model).items():
            dense.model.get_parameter(f"{name}.weight").copy_(layer.weight)
    return base, dense


# ------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("shape", [(40, 96), (40, 64), (64, 40), (33, 37), (7, 8)])
def test_every_number_is_the_nearest_level_of_its_block(shape: tuple[int, int]) -> None:
    """Against the paper's own table: blocks of 64 numbers, largest magnitude in 8 bits, nearest of 16 levels.

    Rows that are no multiple of a block included, and a last block that is not full.
    """
    size_out, size_in = shape
    layer = nn.Linear(size_in, size_out)
    levels = torch.tensor(LEVELS)
    found = NF4Linear.of(layer).weight
    assert found.shape == layer.weight.shape
    pairs = zip(layer.weight.detach().flatten().split(64), found.flatten().split(64), strict=True)
    for block, ours in pairs:
        nearest = levels[(block / block.abs().max())[:, None].sub(levels).abs().argmin(dim=-1)]
        torch.testing.assert_close(ours.abs().max(), block.abs().max(), atol=0, rtol=0.05)  # the magnitudes' own 8 bits
        torch.testing.assert_close(ours / ours.abs().max(), nearest, atol=1e-5, rtol=0)


def test_in_pieces_as_bitsandbytes_does_it_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes.functional as functional

    monkeypatch.setattr("tailor.models.nf4.CHUNK", 256)
    weight = torch.randn(40, 96)
    packed, state = quantise(weight)
    expected, expected_state = functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    assert torch.equal(packed, expected)
    assert torch.equal(state.absmax, expected_state.absmax)
    assert torch.equal(state.offset, expected_state.offset)
    assert torch.equal(state.state2.absmax, expected_state.state2.absmax)


def test_it_takes_four_bits_and_a_little() -> None:
    layer = NF4Linear.of(nn.Linear(512, 512, bias=False))
    nested = layer.state.state2
    held = [layer.packed, layer.state.absmax, nested.absmax]
    bits = 8 * sum(t.numel() * t.element_size() for t in held) / layer.num_weights
    assert bits == pytest.approx(4 + 8 / 64 + 32 / (64 * 256))


def test_precision_of_the_pass_does_not_change_the_weight() -> None:
    layer = NF4Linear.of(nn.Linear(64, 8))
    assert torch.equal(layer.weight.double(), layer.to(torch.float64).weight)
    assert layer.weight.dtype == torch.float64


def test_a_layer_like_any_other() -> None:
    layer = NF4Linear.of(nn.Linear(64, 8))
    assert is_linear(layer)
    assert linear_sizes(layer) == (64, 8)
    x = torch.randn(5, 64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, x @ layer.weight.t() + layer.bias)
    (expected,) = torch.autograd.grad((x @ layer.weight.t()).square().sum(), x, retain_graph=True)
    (found,) = torch.autograd.grad((y - layer.bias).square().sum(), x)
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------------------------ the base


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_only_the_decoders_linear_layers(tmp_path: Path, model_type: str) -> None:
    """Everywhere else the weights are the file's; logits are those of the dequantised weights in the stock model."""
    folder = stored(tmp_path, model_type)
    base, plain = load_base(folder, "cpu", "float32", "nf4"), load_base(folder, "cpu", "float32")
    layers = nf4_layers(base.model)
    assert set(layers) == set(plain.host.linear_names()) == set(base.host.linear_names())
    assert base.quantize == "nf4"
    assert base.num_parameters == plain.num_parameters
    assert base.fingerprint == plain.fingerprint
    assert not {"quantization_config", "_is_quantized"} & vars(base.config).keys()
    mine = dict(base.model.named_parameters())
    for name, parameter in plain.model.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(mine[name], parameter), name
    for name, layer in layers.items():
        original = plain.model.get_submodule(name)
        assert linear_sizes(layer) == linear_sizes(original)
        again = NF4Linear.of(original, transposed=layer.transposed)
        assert torch.equal(layer.weight, again.weight), name


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_it_computes_with_the_dequantised_weights(tmp_path: Path, model_type: str) -> None:
    base, dense = both(tmp_path, model_type)
    torch.testing.assert_close(base.logits(IDS), dense.logits(IDS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_slots_on_it_equal_slots_on_the_dequantised_base(tmp_path: Path, model_type: str) -> None:
    """Losses and gradients, with every kind of change of a linear layer; and the base off again, bit for bit."""
    found = []
    for base in both(tmp_path, model_type):
        before = base.logits(IDS)
        slots = [cases.attach(base, (name,), k) for k, name in enumerate(["lora", "prompt_tuning", "lora/qv"], 1)]
        assert torch.equal(base.logits(IDS), before)
        found.append(cases.losses_and_gradients(base, cases.place(base, [None, *slots])))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=0)


def test_no_dequantised_weight_is_kept_for_backward(tmp_path: Path) -> None:
    """What autograd holds between the passes are activations and adapters, on touched and on untouched layers."""
    base = quantised(tmp_path)
    slot = cases.attach(base, ("lora/qv",))
    sizes = {tuple(layer.dense().shape) for layer in nf4_layers(base.model).values()}
    assert sizes
    batch = pack([Placed(e, slot.number) for e in cases.examples(base, slot, 1, 1)], 10_000)[0]
    assert batch.num_tokens not in {n for size in sizes for n in size}, "or an activation would look like a weight"
    kept: list[tuple[int, ...]] = []

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tuple(tensor.shape))
        return tensor

    plan = cases.Plan.of_batch(batch, training=True)
    with base.host.run(plan), torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        base.batch_logprobs(batch, plan).sum().backward()
    assert kept
    assert not sizes & {size for shape in kept for size in (shape, shape[::-1])}


def test_training_moves_nothing_of_the_base(tmp_path: Path) -> None:
    base = quantised(tmp_path)
    before = {name: (layer.packed.clone(), layer.dense()) for name, layer in nf4_layers(base.model).items()}
    slot = cases.attach(base, ("lora",), noise=0.0)
    run = cases.slot_run(base, slot, 1, num_steps=6, learning_rate=0.02, schedule="constant", batch_size=6)
    trainer = cases_trainer(base, run)
    losses = [trainer.step()[0].loss for _ in range(6)]
    assert losses[-1] < losses[0]
    for name, layer in nf4_layers(base.model).items():
        assert torch.equal(layer.packed, before[name][0])
        assert torch.equal(layer.dense(), before[name][1])


def cases_trainer(base: Base, run: Any) -> Any:
    from tailor.training.trainer import Trainer

    return Trainer(base, [run])


# ------------------------------------------------------------------------------------------------ artifacts


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_merged_is_unmerged(tmp_path: Path, model_type: str) -> None:
    """The merged folder is an ordinary model of full precision, on the dequantised weights."""
    from transformers import AutoModelForCausalLM

    base = quantised(tmp_path, model_type)
    slot = cases.attach(base, ("lora",))
    folder = tmp_path / "merged"
    folder.mkdir()
    artifacts.write_merged(base, slot, [cases.CASES["lora"]], folder)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    examples = cases.examples(base, slot, 1)
    placed = [Placed(e, slot.number, k) for k, e in enumerate(examples)]
    ours = base.score_by_segment(pack(placed, 10_000)[0])
    for found, expected in zip(stock_logprobs(model, examples), ours, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_from_recipe_to_served_artifact(tmp_path: Path, own_home: Path) -> None:
    """Parity holds at every hop, and an artifact goes with the weights it was trained on only."""
    folder = stored(tmp_path)
    rows = [{"prompt": f"the {word}", "completion": "fox"} for word in cases.WORDS]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def recipe(name: str, **base: str) -> TuneRecipe:
        return TuneRecipe(
            base=BaseSettings(name=str(folder), device="cpu", **base),  # type: ignore[arg-type]
            data={"train": str(tmp_path / "rows.jsonl")},  # type: ignore[arg-type]
            technique=(LoRA(rank=2),),
            train={"num_steps": 2},  # type: ignore[arg-type]
            output={"name": name},  # type: ignore[arg-type]
        )

    result = tune(recipe("q", quantize="nf4"), quiet=True)
    assert result.artifact.manifest["base"]["quantize"] == "nf4"
    assert result.artifact.manifest["parity"]["passed"]
    assert {"merged weights", "reloaded artifact"} <= {hop.name for hop in verify("q").hops}
    assert verify("q").passed
    plain = tune(recipe("p"), quiet=True)
    assert "quantize" not in plain.artifact.manifest["base"]
    assert plain.base.fingerprint == result.base.fingerprint
    assert load("q").base.quantize == "nf4"
    with pytest.raises(ConflictError, match=r"'q' was trained on the base quantised to nf4.*as it is"):
        load("q", plain.base)
    with pytest.raises(ConflictError, match=r"'p' was trained on the base as it is, .*quantised to nf4"):
        load("p", quantize="nf4")


# ------------------------------------------------------------------------------------------------ refusals


def test_full_is_refused(tmp_path: Path) -> None:
    base = quantised(tmp_path)
    with pytest.raises(ConfigError, match="own weights; this base keeps them in 4 bits"):
        base.host.attach([Full()])
    assert not base.host.slots
    base.host.attach([LoRA(rank=2)])


def test_what_cannot_be_quantised_says_so(tmp_path: Path) -> None:
    folder = stored(tmp_path)
    with pytest.raises(ConfigError, match="quantize: 'int4' is unknown"):
        load_base(folder, "cpu", quantize="int4")
    with pytest.raises(ConfigError, match="nf4 goes with dtype float32, bfloat16 or float16"):
        load_base(folder, "cpu", "float64", "nf4")


def test_half_precision(tmp_path: Path) -> None:
    base = load_base(stored(tmp_path), "cpu", "bfloat16", "nf4")
    assert {layer.dense().dtype for layer in nf4_layers(base.model).values()} == {torch.bfloat16}
    exact = twin(base, torch.float32)
    torch.testing.assert_close(base.logits(IDS), exact.logits(IDS), atol=0.2, rtol=0.05)
    rows = pack([Placed(e, BASE_SLOT) for e in cases.examples(base, None, 1)], 10_000)[0]
    assert base.score(rows).isfinite().all()


# ------------------------------------------------------------------------------------------------ memory

PROGRAM = """
import sys, bitsandbytes, torch, transformers.models.llama.modeling_llama
from tailor.models.base import load_base
def resident(which):
    return int(next(l for l in open("/proc/self/status") if l.startswith(which)).split()[1]) * 1024
load_base("tailor-nano", "cpu", "float32", "nf4")
open("/proc/self/clear_refs", "w").write("5")
before = resident("VmRSS")
base = load_base(sys.argv[1], "cpu", "float32", None if sys.argv[2] == "none" else sys.argv[2])
print(resident("VmHWM") - before, resident("VmRSS") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read where Linux tells it")
def test_loading_never_holds_the_base_in_full_precision(tmp_path: Path) -> None:
    """160 MB of weights: in 4 bits the peak stays below half of them, one tensor at a time."""
    sizes = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9}
    model = tiny_model("llama", **sizes)
    weights = sum(4 * p.numel() for p in model.parameters())
    model.save_pretrained(tmp_path)
    tiny_tokenizer().hf.save_pretrained(tmp_path)
    del model

    def measured(quantize: str) -> tuple[int, int]:
        command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path), quantize]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peak, after = done.stdout.split()[-2:]
        return int(peak), int(after)

    peak, after = measured("nf4")
    full_peak, _ = measured("none")
    assert weights > 130_000_000
    assert full_peak > 0.9 * weights
    assert peak < 0.5 * weights, "4 bits of 32, the largest tensor, and what quantising it takes"
    assert after < 0.4 * weights
