"""Slots: attaching adds, detaching restores, wrappers compute the formula and its gradient, strangers are refused."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from tailor.data.packing import Segment
from tailor.errors import ConfigError, ConflictError
from tailor.models.base import Base
from tailor.models.dropout import stable_seed
from tailor.models.embedding import SlotEmbedding, VirtualTokens
from tailor.models.linear import LinearDelta, SlotLinear, Terms, is_linear, linear_sizes, merged
from tailor.models.plan import Plan, Span
from tailor.models.slots import Slot, match_names
from tailor.techniques.full import Full
from tailor.techniques.lora import LoRA
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.techniques.prompting import Prompting
from tailor.text.messages import user
from tailor.text.tokenizer import VIRTUAL
from tiny_models import tiny_base

NAMES = [f"model.layers.{k}.self_attn.{p}_proj" for k in range(12) for p in "qkv"] + ["model.layers.1.mlp.up_proj"]


def lora(**changes: Any) -> LoRA:
    return LoRA(**{"rank": 2, "target_modules": ("q_proj",), **changes})


def tuning(**changes: Any) -> PromptTuning:
    return PromptTuning(**{"num_virtual_tokens": 3, **changes})


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["q_proj"], [n for n in NAMES if n.endswith("q_proj")]),
        (["self_attn.v_proj"], [n for n in NAMES if n.endswith("v_proj")]),
        (["layers.[0-3].*"], [n for n in NAMES if n.split(".")[2] in "0123"]),
        (["layers.11.self_attn.?_proj"], [n for n in NAMES if ".11." in n]),
        (["model.layers.1.mlp.up_proj"], ["model.layers.1.mlp.up_proj"]),
        (["up_proj", "layers.0.*.q_proj"], [NAMES[0], "model.layers.1.mlp.up_proj"]),
        (["*"], NAMES),
    ],
)
def test_names_match_as_a_whole_or_by_their_dotted_end(patterns: list[str], expected: list[str]) -> None:
    assert match_names(NAMES, patterns, "linear layer") == expected


@pytest.mark.parametrize("pattern", ["qproj", "proj", "_proj", "q_pro", "layers.12.*", ""])
def test_a_pattern_that_matches_nothing_is_an_error(pattern: str) -> None:
    with pytest.raises(ConfigError, match="matches no linear layer"):
        match_names(NAMES, ["q_proj", pattern], "linear layer")


def test_the_error_names_the_nearest_choice() -> None:
    with pytest.raises(ConfigError) as caught:
        match_names(NAMES, ["qproj"], "linear layer")
    assert "did you mean 'q_proj'? choices: k_proj, q_proj, up_proj, v_proj" in str(caught.value.hint)


# ------------------------------------------------------------------------------------------------ attach, detach


def tree(base: Base) -> dict[str, tuple[int, str]]:
    return {name: (id(module), type(module).__name__) for name, module in base.model.named_modules()}


def test_detach_restores_the_module_tree_exactly() -> None:
    base = tiny_base()
    before, parameters = tree(base), {n: id(p) for n, p in base.model.named_parameters()}
    first = base.host.attach([lora(), tuning()])
    second = base.host.attach([LoRA(rank=1)])
    assert tree(base) != before
    base.host.detach(first)
    layer = base.model.get_submodule("model.layers.0.self_attn.q_proj")
    assert isinstance(layer, SlotLinear)
    assert set(layer.deltas) == {second.number}, "the other slot keeps its wrapper"
    base.host.detach(second)
    assert tree(base) == before
    assert {n: id(p) for n, p in base.model.named_parameters()} == parameters
    assert base.host.slots == {}


def test_detaching_one_slot_does_not_change_the_other() -> None:
    base = tiny_base()
    first, second = (base.host.attach([lora(), tuning()], seed=k) for k in (1, 2))
    shake(first), shake(second)
    ids = [*second.virtual_ids, 5, 6, 7]
    expected = base.logits(ids, second.number)
    base.host.detach(first)
    assert torch.equal(base.logits(ids, second.number), expected)


def shake(slot: Slot) -> None:
    """Move away from the start, where LoRA is the identity."""
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.add_(0.3 * torch.randn_like(parameter))


def test_slot_numbers_are_never_reused() -> None:
    base = tiny_base()
    numbers = []
    for _ in range(3):
        slot = base.host.attach([lora()])
        numbers.append(slot.number)
        base.host.detach(slot)
    with pytest.raises(ConfigError):
        base.host.attach([lora(target_modules=("nope",))])
    numbers.append(base.host.attach([lora()]).number)
    assert numbers == sorted(set(numbers))
    assert min(numbers) > 0, "0 is the plain base"


def test_a_failing_attach_leaves_nothing_behind() -> None:
    base = tiny_base()
    before = tree(base)
    for techniques in (
        [lora(), lora(target_modules=("nope",))],
        [lora(), tuning(), tuning()],
        [tuning(), lora(), lora()],
        [Prompting(system="Be short.", shots=0), Prompting(system="Be long.", shots=0)],
    ):
        with pytest.raises(ConfigError):
            base.host.attach(techniques)
        assert tree(base) == before
        assert base.host.slots == {}


def test_two_techniques_of_one_list_may_not_sit_on_the_same_thing() -> None:
    base = tiny_base()
    with pytest.raises(ConfigError, match=r"both want to add model\.layers\.0\.self_attn\.q_proj"):
        base.host.attach([lora(), lora()])
    with pytest.raises(ConfigError, match="both want to add prompt_embeddings"):
        base.host.attach([tuning(), tuning()])
    slot = base.host.attach([tuning()])
    with pytest.raises(ConfigError, match="both want to add virtual tokens"):
        slot.add_virtual_tokens(VirtualTokens(1, lambda: torch.zeros(1, 32)))
    slot = base.host.attach([lora(), lora(target_modules=("v_proj",)), tuning()])
    assert len(slot.parameters) == 2 * 3 + 2 * 3 + 1


def test_the_start_depends_on_the_seed_only() -> None:
    base = tiny_base()
    first = base.host.attach([lora(), tuning()], seed=5)
    again = base.host.attach([tuning(), lora()], seed=5)
    other = base.host.attach([lora(), tuning()], seed=6)
    assert all(torch.equal(p, again.parameters[n]) for n, p in first.parameters.items())
    assert not torch.equal(first.parameters["prompt_embeddings"], other.parameters["prompt_embeddings"])


# ------------------------------------------------------------------------------------------------ full runs alone


def test_full_runs_alone() -> None:
    base = tiny_base()
    slot = base.host.attach([lora()])
    with pytest.raises(ConflictError, match="runs alone"):
        base.host.attach([Full()])
    base.host.detach(slot)
    owner = base.host.attach([Full()])
    assert owner.owns_base
    assert owner.num_parameters == base.num_parameters
    with pytest.raises(ConflictError, match="owned by a full fine-tune"):
        base.host.attach([lora()])
    base.host.detach(owner)
    with pytest.raises(ConflictError, match="owned by a full fine-tune"):
        base.host.attach([lora()])


@pytest.mark.parametrize("other", [lora(), tuning()], ids=["lora", "prompt_tuning"])
@pytest.mark.parametrize("order", [1, -1])
def test_full_shares_no_list_with_another_technique(other: Any, order: int) -> None:
    base = tiny_base()
    with pytest.raises(ConflictError, match="runs alone"):
        base.host.attach([Full(), other][::order])
    assert not any(p.requires_grad for p in base.model.parameters())
    base.host.attach([lora()])  # a refused list does not claim the base


def test_full_with_a_pattern_that_matches_nothing_does_not_claim_the_base() -> None:
    base = tiny_base()
    with pytest.raises(ConfigError, match="matches no parameter"):
        base.host.attach([Full(parameters=("nope.weight",))])
    assert not any(p.requires_grad for p in base.model.parameters())
    base.host.attach([lora()])


def test_full_of_a_subset_trains_only_that() -> None:
    base = tiny_base()
    slot = base.host.attach([Full(parameters=("layers.2.*", "norm.weight"))])
    names = {n for n, p in base.model.named_parameters() if p.requires_grad}
    assert set(slot.parameters) == names
    assert "model.norm.weight" in names
    assert all(n.startswith("model.layers.2.") or n.endswith("norm.weight") for n in names)


# ------------------------------------------------------------------------------------------------ states


def test_wrong_states_are_refused() -> None:
    base = tiny_base()
    slot = base.host.attach([lora(), tuning()])
    state = slot.state()
    others = {k: v + 1 for k, v in state.items()}
    name = list(state)[-1]
    with pytest.raises(ConfigError, match="1 tensors are missing"):
        slot.load({k: v for k, v in others.items() if k != name})
    with pytest.raises(ConfigError, match=r"1 match nothing \(stranger\)"):
        slot.load(others | {"stranger": torch.zeros(1)})
    with pytest.raises(ConfigError, match="has shape"):
        slot.load(others | {name: torch.zeros(1, 1)})
    assert all(torch.equal(p, state[n]) for n, p in slot.parameters.items()), "a refused state changes nothing"


def test_a_state_is_a_copy() -> None:
    slot = tiny_base().host.attach([tuning()])
    state = slot.state()
    shake(slot)
    assert not torch.equal(state["prompt_embeddings"], slot.parameters["prompt_embeddings"])


# ------------------------------------------------------------------------------------------------ linear


class OnePlan:
    """Stands for the host: one plan that always runs, and the seeds of two slots."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.slots = {k: type("S", (), {"seed": k})() for k in (1, 2)}

    def running(self) -> Plan:
        return self.plan


