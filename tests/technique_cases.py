"""One instance of every registered technique, small enough for a tiny model, and how the contract tests use them.

A new technique needs one line in CASES (and nothing else) to be held to every contract; without it they all fail.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tailor.data.examples import Example
from tailor.data.packing import Batch, Placed, pack
from tailor.data.records import PromptCompletion
from tailor.models.base import Base
from tailor.models.plan import Plan
from tailor.models.slots import BASE_SLOT, Slot
from tailor.objectives.objective import scored_by_slot
from tailor.objectives.sft import SFT
from tailor.techniques import TECHNIQUES
from tailor.techniques.adapter import Adapter
from tailor.techniques.full import Full
from tailor.techniques.ia3 import IA3
from tailor.techniques.lora import LoRA
from tailor.techniques.new_tokens import NewTokens
from tailor.techniques.p_tuning import PTuning
from tailor.techniques.prefix_tuning import PrefixTuning
from tailor.techniques.prompt_tuning import PromptTuning
from tailor.techniques.prompting import Prompting, Shot
from tailor.techniques.technique import Technique, Traits
from tailor.training.settings import TrainSettings, resolve_settings
from tailor.training.trainer import SlotRun
from tiny_models import tiny_base

CASES: dict[str, Any] = {
    "prompting": Prompting(
        system="Be quick.", template="Q: {prompt}", shots=1, examples=(Shot(prompt="fox", completion="dog"),)
    ),
    "prompt_tuning": PromptTuning(num_virtual_tokens=3),
    "p_tuning": PTuning(num_virtual_tokens=4, encoder_hidden=12, condition="fox"),
    "prefix_tuning": PrefixTuning(num_virtual_tokens=4),
    "adapter": Adapter(bottleneck_size=3),
    "ia3": IA3(),
    "lora": LoRA(rank=2, alpha=4.0),
    # as many as take all the padding rows of the tiny models' embeddings, and more
    "new_tokens": NewTokens(tokens=("fox", "dog", "quick", "brown", "lazy", "there", *(f"<{k}>" for k in range(9)))),
    "full": Full(),
}
# more of the same kinds, with other sizes, for batches in which every row belongs to somebody else
VARIANTS: dict[str, Any] = {
    "prompt_tuning/5": PromptTuning(num_virtual_tokens=5, init="random"),
    "prompt_tuning/markers": PromptTuning(
        num_virtual_tokens=5,
        template={
            "prompt_template": "over <|VIRTUAL_PROMPT_1|> the {prompt}<|VIRTUAL_PROMPT_0|>{completion}",
            "virtual_token_splits": (2, 3),
        },
    ),
    "p_tuning/lstm": PTuning(num_virtual_tokens=2, encoder="lstm", encoder_hidden=6, dropout=0.2),
    "p_tuning/embedding": PTuning(num_virtual_tokens=6, encoder="embedding"),
    "prefix_tuning/reparametrised": PrefixTuning(
        num_virtual_tokens=2, reparametrisation=True, encoder_hidden=12, init="text", init_text="the quick fox"
    ),
    "lora/qv": LoRA(rank=3, alpha=3.0, dropout=0.2, target_modules="query-value", target_layers=(0, 2)),
    "lora/rslora": LoRA(rank=4, alpha=3.0, rslora=True, dropout=0.1),
    "lora/dora": LoRA(rank=2, alpha=4.0, dora=True),
    "lora/pissa": LoRA(rank=2, alpha=3.0, init="pissa"),
    "lora/patterns": LoRA(
        rank=2,
        alpha=3.0,
        init_a="gaussian",
        lora_plus_ratio=4.0,
        rank_pattern={"*.1.*": 3},
        alpha_pattern={"*.0.*": 1.0},
        exclude_modules=("*.2.*",),
    ),
    "adapter/parallel": Adapter(
        bottleneck_size=6, form="parallel", norm="none", activation="relu", scale=4.0, bias=True
    ),
    "adapter/post": Adapter(bottleneck_size=4, norm="post", dropout=0.2, blocks=("mlp",), target_layers=(1, 2)),
    "adapter/tied": Adapter(bottleneck_size=2, weight_tying=True, activation="gelu"),
    "new_tokens/mean": NewTokens(tokens=("quick", "<sku>", "lazy", "brown", "there"), init="mean"),
    "ia3/modules": IA3(target_modules=("*.1.*", "*.2.*"), feedforward_modules=("*.2.*",)),
}


def instance(name: str) -> Technique:
    """The technique that is called so in CASES or VARIANTS."""
    assert name in CASES or name in VARIANTS, f"add an instance of {name!r} to CASES in tests/technique_cases.py"
    return (CASES | VARIANTS)[name]  # type: ignore[no-any-return]


def traits(name: str) -> Traits:
    """The traits of a technique or a variant of it (kind/what is different)."""
    return TECHNIQUES[name.partition("/")[0]].traits


Subject = tuple[str, ...]
"""The names of the techniques that are attached together as one slot."""

SINGLES: list[Subject] = [(name,) for name in TECHNIQUES]
EXCLUSIVE: list[Subject] = [
    pair
    for pair in itertools.combinations(TECHNIQUES, 2)
    if all(TECHNIQUES[name].traits.where == "embedding" for name in pair)
]
"""Two that both put virtual tokens in front."""
PAIRS: list[Subject] = [
    pair
    for pair in itertools.combinations(TECHNIQUES, 2)
    if all(TECHNIQUES[name].traits.mixes for name in pair) and pair not in EXCLUSIVE
]
VARIED: list[Subject] = [(name,) for name in VARIANTS]
TRAINED = [s for s in SINGLES + PAIRS + VARIED if any(traits(name).defaults for name in s)]
MIXED = [s for s in SINGLES + PAIRS if all(TECHNIQUES[name].traits.mixes for name in s)]

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "hello", "there", "how", "are", "you"]


def label(subject: Subject) -> str:
    """How a subject is called in test names and as an artifact."""
    return "+".join(subject)


def attach(base: Base, subject: Subject, seed: int = 1, noise: float = 0.05) -> Slot:
    """A slot with the subject's techniques, moved away from its start (where LoRA is the base) by `noise`."""
    slot = base.host.attach([instance(name) for name in subject], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in slot.parameters.values():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator).to(parameter))
    return slot


