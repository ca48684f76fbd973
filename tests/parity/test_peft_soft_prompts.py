"""P-tuning and prefix tuning as PEFT has them, both ways; and what it gets wrong with soft prompts is right here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import technique_cases as cases
from peft_files import CLOSE, IDS, MARKS, write
from tailor.artifacts import artifact as artifacts
from tailor.artifacts.files import read_peft
from tailor.data.examples import Example
from tailor.data.packing import Placed, pack
from tailor.errors import ConfigError
from tailor.models.base import Base
from tailor.models.slots import Slot
from tailor.techniques import TECHNIQUES
from tailor.techniques.p_tuning import PTuning
from tailor.techniques.prefix_tuning import PrefixTuning
from tailor.techniques.prompt_tuning import PromptTuning
from tiny_models import ARCHITECTURES, tiny_base, tiny_model

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    peft = pytest.importorskip("peft")

pytestmark = MARKS

NUM = 4
# toys carry a number of key/value heads that these do not read, which PEFT would believe
FULL_HEADS = {"gpt2", "gpt_neox", "opt"}
# PEFT takes the hidden size for the width of the embeddings, which OPT projects
WIDTHS = {"opt": {"token_dim": 24}}


def base_of(model_type: str) -> Base:
    return tiny_base(model_type, **heads(model_type))


def heads(model_type: str) -> dict[str, int]:
    return {"num_key_value_heads": 4} if model_type in FULL_HEADS else {}


def shaken(slot: Slot) -> Slot:
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return slot


def loaded_by_peft(model_type: str, folder: Path) -> Any:
    """Every warning is an error here."""
    return peft.PeftModel.from_pretrained(tiny_model(model_type, **heads(model_type)), str(folder)).eval()


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    """Of the row's own tokens."""
    mask = torch.ones(1, len(IDS), dtype=torch.long)
    return model(input_ids=torch.tensor([IDS]), attention_mask=mask).logits[0, -len(IDS) :]  # type: ignore[no-any-return]


def our_logits(base: Base, slot: Slot) -> Tensor:
    return base.logits([*slot.virtual_ids, *IDS], slot.number)[-len(IDS) :]


def differs_from_base(logits: Tensor, base: Base) -> None:
    assert float((logits - base.logits(IDS)).abs().max()) > 1e-2


P_TUNINGS = {
    "mlp": PTuning(num_virtual_tokens=NUM, encoder_hidden=12),
    "lstm": PTuning(num_virtual_tokens=NUM, encoder="lstm", encoder_hidden=6, condition="the fox"),
    "embedding": PTuning(num_virtual_tokens=NUM, encoder="embedding"),
}
PREFIXES = {
    "plain": PrefixTuning(num_virtual_tokens=NUM),
    "reparametrised": PrefixTuning(num_virtual_tokens=NUM, reparametrisation=True, encoder_hidden=8),
    "longer than the window": PrefixTuning(num_virtual_tokens=9, init="random"),
}


@pytest.mark.parametrize("baked", [True, False])
@pytest.mark.parametrize("technique", P_TUNINGS.values(), ids=P_TUNINGS)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_peft_reads_our_p_tuning(model_type: str, technique: PTuning, baked: bool, tmp_path: Path) -> None:
    base = base_of(model_type)
    slot = shaken(base.host.attach([technique], seed=3))
    if baked:
        slot.bake()
    model = loaded_by_peft(model_type, write(tmp_path, technique.to_peft(slot)))
    assert model.active_peft_config.peft_type == "P_TUNING"
    found = their_logits(model)
    torch.testing.assert_close(found, our_logits(base, slot), **CLOSE)
    differs_from_base(found, base)