def slot_linear(layer: nn.Module, dropout: float, training: bool) -> tuple[SlotLinear, list[Tensor]]:
    """Rows of the plain base, slot 1 (two segments) and slot 2 (another rank) through one layer."""
    segments = [
        Segment(0, 2, 0, index=0),
        Segment(2, 5, 1, index=1),
        Segment(5, 6, 1, index=2),
        Segment(6, 9, 2, index=3),
    ]
    plan = Plan.of(segments, steps={1: 3, 2: 4}, training=training)
    wrapped = SlotLinear(layer, "layer", OnePlan(plan))  # type: ignore[arg-type]
    size_in, size_out = linear_sizes(layer)
    matrices = []
    for number, rank in ((1, 2), (2, 3)):
        a = nn.Parameter(torch.randn(rank, size_in, dtype=torch.float64))
        b = nn.Parameter(torch.randn(size_out, rank, dtype=torch.float64))
        wrapped.deltas[number] = [LinearDelta.of(Terms(a, b, 0.7 * number), dropout)]
        matrices += [a, b]
    return wrapped, matrices


def layers() -> dict[str, nn.Module]:
    return {
        "linear": nn.Linear(5, 4),
        "no bias": nn.Linear(5, 4, bias=False),
        "conv1d": Conv1D(4, 5),
    }


