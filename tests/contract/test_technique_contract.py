"""What every technique promises, alone and in pairs, held over the registry. Tolerances: docs/road.md, "equal"."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
import safetensors.torch
import torch

import technique_cases as cases
from tailor.artifacts.files import merged_weights
from tailor.data.packing import MIN_SHARED, Placed, pack
from tailor.errors import ConfigError, ConflictError
from tailor.inference.backend import Request, SamplingParams
from tailor.inference.engine import EngineSettings
from tailor.inference.local import LocalBackend
from tailor.models.base import Base
from tailor.models.slots import BASE_SLOT, Slot
from tailor.objectives.objective import scored_by_slot
from tailor.objectives.sft import SFT
from tailor.techniques import TECHNIQUES, AnyTechnique, Technique
from tailor.text.messages import user
from tailor.text.tokenizer import VIRTUAL
from tailor.training.trainer import Trainer, mean_loss
from technique_cases import CASES, EXCLUSIVE, MIXED, PAIRS, SINGLES, TRAINED, VARIED, Subject, attach, fresh, label
from tiny_models import ARCHITECTURES, tiny_base

LOGITS = {"atol": 1e-5, "rtol": 0.0}


def grid(subjects: list[Subject]) -> Callable[[Any], Any]:
    """Every subject on Llama; on every other architecture when slow tests are asked for (pairs stay on Llama)."""
    cells = [pytest.param(subject, "llama", id=f"{label(subject)}-llama") for subject in subjects]
    cells += [
        pytest.param(subject, kind, id=f"{label(subject)}-{kind}", marks=pytest.mark.slow)
        for subject in subjects
        if len(subject) == 1
        for kind in ARCHITECTURES
        if kind != "llama"
    ]
    return pytest.mark.parametrize(("subject", "model_type"), cells)


def owns_base(subject: Subject) -> bool:
    return not all(cases.traits(name).frozen_base for name in subject)


# ------------------------------------------------------------------------------------------------ the registry


def test_every_technique_has_an_instance_here() -> None:
    assert set(CASES) == set(TECHNIQUES), "add the new technique to CASES in tests/technique_cases.py"


@pytest.mark.parametrize("name", TECHNIQUES)
def test_the_registry_is_consistent(name: str) -> None:
    kind = TECHNIQUES[name]
    instance = CASES[name]
    assert kind.model_fields["type"].default == name
    assert type(instance) is kind
    assert isinstance(instance, Technique)
    assert kind in get_args(AnyTechnique)
    few, comfortable = kind.traits.rows
    assert 0 < few < comfortable
    assert kind.traits.trains
    assert kind.traits.where
    described = {n: f.description for n, f in kind.model_fields.items() if n not in ("type", "examples")}
    assert all(described.values()), "every setting says what it does: command line and form show it"


# ------------------------------------------------------------------------------------------------ forward


@pytest.mark.parametrize("pair", EXCLUSIVE, ids=label)
def test_two_that_want_the_same_place_are_refused(pair: Subject) -> None:
    base = tiny_base()
    with pytest.raises(ConfigError, match="two techniques of one list both want"):
        attach(base, pair)
    assert not base.host.slots


# a prefix is there whatever the text is
@grid([s for s in SINGLES + PAIRS + VARIED if not any(name.startswith("prefix_tuning") for name in s)])
def test_a_new_slot_is_the_base(subject: Subject, model_type: str) -> None:
    """Identity at init: LoRA is zero, full starts from the base, prompts change nothing on text without them."""
    base = tiny_base(model_type)
    batch = pack([Placed(e, BASE_SLOT, k) for k, e in enumerate(cases.examples(base, None, 0))], 10_000)[0]
    before = cases.logits_by_row(base, batch)
    slot = attach(base, subject, noise=0.0)
    own = pack([Placed(e, slot.number, k) for k, e in enumerate(cases.examples(base, None, 0))], 10_000)[0]
    words = slot.new_rows.first if slot.new_rows else None  # a word of the slot's own is a column the base has not
    for (_, index), logits in cases.logits_by_row(base, own).items():
        torch.testing.assert_close(logits[:, :words], before[BASE_SLOT, index][:, :words], atol=1e-6, rtol=0)


@grid(SINGLES + PAIRS + VARIED)
def test_a_slot_changes_what_the_base_says(subject: Subject, model_type: str) -> None:
    """Or every other test of this file could pass without the technique doing anything."""
    base = tiny_base(model_type)
    plain = LocalBackend(base).logprobs([Request((user("the fox"),))], ["jumps over"])[0]
    slot = attach(base, subject)
    own = LocalBackend(base, {"x": slot}).logprobs([Request((user("the fox"),), "x")], ["jumps over"])[0]
    assert own.shape == plain.shape
    assert float((own - plain).abs().max()) > 1e-3


@grid([s for s in SINGLES + PAIRS + VARIED if not owns_base(s)])
def test_off_is_the_base_bit_for_bit(subject: Subject, model_type: str) -> None:
    base = tiny_base(model_type)
    batch = pack(cases.place(base, [None], 6), 10_000)[0]
    unwrapped = cases.logits_by_row(base, batch)
    slot = attach(base, subject)
    attached = cases.logits_by_row(base, batch)
    assert all(torch.equal(attached[row], logits) for row, logits in unwrapped.items())
    base.host.detach(slot)
    detached = cases.logits_by_row(base, batch)
    assert all(torch.equal(detached[row], logits) for row, logits in unwrapped.items())


@grid(SINGLES + PAIRS + VARIED)
def test_packed_equals_unpacked(subject: Subject, model_type: str) -> None:
    base, slot = fresh(subject, model_type)
    placed = cases.place(base, [slot], 5)
    together = cases.logits_by_row(base, pack(placed, 10_000)[0])
    for item in placed:
        alone = cases.logits_by_row(base, pack([item], 10_000)[0])
        row = (item.slot, item.index)
        torch.testing.assert_close(together[row], alone[row], **LOGITS)


@grid(SINGLES + PAIRS + VARIED)
def test_what_is_scored_is_what_is_generated(subject: Subject, model_type: str) -> None:
    """Token logprobs of cached decoding equal those of the training pass over the same tokens."""
    base, slot = fresh(subject, model_type)
    requests = [Request((user(r.prompt),), "x", SamplingParams(max_new_tokens=6)) for r in cases.records(3, 4)]
    backend = LocalBackend(base, {"x": slot})
    for request, completion in zip(requests, backend.generate(requests), strict=True):
        prompt = backend.rendering("x").prompt(request.messages)
        example = cases.Example([*prompt, *completion.token_ids], [0] * len(prompt) + [1] * len(completion.token_ids))
        scored = base.score(pack([Placed(example, slot.number)], 10_000)[0])
        torch.testing.assert_close(scored, torch.tensor(completion.logprobs), **LOGITS)


@grid(TRAINED)
def test_save_and_load_give_equal_logits(subject: Subject, model_type: str) -> None:
    base, slot = fresh(subject, model_type)
    batch = pack(cases.place(base, [slot]), 10_000)[0]
    expected = cases.logits_by_row(base, batch)
    file = safetensors.torch.save(slot.state())
    base, slot = fresh(subject, model_type, seed=2)  # another start, another base in memory
    batch = pack([Placed(e, slot.number, k) for k, e in enumerate(cases.examples(base, slot, 1, 3))], 10_000)[0]
    assert not all(torch.equal(cases.logits_by_row(base, batch)[row], logits) for row, logits in expected.items())
    slot.load(safetensors.torch.load(file))
    found = cases.logits_by_row(base, batch)
    assert all(torch.equal(found[row], logits) for row, logits in expected.items())


@grid(TRAINED)
def test_what_is_kept_answers_as_what_was_trained(subject: Subject, model_type: str) -> None:
    """Encoders are dropped at the end: the same logits before and after, and from a file."""
    base, slot = fresh(subject, model_type)
    batch = pack(cases.place(base, [slot]), 10_000)[0]
    expected = cases.logits_by_row(base, batch)
    num_trained, before = slot.num_parameters, slot.bake()
    assert slot.num_parameters + slot.num_dropped == num_trained
    assert not before or sum(tensor.numel() for tensor in before.values()) == num_trained
    for row, logits in cases.logits_by_row(base, batch).items():
        torch.testing.assert_close(logits, expected[row], atol=1e-6, rtol=0)
    expected = cases.logits_by_row(base, batch)
    if owns_base(subject):
        return
    file = safetensors.torch.save(slot.state())
    base = tiny_base(model_type)
    slot = base.host.attach([cases.instance(name) for name in subject], seed=2, baked=True)
    slot.load(safetensors.torch.load(file))
    found = cases.logits_by_row(base, batch)
    assert all(torch.equal(found[row], logits) for row, logits in expected.items())


@grid([s for s in SINGLES + PAIRS + VARIED if all(cases.traits(name).merges for name in s)])
def test_merged_equals_unmerged(subject: Subject, model_type: str) -> None:
    base, slot = fresh(subject, model_type)
    other = tiny_base(model_type)
    with torch.no_grad():
        for name, tensor in merged_weights(base, slot).items():
            other.model.get_parameter(name).copy_(tensor)
    ids = [5, 6, 7, 8, 70, 99, 4]
    torch.testing.assert_close(other.logits(ids), base.logits(ids, slot.number), **LOGITS)


@pytest.mark.parametrize("name", [*TECHNIQUES, *cases.VARIANTS])
def test_peft_files_there_and_back(name: str) -> None:
    base, slot = fresh((name,))
    kind: Any = type(cases.instance(name))
    if not kind.traits.peft:
        with pytest.raises(ConfigError, match="no PEFT format"):
            cases.instance(name).to_peft(slot)
        with pytest.raises(ConfigError, match="no PEFT format"):
            kind.from_peft({}, {})
        return
    slot.bake()
    config, tensors = cases.instance(name).to_peft(slot)
    assert config["task_type"] == "CAUSAL_LM"
    technique, state = kind.from_peft(config, tensors)
    other = base.host.attach([technique], seed=9, baked=True)
    other.load(state)
    assert other.virtual_ids == slot.virtual_ids
    ids = [*slot.virtual_ids, 5, 6, 7, 8]
    assert torch.equal(base.logits(ids, other.number), base.logits(ids, slot.number))


# ------------------------------------------------------------------------------------------------ training


@grid(TRAINED)
def test_only_what_is_declared_moves(subject: Subject, model_type: str) -> None:
    base = tiny_base(model_type)
    slot = attach(base, subject, noise=0.0)
    own = {id(p) for p in slot.parameters.values()}
    before = {name: p.detach().clone() for name, p in base.model.named_parameters()}
    buffers = {name: b.clone() for name, b in base.model.named_buffers()}
    start = slot.state()
    assert slot.num_parameters == sum(t.numel() for t in start.values())
    trainer = Trainer(base, [cases.slot_run(base, slot, 1)])
    while not trainer.done:
        trainer.step()
    frozen = {name: p for name, p in base.model.named_parameters() if id(p) not in own}
    assert owns_base(subject) or len(frozen) == len(before)
    assert all(torch.equal(p, before[name]) for name, p in frozen.items())
    assert all(p.grad is None for p in frozen.values())
    assert all(torch.equal(b, buffers[name]) for name, b in base.model.named_buffers())
    still = [name for name, p in slot.parameters.items() if torch.equal(p.detach(), start[name])]
    assert not still, "every declared parameter learns"


@grid(TRAINED)
def test_training_lowers_the_loss(subject: Subject, model_type: str) -> None:
    base = tiny_base(model_type)
    slot = attach(base, subject, noise=0.0)
    rates = {slot.rates.get(name, 1.0) for name in slot.parameters}
    rate = 0.02 / (rates.pop() if len(rates) == 1 else 1.0)  # small for every number, whatever the technique's unit is
    run = cases.slot_run(base, slot, 1, num_steps=12, learning_rate=rate, schedule="constant", batch_size=6)
    before = mean_loss(base, slot, SFT(), run.train, 4096)
    trainer = Trainer(base, [run])
    first = trainer.step()[0]
    if not any(getattr(cases.instance(name), "dropout", 0.0) for name in subject):
        assert first.loss == pytest.approx(before, abs=1e-5), "the reported loss is that of the step's rows"
    while not trainer.done:
        trainer.step()
    assert mean_loss(base, slot, SFT(), run.train, 4096) < before - 0.005


@grid(TRAINED)
def test_resuming_is_bit_identical(subject: Subject, model_type: str) -> None:
    settings = {"num_steps": 6, "validation": 2, "eval_every": 2, "weight_decay": 0.01}

    def start() -> Trainer:
        base, slot = fresh(subject, model_type)
        return Trainer(base, [cases.slot_run(base, slot, 1, **settings)])

    straight = start()
    reports = [straight.step()[0] for _ in range(6)]
    first = start()
    for _ in range(3):
        first.step()
    saved = safetensors.torch.save(first.runs[0].optimizer.state())
    second = start()
    run = second.runs[0]
    run.optimizer.load(safetensors.torch.load(saved))
    run.step = 3
    resumed = [second.step()[0] for _ in range(3)]
    for expected, found in zip(reports[3:], resumed, strict=True):
        assert (found.loss, found.grad_norm, found.validation_loss) == (
            expected.loss,
            expected.grad_norm,
            expected.validation_loss,
        )
    expected_state = straight.runs[0].slot.state()
    assert all(torch.equal(t, expected_state[name]) for name, t in run.slot.state().items())
    final, other = straight.runs[0].optimizer.state(), run.optimizer.state()
    assert final.keys() == other.keys()
    assert all(torch.equal(t, other[name]) for name, t in final.items())


@pytest.mark.parametrize("subject", [*TRAINED, ("lora/qv", "prompt_tuning")], ids=label)
def test_the_result_does_not_depend_on_the_packing(subject: Subject) -> None:
    """Micro-batches of every size give the same losses and, after some steps, the same weights; dropout included."""
    found = []
    for tokens_per_batch in (16, 60, 10_000):
        base, slot = fresh(subject, dtype=torch.float64)
        run = cases.slot_run(base, slot, 1, tokens_per_batch=tokens_per_batch)
        trainer = Trainer(base, [run])
        found.append(([trainer.step()[0].loss for _ in range(3)], slot.state()))
    for losses, state in found[1:]:
        assert losses == pytest.approx(found[0][0], abs=1e-10)
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, found[0][1][name], atol=1e-9, rtol=0)


# transformers computes RMSNorm in fp32 even in a float64 model: a sum of gradients rounds there, LayerNorm's does not
@pytest.mark.parametrize(("model_type", "tolerance"), [("gpt2", 1e-10), ("llama", 1e-7), ("gemma2", 1e-7)])
@pytest.mark.parametrize("subject", SINGLES + PAIRS, ids=label)
@pytest.mark.parametrize("grouped", [True, False])
def test_shared_beginnings_change_neither_loss_nor_gradient(
    subject: Subject, model_type: str, tolerance: float, grouped: bool
) -> None:
    """Those of one group, and an instruction that rows of no group have in common."""
    base, slot = fresh(subject, model_type, torch.float64)
    rows = []
    for group, example in enumerate(cases.examples(base, slot, 1, 2)):
        first = list(example.loss_mask).index(1)
        virtual = sum(token >= VIRTUAL for token in example.token_ids)
        told = [*example.token_ids[:virtual], *range(20, 20 + MIN_SHARED), *example.token_ids[virtual:first]]
        for tail in ((5, 6, 7), (5, 8), tuple(example.token_ids[first:])):
            mask = [0] * len(told) + [1] * len(tail)
            rows.append(cases.Example([*told, *tail], mask, group if grouped else -1))
    placed = [Placed(row, slot.number, k) for k, row in enumerate(rows)]
    assert sum(b.num_tokens for b in pack(placed, 10_000, share_prefixes=True)) < sum(len(r.token_ids) for r in rows)
    plain = cases.losses_and_gradients(base, placed)
    for size in (10_000, 1):
        once = cases.losses_and_gradients(base, placed, size, share_prefixes=True)
        torch.testing.assert_close(once[0], plain[0], atol=tolerance, rtol=0)
        torch.testing.assert_close(once[1], plain[1], atol=tolerance, rtol=0)


# ------------------------------------------------------------------------------------------------ in company


def company(base: Base) -> list[Slot | None]:
    """The plain base and one slot of everything that mixes: techniques, variants of other sizes, pairs."""
    subjects = [*MIXED, *[(name,) for name in cases.VARIANTS]]
    return [None, *(attach(base, subject, seed=k) for k, subject in enumerate(subjects, 1))]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_mixed_batch_equals_separate_runs(model_type: str) -> None:
    base = tiny_base(model_type)
    slots = company(base)
    assert len({len(s.virtual_ids) for s in slots if s}) >= 3, "different numbers of virtual tokens"
    mixed = cases.logits_by_row(base, pack(cases.place(base, slots), 10_000)[0])
    for slot in slots:
        for row, logits in cases.logits_by_row(base, pack(cases.place(base, [slot]), 10_000)[0]).items():
            torch.testing.assert_close(mixed[row], logits, **LOGITS)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_mixed_backward_equals_separate_ones(model_type: str) -> None:
    base = tiny_base(model_type, torch.float64)
    slots = company(base)
    losses, gradients = cases.losses_and_gradients(base, cases.place(base, slots))
    for slot in slots:
        number = slot.number if slot else BASE_SLOT
        alone = cases.losses_and_gradients(base, cases.place(base, [slot]))
        torch.testing.assert_close(losses[number], alone[0][number], atol=1e-10, rtol=0)
        if slot:
            assert set(gradients[number]) == set(slot.parameters)
            torch.testing.assert_close(gradients[number], alone[1][number], atol=1e-10, rtol=0)
            strangers = [n for n, g in alone[1].items() if g and n != number]
            assert not strangers, "a pass without a slot's rows leaves no gradient in it"


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_mixed_generation_equals_generation_alone(model_type: str) -> None:
    base = tiny_base(model_type)
    slots = {str(s.number): s for s in company(base) if s}
    backend = LocalBackend(base, slots, EngineSettings(max_sequences=7))  # fewer than requests: rows come and go
    requests = [
        Request((user(r.prompt),), name, SamplingParams(max_new_tokens=4 + k))
        for k, name in enumerate([None, *slots])
        for r in cases.records(k, 2)
    ]
    for request, completion in zip(requests, backend.generate(requests), strict=True):
        alone = LocalBackend(base, slots).generate([request])[0]
        assert completion.token_ids == alone.token_ids
        assert completion.finish_reason == alone.finish_reason
        torch.testing.assert_close(torch.tensor(completion.logprobs), torch.tensor(alone.logprobs), **LOGITS)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize("broken", [s for s in TRAINED if s in MIXED], ids=label)
def test_nan_in_one_slot_does_not_reach_another(broken: Subject, model_type: str) -> None:
    base = tiny_base(model_type)
    healthy = company(base)
    clean = cases.losses_and_gradients(base, cases.place(base, healthy))
    sick = attach(base, broken, seed=50)
    with torch.no_grad():
        for parameter in sick.parameters.values():
            parameter.fill_(float("nan"))
    losses, gradients = cases.losses_and_gradients(base, cases.place(base, [sick, *healthy]))
    assert losses[sick.number].isnan()
    for slot in healthy:
        number = slot.number if slot else BASE_SLOT
        torch.testing.assert_close(losses[number], clean[0][number], atol=1e-5, rtol=0)
        if slot:
            torch.testing.assert_close(gradients[number], clean[1][number], atol=1e-5, rtol=0)
    # and with its rows between two others' in one step
    batch = pack(cases.place(base, [healthy[1], sick, healthy[2]]), 10_000)[0]
    scored = scored_by_slot(batch, base.score(batch))
    assert scored[sick.number].logprobs.isnan().all()
    assert all(s.logprobs.isfinite().all() for n, s in scored.items() if n != sick.number)


@pytest.mark.parametrize("name", [n for n, t in TECHNIQUES.items() if not t.traits.mixes])
def test_what_does_not_mix_says_so(name: str) -> None:
    for order in (1, -1):
        base = tiny_base()
        first, second = [[CASES["lora"]], [CASES[name]]][::order]
        base.host.attach(first)
        with pytest.raises(ConflictError):
            base.host.attach(second)
