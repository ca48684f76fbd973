"""Parity: what was trained is what is served. Token logprobs of held-out rows, compared at every hop.

    trainer's packed pass │ one row at a time │ cached generation │ reloaded │ merged │ exported …
        the reference          within the gate, which follows from the noise floor

Greedy texts may differ by one near-tie; logprobs show a wrong scale, template, position or rounding at once.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tailor.data.examples import Example
from tailor.data.packing import Segment
from tailor.errors import DataError, QualityError
from tailor.evaluation.likelihood import packed_logprobs, slot_number
from tailor.models.base import Base, plain_experts
from tailor.models.kv_cache import KVCache
from tailor.models.plan import Plan
from tailor.models.slots import Slot
from tailor.text.tokenizer import VIRTUAL

Scorer = Callable[[Sequence[Example]], list[Tensor]]
"""Logprobs of each example's counted tokens, one (n,) per example."""

MAX_TWIN_PARAMETERS = 1_000_000_000
"""Up to here the noise floor copies the base in the next higher precision; above, memory is worth more."""

HIGHER = {
    torch.float32: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


@dataclass(frozen=True, slots=True)
class Tolerance:
    """The gate for one precision: `factor` × the noise floor, never below `least` and never above `most`.

    A hop adds its own rounding to the reference's, in another order: a few times the floor. `least` is what nobody can
    see in an answer. A floor that asks for more than `most` is no noise: something is wrong in the pass itself.
    """

    factor: float
    least: float
    most: float

    def gate(self, floor: float) -> float:
        """The largest logprob difference that passes."""
        return min(max(self.least, self.factor * floor), self.most)


FINE = Tolerance(factor=10.0, least=1e-4, most=1e-2)
"""float32 and float64: floors are about 1e-6 to 1e-5."""

COARSE = Tolerance(factor=4.0, least=0.02, most=1.0)
"""bfloat16 and float16: floors are 0.01 to 0.2, and a merge rounds the weights once more."""


@dataclass(frozen=True, slots=True)
class Hop:
    """One way to the same logprobs, against the trainer's: differences in nats over all counted tokens."""

    name: str
    max_difference: float
    mean_difference: float
    passed: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class Parity:
    """The result over `num_rows` rows and `num_tokens` counted tokens."""

    hops: tuple[Hop, ...]
    noise_floor: float
    gate: float
    num_rows: int
    num_tokens: int
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every hop did, against a noise floor that is a number."""
        return math.isfinite(self.noise_floor) and math.isfinite(self.gate) and all(hop.passed for hop in self.hops)

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it; a difference, floor or gate that is no number becomes None."""
        hops = [_finite(asdict(hop)) for hop in self.hops]
        return {**_finite(asdict(self)), "hops": hops, "passed": self.passed}

    def check(self) -> None:
        """Raise QualityError naming the worst hop unless all passed."""
        failed = [hop for hop in self.hops if not hop.passed]
        if failed:
            worst = max(failed, key=lambda hop: hop.max_difference)
            raise QualityError(
                f"{worst.name}: token logprobs differ from the trainer's by up to {worst.max_difference:.2g} "
                f"({worst.note}); at most {self.gate:.2g} passes, the noise floor is {self.noise_floor:.2g}",
                hint=f"answers from there would not be those of the trained model ({len(failed)} of {len(self.hops)} "
                "hops failed)",
            )
        if not self.passed:
            raise QualityError(
                f"the noise floor is {self.noise_floor}: the model's logprobs are no numbers",
                hint="set base.dtype to bfloat16 or float32 (float16 overflows in many models)",
            )


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def verify(
    base: Base,
    slot: Slot | None,
    examples: Sequence[Example],
    *,
    hops: Mapping[str, Scorer] | None = None,
    num_rows: int = 16,
    seed: int = 0,
) -> Parity:
    """Compare every hop with the trainer's packed pass on at most `num_rows` held-out examples, drawn by `seed`.

    `hops` are the caller's own (a reloaded artifact, merged weights, an export) beside the two that every slot has.
    Raises DataError when there are no examples.
    """
    if not examples:
        raise DataError("parity needs at least one held-out row")
    if len(examples) > num_rows:
        chosen = sorted(random.Random(seed).sample(range(len(examples)), num_rows))
        examples = [examples[k] for k in chosen]
    reference = packed_logprobs(base, slot, examples)
    alone = alone_logprobs(base, slot, examples)
    floor, note = noise_floor(base, slot, examples, reference, alone)
    scorers: dict[str, Scorer] = {
        "one row at a time": lambda _: alone,
        "cached generation": lambda rows: cached_logprobs(base, slot, rows),
        **(hops or {}),
    }
    gate = (FINE if base.dtype in (torch.float32, torch.float64) else COARSE).gate(floor)
    compared = tuple(compare(name, reference, score(examples), gate, examples) for name, score in scorers.items())
    return Parity(compared, floor, gate, len(examples), sum(len(r) for r in reference), note)


def compare(
    name: str, reference: Sequence[Tensor], found: Sequence[Tensor], gate: float, examples: Sequence[Example] = ()
) -> Hop:
    """One hop's logprobs against the reference. Other numbers of tokens, or NaN, never pass."""
    lengths = [[len(logprobs) for logprobs in side] for side in (reference, found)]
    if lengths[0] != lengths[1]:
        note = f"{sum(lengths[1])} counted tokens in {len(found)} rows instead of {sum(lengths[0])} in {len(reference)}"
        return Hop(name, math.inf, math.inf, False, note)
    differences = [_apart(a, b) for a, b in zip(reference, found, strict=True)]
    every = torch.cat(differences)
    row = max(range(len(differences)), key=lambda k: float(differences[k].max()) if len(differences[k]) else 0.0)
    token = int(differences[row].argmax()) if len(differences[row]) else 0
    source = str(examples[row].source) if examples else ""
    note = f"worst at token {token} of the completion in {source or f'row {row}'}"
    worst = float(every.max())
    return Hop(name, worst, float(every.mean()), worst <= gate, note)


def _apart(first: Tensor, second: Tensor) -> Tensor:
    """|first - second| in float64 on the CPU; what is NaN on either side is infinitely far apart."""
    difference = (first.detach().double().cpu() - second.detach().double().cpu()).abs()
    return difference.nan_to_num(nan=math.inf, posinf=math.inf)


def alone_logprobs(base: Base, slot: Slot | None, examples: Sequence[Example]) -> list[Tensor]:
    """Each row in a pass of its own, last row first: nothing that packing could mix up."""
    scores = [packed_logprobs(base, slot, [example])[0] for example in reversed(examples)]
    return scores[::-1]


def noise_floor(
    base: Base, slot: Slot | None, examples: Sequence[Example], reference: Sequence[Tensor], alone: Sequence[Tensor]
) -> tuple[float, str]:
    """The largest logprob difference that rounding alone makes, and how it was measured.

    Rows packed against rows alone, and the base against its copy in the next higher precision (fp32 → float64,
    bf16 → fp32) with the same slot. Where a copy is too large or the device lacks the precision, packing alone decides.
    """
    floor = compare("alone", reference, alone, math.inf).max_difference
    higher = HIGHER.get(base.dtype)
    if higher is None:
        return floor, "noise floor: packed against alone (there is no higher precision)"
    if base.num_parameters >= MAX_TWIN_PARAMETERS or (base.device.type == "mps" and higher is torch.float64):
        return floor, "noise floor: packed against alone (no copy in higher precision fits this base or device)"
    exact = packed_logprobs(twin(base, higher), slot, examples)
    floor = max(floor, compare("twin", reference, exact, math.inf).max_difference)
    return floor, f"noise floor: packed against alone, and against {str(higher).removeprefix('torch.')}"


def twin(base: Base, dtype: torch.dtype) -> Base:
    """A copy of the base with all its slots that computes in `dtype`; slot numbers stay the same.

    Trained parameters keep their own (fp32) values and are cast where they are used, as always.
    """
    shared = [base.tokenizer, base.renderer]
    shared += [own for slot in base.host.slots.values() for own in (slot.compose, slot.renderer)]
    double = copy.deepcopy(base, {id(item): item for item in shared})
    double.model.to(dtype)
    plain_experts(double.model)
    double.dtype = double.host.dtype = dtype
    return double


@torch.inference_mode()
def cached_logprobs(base: Base, slot: Slot | None, examples: Sequence[Example]) -> list[Tensor]:
    """The generation path, forced along the examples: each prompt into a cache, then a token of every row per pass."""
    forced = [_Forced(example) for example in examples]
    for row in forced:
        _feed(base, slot, [row])
    while active := [row for row in forced if row.fed <= row.last]:
        _feed(base, slot, active)
    return [torch.tensor(row.logprobs) for row in forced]


class _Forced:
    """An example on its way through the cache: `fed` tokens are in, the last one needed is at `last`."""

    def __init__(self, example: Example) -> None:
        self.token_ids = example.token_ids
        pairs = zip(example.token_ids, example.loss_mask, strict=True)
        self.counted = [bool(mask) and k > 0 and token < VIRTUAL for k, (token, mask) in enumerate(pairs)]
        targets = [k for k, counted in enumerate(self.counted) if counted]
        self.first, self.last = (targets[0], targets[-1] - 1) if targets else (len(self.token_ids), -1)
        self.fed = 0
        self.cache = KVCache()
        self.logprobs: list[float] = []

    @property
    def pending(self) -> Sequence[int]:
        """The prompt at first, then one token."""
        return self.token_ids[self.fed : self.fed + 1] if self.fed else self.token_ids[: self.first]


def _feed(base: Base, slot: Slot | None, rows: Sequence[_Forced]) -> None:
    """One pass over the rows' pending tokens; keeps the logprob of each row's next token where it counts."""
    segments: list[Segment] = []
    ids: list[int] = []
    positions: list[int] = []
    for row in rows:
        pending, start = row.pending, len(ids)
        ids += pending
        positions += range(row.fed, row.fed + len(pending))
        segments.append(Segment(start, len(ids), slot_number(slot), position0=row.fed))
    plan = Plan.of(segments, caches=[row.cache for row in rows])
    with base.host.run(plan):
        hidden = base.hidden(plan, torch.tensor(ids, device=base.device), torch.tensor(positions, device=base.device))
        last = torch.tensor([segment.end - 1 for segment in segments], device=base.device)
        logprobs = base.logits_at(plan, hidden, last).log_softmax(dim=1).cpu()
    for k, row in enumerate(rows):
        row.fed += segments[k].length
        if row.fed < len(row.token_ids) and row.counted[row.fed]:
            row.logprobs.append(float(logprobs[k, row.token_ids[row.fed]]))


@torch.no_grad()
def stock_logprobs(model: Any, examples: Sequence[Example], virtual: Tensor | None = None) -> list[Tensor]:
    """Logprobs by a transformers model as anybody would load it: its own attention, one row at a time, no padding.

    `virtual` (num, hidden) are the rows that virtual tokens stand for: they go in as embeddings, as PEFT does it.
    Raises QualityError when examples have virtual tokens and there are no rows for them.
    """
    device = next(model.parameters()).device
    found = []
    for example in examples:
        ids = torch.tensor(list(example.token_ids), device=device)
        is_virtual = ids >= VIRTUAL
        if bool(is_virtual.any()) and (virtual is None or int(ids.max()) - VIRTUAL >= len(virtual)):
            raise QualityError("these rows have virtual tokens, but the model was given no embeddings for them")
        vectors = model.get_input_embeddings()(ids.masked_fill(is_virtual, 0))
        if virtual is not None:
            vectors = vectors.clone()
            vectors[is_virtual] = virtual.to(device, vectors.dtype)[ids[is_virtual] - VIRTUAL]
        logits = model(inputs_embeds=vectors[None], use_cache=False).logits[0]
        counted = torch.tensor(list(example.loss_mask[1:]), dtype=torch.bool, device=device) & ~is_virtual[1:]
        wanted = logits[:-1][counted]
        wide = wanted.to(torch.promote_types(wanted.dtype, torch.float32)).log_softmax(dim=1)
        found.append(wide.gather(1, ids[1:][counted][:, None])[:, 0].cpu())
    return found