@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.4, True), (0.4, False)])
def test_slot_linear_has_the_right_gradient(kind: str, dropout: float, training: bool) -> None:
    layer = layers()[kind].double().requires_grad_(False)
    wrapped, matrices = slot_linear(layer, dropout, training)
    x = torch.randn(1, 9, 5, dtype=torch.float64, requires_grad=True)

    def function(x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
        wrapped.deltas[1] = [LinearDelta.of(Terms(a1, b1, 0.7), dropout)]
        wrapped.deltas[2] = [LinearDelta.of(Terms(a2, b2, 1.4), dropout)]
        return wrapped(x)  # type: ignore[no-any-return]

    assert torch.autograd.gradcheck(function, (x, *matrices))
    assert torch.autograd.gradcheck(function, (x.detach(), *matrices)), "the first layer's input needs no gradient"


@pytest.mark.parametrize("kind", layers())
def test_slot_linear_computes_the_formula(kind: str) -> None:
    layer = layers()[kind].double().requires_grad_(False)
    wrapped, (a1, b1, a2, b2) = slot_linear(layer, 0.4, training=False)
    x = torch.randn(9, 5, dtype=torch.float64)
    y = layer(x)
    expected = torch.cat([y[:2], y[2:6] + 0.7 * x[2:6] @ a1.T @ b1.T, y[6:] + 1.4 * x[6:] @ a2.T @ b2.T])
    torch.testing.assert_close(wrapped(x[None])[0], expected, atol=1e-12, rtol=0)
    own = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight), layer.bias
    torch.testing.assert_close(merged(*own, wrapped.deltas[2])[0], own[0] + 1.4 * b2 @ a2)
    assert (wrapped.in_features, wrapped.out_features) == (5, 4)
    assert wrapped.weight is layer.weight
    assert wrapped.bias is layer.bias