def records(task: int, num: int = 6) -> list[PromptCompletion]:
    """Rows of a made-up task: words in, words out, all of unequal length."""
    draw = random.Random(task)
    return [
        PromptCompletion(
            prompt=" ".join(draw.choices(WORDS, k=draw.randint(1, 8))),
            completion=" ".join(draw.choices(WORDS, k=draw.randint(1, 4))),
        )
        for _ in range(num)
    ]


def examples(base: Base, slot: Slot | None, task: int, num: int = 6) -> list[Example]:
    """The rows as this slot sees them: rewritten by its prompting, behind its virtual tokens."""
    found = [base.rendering(slot).example(record) for record in records(task, num)]
    return [example for example in found if example is not None]


def place(base: Base, slots: Sequence[Slot | None], num: int = 3) -> list[Placed]:
    """`num` rows for every slot (None is the plain base), each slot with a task of its own."""
    return [
        Placed(example, slot.number if slot else BASE_SLOT, index)
        for slot in slots
        for index, example in enumerate(examples(base, slot, slot.seed if slot else 0, num))
    ]


def logits_by_row(base: Base, batch: Batch) -> dict[tuple[int, int], Tensor]:
    """(slot, index) → the (t, V) logits of that sequence's own tokens."""
    plan = Plan.of_batch(batch)
    with torch.no_grad(), base.host.run(plan):
        hidden = base.hidden(plan, batch.input_ids, batch.position_ids)
        logits = base.logits_at(plan, hidden, torch.arange(batch.num_tokens))
    # a slot's own words are columns that others do not have
    widths = {s.slot: base.head_of(s.slot).num_logits for s in batch.segments}
    return {(s.slot, s.index): logits[s.start : s.end, : widths[s.slot]] for s in batch.segments if s.index >= 0}


def losses_and_gradients(
    base: Base, placed: Sequence[Placed], tokens_per_batch: int = 10_000, *, share_prefixes: bool = False
) -> tuple[dict[int, Tensor], dict[int, dict[str, Tensor]]]:
    """Each slot's mean loss over its rows, and the gradients that one backward per micro-batch leaves."""
    slots = list(base.host.slots.values())
    for slot in slots:
        for parameter in slot.parameters.values():
            parameter.grad = None
    counts = {n: sum(p.example.num_targets for p in placed if p.slot == n) for n in {p.slot for p in placed}}
    losses = {number: torch.zeros((), dtype=torch.float64) for number in counts}
    for batch in pack(placed, tokens_per_batch, share_prefixes=share_prefixes):
        plan = Plan.of_batch(batch)
        with base.host.run(plan):
            scored = scored_by_slot(batch, base.batch_logprobs(batch, plan))
            parts = {n: SFT().loss(s) / counts[n] for n, s in scored.items()}
            total = torch.stack(list(parts.values())).sum()
            if total.requires_grad:
                total.backward()
        for number, part in parts.items():
            losses[number] += part.detach()
    gradients = {
        slot.number: {n: p.grad.clone() for n, p in slot.parameters.items() if p.grad is not None} for slot in slots
    }
    return losses, gradients


def slot_run(base: Base, slot: Slot, task: int, name: str = "run", num_rows: int = 6, **settings: Any) -> SlotRun:
    """A training of `slot` on a task; `validation` in settings names the task to validate on."""
    validation = settings.pop("validation", None)
    chosen = TrainSettings(**{"learning_rate": 0.01, "num_steps": 3, "batch_size": 3, **settings})
    train = examples(base, slot, task, num_rows)
    defaults = LoRA.traits.defaults
    assert defaults is not None
    held_out = examples(base, slot, validation) if validation is not None else []
    resolved = resolve_settings(chosen, defaults, len(train), base.host.embedding_rms())
    alone = [[(example,) for example in side] for side in (train, held_out)]
    return SlotRun(name, slot, SFT(), *alone, chosen, resolved)


def fresh(
    subject: Subject, model_type: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 1
) -> tuple[Base, Slot]:
    """A new tiny base with the subject attached."""
    base = tiny_base(model_type, dtype)
    return base, attach(base, subject, seed)