@pytest.mark.parametrize("encoder", ["MLP", "LSTM"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_we_read_peft_p_tuning(model_type: str, encoder: str, tmp_path: Path) -> None:
    config = peft.PromptEncoderConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        encoder_hidden_size=16,
        encoder_reparameterization_type=encoder,
        encoder_dropout=0.0,
        **WIDTHS.get(model_type, {}),
    )
    both_ways(model_type, config, PTuning, tmp_path)


@pytest.mark.parametrize("technique", PREFIXES.values(), ids=PREFIXES)
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_peft_reads_our_prefix(model_type: str, technique: PrefixTuning, tmp_path: Path) -> None:
    base = base_of(model_type)
    slot = shaken(base.host.attach([technique], seed=3))
    model = loaded_by_peft(model_type, write(tmp_path, technique.to_peft(slot)))
    found = their_logits(model)
    torch.testing.assert_close(found, our_logits(base, slot), **CLOSE)
    differs_from_base(found, base)


@pytest.mark.parametrize("projection", [False, True])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_we_read_peft_prefixes(model_type: str, projection: bool, tmp_path: Path) -> None:
    """With `prefix_projection` PEFT saves what the MLP gives, not the MLP."""
    config = peft.PrefixTuningConfig(
        task_type="CAUSAL_LM", num_virtual_tokens=5, prefix_projection=projection, encoder_hidden_size=16
    )
    both_ways(model_type, config, PrefixTuning, tmp_path)


def both_ways(model_type: str, config: Any, kind: Any, folder: Path) -> None:
    """PEFT's own file, read by us; written by us, read by PEFT: the same tensor and the same logits."""
    model = peft.get_peft_model(tiny_model(model_type, **heads(model_type)), config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "prompt_encoder" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    expected = their_logits(model)
    model.save_pretrained(str(folder))
    technique, state = read_peft(folder)
    assert type(technique) is kind
    assert technique.num_virtual_tokens == 5  # type: ignore[attr-defined]
    base = base_of(model_type)
    slot = base.host.attach([technique], baked=True)
    slot.load(state)
    torch.testing.assert_close(our_logits(base, slot), expected, **CLOSE)
    differs_from_base(expected, base)
    _, tensors = technique.to_peft(slot)
    theirs = safetensors.torch.load_file(folder / "adapter_model.safetensors")
    assert tensors.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in tensors.items())


def test_each_technique_reads_its_own_kind() -> None:
    kinds = {kind: name for name, technique in TECHNIQUES.items() for kind in technique.peft_types}
    expected = {"PROMPT_TUNING": "prompt_tuning", "P_TUNING": "p_tuning", "PREFIX_TUNING": "prefix_tuning"}
    assert kinds.items() >= expected.items()


def test_a_folder_of_pefts_is_attached_and_says_its_technique(tmp_path: Path) -> None:
    """As `tailor generate --artifact FOLDER` finds it: no tailor.json."""
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    peft.get_peft_model(tiny_model(), config).save_pretrained(str(tmp_path))
    found = artifacts.find(tmp_path)
    assert found.kind == "prefix_tuning"
    base = tiny_base()
    slot = artifacts.attach(base, found)
    assert slot.num_parameters == 3 * 2 * 3 * 2 * 8
    assert slot.num_prefix == 3


def prefix_files() -> tuple[dict[str, Any], dict[str, Tensor]]:
    base = tiny_base()
    technique = PrefixTuning(num_virtual_tokens=3)
    return technique.to_peft(base.host.attach([technique]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": None}, "does not say its num_layers"),
        ({"num_layers": 4}, "a row of this prefix has 96 numbers; 2 × 4 layers × 16 are 128"),
        ({"num_virtual_tokens": 4}, "has 3 rows, its config says 4"),
        ({"num_transformer_submodules": 2}, "for an encoder and a decoder"),
        ({"num_attention_heads": 3}, "a row of this prefix"),
    ],
)
def test_prefixes_that_do_not_fit_their_config_are_refused(changes: dict[str, Any], message: str) -> None:
    config, tensors = prefix_files()
    with pytest.raises(ConfigError, match=message):
        PrefixTuning.from_peft(config | changes, tensors)


def test_a_prefix_for_another_base_is_refused() -> None:
    """The same number of numbers per row, otherwise cut: PEFT would load it."""
    config, tensors = prefix_files()
    technique, state = PrefixTuning.from_peft(config | {"num_attention_heads": 1}, tensors)
    with pytest.raises(ConfigError, match=r"prefix has shape \(3, 2, 1, 3, 16\), not \(3, 2, 2, 3, 8\)"):
        tiny_base().host.attach([technique], baked=True).load(state)


SOFT = {
    "prompt_tuning": PromptTuning(num_virtual_tokens=3),
    "p_tuning": PTuning(num_virtual_tokens=3),
    "prefix_tuning": PrefixTuning(num_virtual_tokens=3),
}


@pytest.mark.parametrize("name", SOFT)
def test_packed_training_has_the_loss_of_unpacked(name: str) -> None:
    """With TRL's packing PEFT's prefix tuning gives another loss, and its prompt tuning an error or another loss."""
    base = tiny_base("llama", torch.float64)
    slot = shaken(base.host.attach([SOFT[name]], seed=2))
    placed = cases.place(base, [slot], 6)
    packed, one_by_one = (cases.losses_and_gradients(base, placed, size) for size in (10_000, 1))
    assert len(pack(placed, 10_000)) == 1
    assert len(pack(placed, 1)) == 6
    torch.testing.assert_close(packed[0], one_by_one[0], atol=1e-10, rtol=0)
    torch.testing.assert_close(packed[1], one_by_one[1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", SOFT)
def test_every_row_of_a_batch_uses_its_own(name: str, tmp_path: Path) -> None:
    """PEFT's `adapter_names=[a, b]` answers all rows by the active one; here each row equals its own PEFT model."""
    base = tiny_base()
    technique = SOFT[name]
    slots = [shaken(base.host.attach([technique], seed=seed)) for seed in (1, 2)]
    texts = [[*slot.virtual_ids, *IDS] for slot in slots]
    rows = [Placed(Example(text, [1] * len(text)), slot.number) for text, slot in zip(texts, slots, strict=True)]
    mixed = cases.logits_by_row(base, pack(rows, 1000)[0])
    theirs = []
    for slot in slots:
        folder = tmp_path / str(slot.number)
        folder.mkdir()
        theirs.append(their_logits(loaded_by_peft("llama", write(folder, technique.to_peft(slot)))))
        torch.testing.assert_close(mixed[slot.number, 0][-len(IDS) :], theirs[-1], **CLOSE)
    assert float((theirs[0] - theirs[1]).abs().max()) > 1e-2