@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize("scales_bias", [True, False])
def test_every_term_of_the_affine_form(kind: str, scales_bias: bool) -> None:
    """Two slots with everything at once beside the plain base: the formula, its gradient, and what it merges into."""
    layer = layers()[kind].double().requires_grad_(False)
    wrapped, _ = slot_linear(layer, 0.0, training=False)
    draw = [torch.randn(n, dtype=torch.float64) for n in (5, 4, 4)]
    a, b = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64)
    x = torch.randn(9, 5, dtype=torch.float64)

    def function(x: Tensor, i: Tensor, o: Tensor, d: Tensor, a: Tensor, b: Tensor) -> Tensor:
        both = Terms(a, b, 0.7, i, o, scales_bias, d)
        again = Terms(output_scale=o, scales_bias=scales_bias)
        wrapped.deltas = {1: [LinearDelta.of(both)], 2: [LinearDelta.of(again), LinearDelta.of(both)]}
        return wrapped(x[None])[0]  # type: ignore[no-any-return]

    found = function(x, *draw, a, b)
    weight, bias = (layer.weight.T if isinstance(layer, Conv1D) else layer.weight), layer.bias
    i, o, d = draw
    plain = torch.zeros(4, dtype=torch.float64) if bias is None else bias
    low = 0.7 * x @ a.T @ b.T
    one = o * ((i * x) @ weight.T) + low + (o * plain if scales_bias else plain) + d
    two = o * o * ((i * x) @ weight.T) + low + (o * o * plain if scales_bias else plain) + d
    torch.testing.assert_close(found, torch.cat([layer(x[:2]), one[2:6], two[6:]]), atol=1e-12, rtol=0)
    for number, rows in ((1, slice(2, 6)), (2, slice(6, 9))):
        new, offset = merged(weight, bias, wrapped.deltas[number])
        torch.testing.assert_close(nn.functional.linear(x[rows], new, offset), found[rows], atol=1e-12, rtol=0)
    inputs = [t.clone().requires_grad_() for t in (x, *draw, a, b)]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradcheck(function, (x, *inputs[1:])), "the first layer's input needs no gradient"


def test_dropout_keeps_the_mean_and_drops_whole_entries() -> None:
    size, rate = 4000, 0.25
    layer = nn.Linear(size, 1, bias=False).requires_grad_(False)
    layer.weight.zero_()
    plan = Plan.of([Segment(0, 6, 1, index=0)], training=True)
    wrapped = SlotLinear(layer, "layer", OnePlan(plan))  # type: ignore[arg-type]
    a, b = nn.Parameter(torch.ones(1, size)), nn.Parameter(torch.ones(1, 1))
    wrapped.deltas[1] = [LinearDelta.of(Terms(a, b, 1.0), rate)]
    sums = wrapped(torch.ones(1, 6, size))[0, :, 0].detach()
    kept = sums * (1 - rate)
    torch.testing.assert_close(kept, kept.round(), atol=0.01, rtol=0)
    assert len(set(kept.round().tolist())) > 1, "every token has its own mask"
    assert abs(float(sums.mean()) / size - 1) < 0.02


