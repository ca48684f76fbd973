"""P-tuning: torch's own modules as the oracle of the encoders; conditioning, dropout, and going on from an artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import technique_cases as cases
from mood_rows import write_lines
from tailor.artifacts import artifact as artifacts
from tailor.errors import ConfigError
from tailor.models.base import Base, load_base
from tailor.models.slots import Slot
from tailor.objectives.sft import SFT
from tailor.recipes.tune import tune
from tailor.recipes.tune_settings import TuneRecipe
from tailor.techniques.p_tuning import GAIN, TABLE_RATE, PTuning
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.training.trainer import Trainer, finish, mean_loss
from tiny_models import tiny_base

NUM = 5


def rows_of(slot: Slot) -> Tensor:
    """The slot's virtual tokens, (n, hidden)."""
    return slot.virtual_tokens[""].rows()


def attached(base: Base, seed: int = 3, **settings: Any) -> Slot:
    return base.host.attach([PTuning(num_virtual_tokens=NUM, **settings)], seed=seed)


def shake(slot: Slot) -> None:
    """Away from the start, where every bias is zero."""
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.add_(0.1 * torch.randn_like(parameter))


def torch_lstm(slot: Slot, hidden: int, layers: int) -> nn.Module:
    """The same weights in torch's modules."""
    lstm = nn.LSTM(32, hidden, layers, bidirectional=True, batch_first=True)
    own = {name.removeprefix("prompt_encoder."): p.detach() for name, p in slot.parameters.items()}
    lstm.load_state_dict({k.removeprefix("lstm."): v for k, v in own.items() if k.startswith("lstm.")})
    head = nn.Sequential(nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, 32))
    with torch.no_grad():
        for module, number in ((head[0], 0), (head[2], 1)):
            module.weight.copy_(own[f"head.{number}.weight"])
            module.bias.copy_(own[f"head.{number}.bias"])
    return nn.ModuleDict({"lstm": lstm, "head": head})


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_the_lstm_encoder_is_torchs(layers: int) -> None:
    base = tiny_base()
    slot = attached(base, encoder="lstm", encoder_hidden=6, num_layers=layers)
    shake(slot)
    modules = torch_lstm(slot, 6, layers)
    inputs = slot.parameters["prompt_encoder.embedding.weight"].detach()
    expected = modules["head"](modules["lstm"](inputs[None])[0][0]) * base.host.embedding_rms() * GAIN  # type: ignore[index, operator]
    found = rows_of(slot)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    weight = torch.randn(found.shape)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, parameter in modules["lstm"].named_parameters():  # type: ignore[union-attr]
        torch.testing.assert_close(
            slot.parameters[f"prompt_encoder.lstm.{name}"].grad, parameter.grad, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("layers", [2, 4])
def test_the_mlp_encoder_is_torchs(layers: int) -> None:
    base = tiny_base()
    slot = attached(base, encoder_hidden=7, num_layers=layers)
    shake(slot)
    sizes = [32, *[7] * (layers - 1), 32]
    modules: list[nn.Module] = []
    for layer in range(layers):
        linear = nn.Linear(sizes[layer], sizes[layer + 1])
        linear.weight.data = slot.parameters[f"prompt_encoder.mlp.{layer}.weight"].detach()
        linear.bias.data = slot.parameters[f"prompt_encoder.mlp.{layer}.bias"].detach()
        modules += [nn.GELU(), linear] if layer else [linear]
    inputs = slot.parameters["prompt_encoder.embedding.weight"].detach()
    expected = nn.Sequential(*modules)(inputs) * base.host.embedding_rms() * GAIN
    torch.testing.assert_close(rows_of(slot), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("text", ["fox", "the quick brown fox jumps over the lazy dog"])
@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_a_conditions_words_are_the_first_inputs_and_do_not_learn(encoder: Any, text: str) -> None:
    base = tiny_base()
    ids = base.tokenizer.encode(text)[:NUM]
    slot = attached(base, encoder=encoder, condition=text)
    trained = slot.parameters.get("prompt_encoder.embedding.weight")
    assert (0 if trained is None else len(trained)) == NUM - len(ids)
    plain = attached(base, encoder=encoder)
    with torch.no_grad():
        inputs = plain.parameters["prompt_encoder.embedding.weight"]
        if trained is not None:
            assert torch.equal(trained, inputs[len(ids) :]), "the rows that are left start as they would without"
        inputs[: len(ids)] = base.host.embed(ids) / base.host.embedding_rms()
    assert torch.equal(rows_of(slot), rows_of(plain))
    other = attached(base, encoder=encoder, condition="hello there")
    assert not torch.allclose(rows_of(other), rows_of(slot))


def test_one_start_for_bases_with_large_and_with_small_words() -> None:
    """The same encoder, in units of the words' size; so is the rate of a plain table."""
    bases = [tiny_base("llama") for _ in range(2)]
    with torch.no_grad():
        bases[1].model.get_input_embeddings().weight.mul_(0.02)  # type: ignore[operator]
    for settings in ({}, {"encoder": "lstm"}, {"encoder": "embedding"}, {"condition": "the fox"}):
        slots = [attached(base, **settings) for base in bases]
        big, small = (rows_of(slot) for slot in slots)
        torch.testing.assert_close(small, 0.02 * big, atol=1e-6, rtol=1e-4)
        size = float(big.detach().square().mean().sqrt()) / bases[0].host.embedding_rms()
        assert 0.3 < size < 2 * GAIN
        if settings.get("encoder") == "embedding":
            rates = [slot.rates["prompt_embeddings"] for slot in slots]
            assert rates == pytest.approx([TABLE_RATE * base.host.embedding_rms() for base in bases])


def test_the_default_rate_of_a_plain_table_is_prompt_tunings() -> None:
    ours, theirs = PTuning.traits.defaults, PromptTuning.traits.defaults
    assert ours is not None
    assert theirs is not None
    assert theirs.per_embedding_rms
    assert ours.learning_rate * TABLE_RATE == pytest.approx(theirs.learning_rate)


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_baking_keeps_what_the_encoder_says(encoder: Any) -> None:
    base = tiny_base()
    slot = attached(base, encoder=encoder, encoder_hidden=6, condition="fox")
    ids = [*slot.virtual_ids, 5, 6, 7]
    before, num_trained = base.logits(ids, slot.number), slot.num_parameters
    state = slot.bake()
    torch.testing.assert_close(base.logits(ids, slot.number), before, atol=1e-6, rtol=0)
    assert list(slot.parameters) == ["prompt_embeddings"]
    assert slot.num_parameters == NUM * 32
    assert slot.num_dropped == num_trained - NUM * 32
    assert sum(tensor.numel() for tensor in state.values()) == num_trained
    assert slot.bake() == {}


def test_numbers_of_parameters() -> None:
    base = tiny_base()
    inputs = NUM * 32
    assert attached(base).num_parameters == inputs + 2 * (32 * 32 + 32)
    lstm = 2 * 4 * (6 * (32 + 6) + 2 * 6) + 2 * 4 * (6 * (12 + 6) + 2 * 6)
    head = 12 * 12 + 12 + 12 * 32 + 32
    assert attached(base, encoder="lstm", encoder_hidden=6).num_parameters == inputs + lstm + head
    assert attached(base, encoder="embedding").num_parameters == inputs


@pytest.mark.parametrize("settings", [{"encoder": "lstm"}, {"num_layers": 3}])
def test_dropout_is_the_steps_own_and_off_outside_training(settings: dict[str, Any]) -> None:
    """The same in every micro-batch of a step, another in the next, none in validation and in what is kept."""

    def losses(tokens_per_batch: int) -> tuple[list[float], float]:
        base = tiny_base("llama", torch.float64)
        slot = attached(base, dropout=0.5, **settings)
        run = cases.slot_run(base, slot, 1, tokens_per_batch=tokens_per_batch, batch_size=6, learning_rate=1e-12)
        trainer = Trainer(base, [run])
        return [trainer.step()[0].loss for _ in range(3)], mean_loss(base, slot, SFT(), run.train, 4096)

    (whole, after), (pieces, _) = losses(10_000), losses(16)
    assert whole == pytest.approx(pieces, abs=1e-9)
    assert len({round(loss, 6) for loss in [*whole, after]}) == 4
    base = tiny_base("llama", torch.float64)
    slot = attached(base, dropout=0.5, **settings)
    rows = rows_of(slot).detach()
    plain = attached(base, **settings)
    assert torch.equal(rows, rows_of(plain))
    slot.bake()
    assert torch.equal(rows, rows_of(slot))


@pytest.mark.parametrize("encoder", ["mlp", "lstm", "embedding"])
def test_training_goes_on_where_it_ended(encoder: Any, own_home: Path) -> None:
    """An artifact of a tiny base: the table for use, the encoder beside it; PEFT keeps no encoder and cannot."""
    technique = PTuning(num_virtual_tokens=NUM, encoder=encoder, condition=None if encoder == "embedding" else "fox")
    base = tiny_base()
    slot = base.host.attach([technique], seed=1)
    run = cases.slot_run(base, slot, 1, num_steps=4, batch_size=6)
    trainer = Trainer(base, [run])
    for _ in range(4):
        trainer.step()
    last = mean_loss(base, slot, SFT(), run.train, 4096)
    kept = finish(run)
    saved = artifacts.save("mine", base, slot, [technique], {}, training_state=kept)
    assert (saved.folder / "training_state.safetensors").is_file() == (encoder != "embedding")
    assert mean_loss(base, artifacts.attach(base, saved), SFT(), run.train, 4096) == pytest.approx(last, abs=1e-6)
    base = tiny_base()
    slot = base.host.attach([technique], seed=2)
    again = cases.slot_run(base, slot, 1, batch_size=6)
    assert mean_loss(base, slot, SFT(), again.train, 4096) != pytest.approx(last, abs=1e-3)
    artifacts.start_from(slot, artifacts.find("mine"))
    again = cases.slot_run(base, slot, 1, batch_size=6)
    assert Trainer(base, [again]).step()[0].loss == pytest.approx(last, abs=1e-6)


def test_a_recipe_goes_on_from_an_artifact(own_home: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    write_lines(rows, [{"prompt": f"thing {k}?", "completion": f"it is {k % 3}"} for k in range(6)])

    def recipe(name: str, **more: Any) -> TuneRecipe:
        train = {"num_steps": 3, "batch_size": 6, "seed": len(name), "eval_every": 3}
        block = {"data": {"train": str(rows), "validation": str(rows)}, "technique": "p_tuning", "train": train}
        return TuneRecipe.model_validate({**block, "output": {"name": name}, **more})

    first = tune(recipe("first"), quiet=True)
    assert first.run is not None
    folder = own_home / "artifacts" / "first"
    assert {"adapter_model.safetensors", "adapter_config.json", "training_state.safetensors"} <= {
        path.name for path in folder.iterdir()
    }
    manifest = artifacts.find("first").manifest
    hidden = load_base().host.embedding_shape()[1]
    assert manifest["num_parameters"] == 50 * hidden
    assert manifest["num_trained"] == 50 * hidden + 2 * (hidden * hidden + hidden)
    validated = [m["validation_loss"] for m in first.run.metrics() if m.get("validation_loss") is not None]
    second = tune(recipe("second", start="first"), quiet=True)
    assert second.run is not None
    assert second.run.metrics()[0]["loss"] == pytest.approx(validated[-1], abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_layers": 1}, "an mlp has at least 2 linear layers"),
        ({"encoder": "embedding", "condition": "x"}, "condition: a plain table"),
        ({"encoder": "embedding", "dropout": 0.1, "num_layers": 3}, "dropout and num_layers: a plain table"),
        ({"encoder": "biglstm"}, "encoder"),
    ],
)
def test_settings_without_effect_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PTuning(**settings)


def test_settings_as_they_are_written_down_are_read_back() -> None:
    technique = PTuning(encoder="embedding")
    assert PTuning.model_validate(technique.model_dump(mode="json")) == technique


def test_an_empty_condition_is_refused() -> None:
    with pytest.raises(ConfigError, match="condition has no tokens"):
        attached(tiny_base(), condition="")