def test_dropout_masks_depend_on_slot_step_module_and_example_only() -> None:
    def masks(segments: list[Segment], step: int = 3, name: str = "layer") -> list[Tensor]:
        plan = Plan.of(segments, steps={1: step, 2: step}, training=True)
        layer = nn.Linear(50, 50, bias=False).requires_grad_(False)
        layer.weight.zero_()
        wrapped = SlotLinear(layer, name, OnePlan(plan))  # type: ignore[arg-type]
        for number in (1, 2):
            wrapped.deltas[number] = [
                LinearDelta.of(Terms(nn.Parameter(torch.eye(50)), nn.Parameter(torch.eye(50))), 0.5)
            ]
        y = wrapped(torch.ones(1, segments[-1].end, 50))[0].detach()
        return [y[s.start : s.end] for s in segments]

    alone = masks([Segment(0, 4, 1, index=7)])[0]
    mixed = masks(
        [Segment(0, 3, 0, index=7), Segment(3, 6, 1, index=6), Segment(6, 10, 1, index=7), Segment(10, 14, 2, index=7)]
    )
    assert torch.equal(alone, mixed[2])
    assert torch.equal(mixed[0], torch.zeros(3, 50)), "rows of the plain base have no update to drop from"
    others = [mixed[3], masks([Segment(0, 4, 1, index=8)])[0], masks([Segment(0, 4, 1, index=7)], step=4)[0]]
    others.append(masks([Segment(0, 4, 1, index=7)], name="other")[0])
    assert not any(torch.equal(alone, other) for other in others)


def test_a_layer_that_no_running_slot_touches_is_the_bare_layer() -> None:
    layer = nn.Linear(5, 4)
    plan = Plan.of([Segment(0, 3, 0), Segment(3, 5, 2)])
    wrapped = SlotLinear(layer, "layer", OnePlan(plan))  # type: ignore[arg-type]
    wrapped.deltas[1] = [LinearDelta.of(Terms(nn.Parameter(torch.ones(1, 5)), nn.Parameter(torch.ones(4, 1))))]
    x = torch.randn(1, 5, 5)
    assert torch.equal(wrapped(x), layer(x))


def test_what_is_linear() -> None:
    assert all(is_linear(layer) for layer in layers().values())
    assert not is_linear(nn.Embedding(3, 4))
    assert linear_sizes(Conv1D(4, 5)) == linear_sizes(nn.Linear(5, 4)) == (5, 4)


def test_stable_seeds() -> None:
    # blake2b is the same everywhere; written down so that resumed runs keep their masks over releases
    assert stable_seed("tailor") == int.from_bytes(bytes.fromhex("8930caf9dc60ea82"), "big") >> 1
    assert 0 <= stable_seed("") < 1 << 63


# ------------------------------------------------------------------------------------------------ embedding


def test_virtual_ids_are_rows_of_the_slots_own_table() -> None:
    base = tiny_base()
    first = base.host.attach([tuning(num_virtual_tokens=2)], seed=1)
    second = base.host.attach([tuning(num_virtual_tokens=4)], seed=2)
    segments = [Segment(0, 2, 0), Segment(2, 5, first.number), Segment(5, 9, second.number)]
    ids = torch.tensor([[7, 8, VIRTUAL + 1, 9, VIRTUAL, 9, VIRTUAL + 3, VIRTUAL + 3, VIRTUAL]])
    module = base.model.get_input_embeddings()
    assert isinstance(module, SlotEmbedding)
    with base.host.run(Plan.of(segments)):
        rows = module(ids)[0]
    table1, table2 = (s.parameters["prompt_embeddings"] for s in (first, second))
    words = module.weight
    expected = [words[7], words[8], table1[1], words[9], table1[0], words[9], table2[3], table2[3], table2[0]]
    assert torch.equal(rows, torch.stack(expected))
    rows.sum().backward()
    assert table2.grad[:, 0].tolist() == [1.0, 0.0, 0.0, 2.0]


@pytest.mark.parametrize("offset", [0, 5, 1000])
def test_a_virtual_id_without_a_table_is_an_error(offset: int) -> None:
    base = tiny_base()
    slot = base.host.attach([tuning(num_virtual_tokens=5)])
    other = base.host.attach([lora()])
    if offset >= 5:
        with pytest.raises(IndexError, match=f"slot {slot.number} has no virtual token {offset}"):
            base.logits([VIRTUAL + offset, 5], slot.number)
    for stranger in (0, other.number):
        with pytest.raises(IndexError, match=f"slot {stranger} has no virtual token {offset}"):
            base.logits([5, VIRTUAL + offset], stranger)


def test_prompt_rows_may_come_from_a_function() -> None:
    base = tiny_base()
    slot = base.host.attach([])
    half = slot.new_parameter("half", torch.randn(2, 32))
    slot.add_virtual_tokens(VirtualTokens(2, lambda: 2 * half))
    other = base.host.attach([tuning(num_virtual_tokens=2)])
    other.load({"prompt_embeddings": (2 * half).detach()})
    ids = [*slot.virtual_ids, 5, 6]
    assert torch.equal(base.logits(ids, slot.number), base.logits(ids, other.number))


def test_word_embeddings_are_what_the_model_uses() -> None:
    """Gemma 3 scales inside its embedding: a table that starts from words must start from the scaled ones."""
    for model_type in ("llama", "gemma", "gemma3_text"):
        base = tiny_base(model_type)
        slot = base.host.attach([tuning(init="text", init_text="the quick brown fox")])
        words = base.tokenizer.encode("the quick brown fox")[:3]
        assert torch.equal(base.logits([*slot.virtual_ids, 5], slot.number), base.logits([*words, 5]))


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "opt"])
def test_the_size_of_the_word_embeddings(model_type: str) -> None:
    base = tiny_base(model_type)
    words = base.model.get_input_embeddings()(torch.arange(base.tokenizer.vocab_size)).double()
    expected = math.sqrt(float((words**2).mean()))
    assert base.host.embedding_rms() == pytest.approx(expected, rel=1e-5)
    base.host.attach([tuning()])
    assert base.host.embedding_rms() == pytest.approx(expected, rel=1e-5), "virtual tokens are no words"


# ------------------------------------------------------------------------------------------------ plans


def test_a_slot_is_one_span() -> None:
    segments = [Segment(a, b, s) for (a, b), s in zip(itertools.pairwise([0, 2, 5, 6, 9]), [0, 1, 1, 4], strict=True)]
    assert Plan.of(segments).spans == (Span(0, 0, 2), Span(1, 2, 6), Span(4, 6, 9))


@pytest.mark.parametrize(
    "segments",
    [
        [Segment(1, 3)],
        [Segment(0, 3), Segment(4, 5)],
        [Segment(0, 3, 2), Segment(3, 5, 1)],
        [Segment(0, 3, parent=0)],
        [Segment(0, 3, parent=1), Segment(3, 5)],
    ],
)
def test_malformed_segment_tables_are_caught(segments: list[Segment]) -> None:
    with pytest.raises(AssertionError):
        Plan.of(segments)


def test_passes_do_not_nest() -> None:
    base = tiny_base()
    plan = Plan.of([Segment(0, 2)])
    with base.host.run(plan), pytest.raises(AssertionError, match="already running"), base.host.run(plan):
        pass
    with pytest.raises(ZeroDivisionError), base.host.run(plan):
        1 / 0
    base.logits([5, 6])  # a failed pass leaves no plan behind


def test_prompting_composes_and_touches_no_weight() -> None:
    base = tiny_base()
    before = tree(base)
    slot = base.host.attach([Prompting(system="Be short.", shots=0)])
    assert tree(base) == before
    assert slot.parameters == {}
    assert slot.compose is not None
    assert [m.content for m in slot.compose((user("Hi"),))] == ["Be short.", "Hi"]
