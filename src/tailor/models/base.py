"""The base: any causal LM that transformers can load, frozen once, run packed, many slots at a time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tailor.data.examples import Rendering, Truncation
from tailor.data.packing import Batch, Segment
from tailor.errors import ConfigError, ResourceError, nearest
from tailor.machine import keep_freed_memory
from tailor.models import attention
from tailor.models.attention import ATTENTION
from tailor.models.decode_step import LIMIT, Stepper, apart
from tailor.models.files import fingerprint, resolve, weight_files
from tailor.models.fused import fuse
from tailor.models.host import SlotHost
from tailor.models.loss_head import Head, token_logprobs
from tailor.models.nf4 import nf4_layers
from tailor.models.placement import placement_of, read_config
from tailor.models.plan import Plan
from tailor.models.quantised import QUANTISED, load_quantised
from tailor.models.slots import Slot
from tailor.text.render import Renderer, TrainedTurns, make_renderer
from tailor.text.tokenizer import Tokenizer, load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}

OUT_OF_MEMORY = re.compile(r"out of memory|not enough memory|can(?:'|no)t allocate memory", re.IGNORECASE)
"""What CUDA, MPS, Windows and Linux say."""


class Base:
    """A loaded, frozen model with its tokenizer, renderer and slot host.

    Every pass goes through `hidden`: packed tokens in, hidden states out. T packed tokens, H hidden size, V vocabulary.
    """

    def __init__(
        self, name: str, folder: Path, model: nn.Module, tokenizer: Tokenizer, device: torch.device, base_print: str
    ) -> None:
        self.name = name
        self.folder = folder
        self.model = model
        self.config: Any = model.config
        self.tokenizer = tokenizer
        self.renderer: Renderer = make_renderer(tokenizer)
        self.device = device
        self.dtype = next(model.parameters()).dtype
        self.fingerprint = base_print
        self.host = SlotHost(model, placement_of(self.config), tokenizer)
        self.stepper = Stepper(self.host)
        self.max_seq_len = context_length(self.config)
        quantised = nf4_layers(model)
        self.quantize = QUANTISED[0] if quantised else None
        self.num_parameters = sum(p.numel() for p in model.parameters()) + sum(
            q.num_weights for q in quantised.values()
        )
        self._decoder: nn.Module = model.base_model  # type: ignore[assignment]

    @property
    def head(self) -> Head:
        """The loss head, over the model's own output weights (tied or not)."""
        output: nn.Module = self.model.get_output_embeddings()  # type: ignore[operator]
        return Head(
            output.weight,  # type: ignore[arg-type]
            getattr(output, "bias", None),
            scale=1.0 / float(getattr(self.config, "logits_scaling", 1.0) or 1.0),
            softcap=getattr(self.config, "final_logit_softcapping", None),
        )

    def head_of(self, slot: int) -> Head:
        """The loss head as a slot has it: with the columns of its own words, if it has some."""
        own = self.host.slots[slot].new_rows if slot in self.host.slots else None
        return self.head if own is None else replace(self.head, new=own.head, first=own.first)

    def _heads(self, plan: Plan) -> list[tuple[Head, int, int]]:
        """(head, start, end) of the plan's tokens in order; what has no words of its own is not cut apart."""
        found: list[tuple[Head, int, int]] = []
        for span in plan.spans:
            head = self.head_of(span.slot)
            if found and head.new is None and found[-1][0].new is None:
                found[-1] = (found[-1][0], found[-1][1], span.end)
            else:
                found.append((head, span.start, span.end))
        return found

    def target_logprobs(self, plan: Plan, hidden: Tensor, counted: Tensor, targets: Tensor) -> Tensor:
        """(N,) logprobs of `targets` (N,) after the pass's hidden states (T, H) at its N `counted` tokens (T,)."""
        heads = self._heads(plan)
        if len(heads) == 1:
            return token_logprobs(hidden[counted], heads[0][0], targets)
        sizes = [int(counted[start:end].sum()) for _, start, end in heads]
        parts = zip(heads, targets.split(sizes), strict=True)
        return torch.cat([token_logprobs(hidden[a:b][counted[a:b]], head, wanted) for (head, a, b), wanted in parts])

    def logits_at(self, plan: Plan, hidden: Tensor, places: Tensor) -> Tensor:
        """(n, V) logits at some of the pass's tokens, in ascending order.

        With slots that have words of their own, V is the most that any of them has, and -inf is what others have not.
        """
        heads = self._heads(plan)
        if len(heads) == 1:
            step = self.stepper.step if plan.decodes else None
            return heads[0][0].logits(hidden[places], product=step.head if step else None)
        width = max(head.num_logits for head, _, _ in heads)
        parts = [head.logits(hidden[places[(places >= a) & (places < b)]]) for head, a, b in heads]
        return torch.cat([nn.functional.pad(z, (0, width - z.shape[1]), value=-torch.inf) for z in parts])

    def hidden(self, plan: Plan, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """Packed (T,) ids and positions → (T, H). Must be called inside `host.run(plan)`.

        Raises ResourceError when a position lies beyond the base's context.
        """
        offsets = {span.slot: prefix.num for span in plan.spans if (prefix := self.host.prefix_of(span.slot))}
        longest = max((s.position0 + s.length + offsets.get(s.slot, 0) for s in plan.segments), default=0)
        if longest > self.max_seq_len:
            raise ResourceError(f"a sequence of {longest} tokens exceeds the base's context of {self.max_seq_len}")
        assert self.config._attn_implementation == ATTENTION, "somebody changed the config's attention"
        if offsets:  # a prefix takes the first positions, as the past of a cache would
            lengths = torch.tensor([span.end - span.start for span in plan.spans], device=position_ids.device)
            shifts = torch.tensor([offsets.get(span.slot, 0) for span in plan.spans], device=position_ids.device)
            position_ids = position_ids + shifts.repeat_interleave(lengths, output_size=len(position_ids))

        def modules() -> Tensor:
            output = self._decoder(input_ids=input_ids[None], position_ids=position_ids[None], use_cache=False)
            return output.last_hidden_state[0]  # type: ignore[no-any-return]

        if plan.decodes and not torch.is_grad_enabled():
            return self.stepper.run(plan, input_ids, position_ids, modules)
        return modules()

    def batch_logprobs(self, batch: Batch, plan: Plan) -> Tensor:
        """(N,) logprobs of the batch's N counted targets, in token order. Must be called inside `host.run(plan)`."""
        hidden = self.hidden(plan, batch.input_ids.to(self.device), batch.position_ids.to(self.device))
        counted = batch.loss_mask.to(self.device)
        return self.target_logprobs(plan, hidden, counted, batch.targets.to(self.device)[counted])

    @torch.no_grad()
    def score(self, batch: Batch) -> Tensor:
        """`batch_logprobs` without gradients, in a pass of its own; (N,) on the CPU."""
        plan = Plan.of_batch(batch)
        with self.host.run(plan):
            return self.batch_logprobs(batch, plan).cpu()

    def score_by_segment(self, batch: Batch) -> list[Tensor]:
        """`score`, cut into the batch's segments: one (n,) tensor per row of the segment table."""
        counts = [int(batch.loss_mask[s.start : s.end].sum()) for s in batch.segments]
        return list(self.score(batch).split(counts))

    def room(self, slot: Slot | None) -> int:
        """Tokens that a sequence of this slot may have, its virtual tokens counted: the context less its prefix."""
        return self.max_seq_len - (slot.num_prefix if slot else 0)

    def rendering(
        self,
        slot: Slot | None = None,
        *,
        task: str | None = None,
        max_seq_len: int | None = None,
        trained_turns: TrainedTurns = "all",
        truncation: Truncation = "error",
        training: bool = False,
    ) -> Rendering:
        """How rows and prompts become tokens for a slot, None being the plain base: the one place that knows.

        `max_seq_len` is held to the room that the slot leaves; `task` is one of a slot with several.
        """
        room = self.room(slot)
        return Rendering(
            slot.renderer or self.renderer if slot else self.renderer,
            min(max_seq_len or room, room),
            compose=slot.compose if slot else None,
            trained_turns=trained_turns,
            truncation=truncation,
            tasks=dict(slot.prompts) if slot else {},
            task=task,
            training=training,
        )

    @torch.no_grad()
    def logits(self, token_ids: list[int], slot: int = 0) -> Tensor:
        """(T, V) logits of one sequence in fp32: for tests, probes and verification."""
        plan = Plan.of([Segment(0, len(token_ids), slot)])
        with self.host.run(plan):
            ids = torch.tensor(token_ids, device=self.device)
            hidden = self.hidden(plan, ids, torch.arange(len(token_ids), device=self.device))
            return self.head_of(slot).logits(hidden)


def load_base(
    name_or_path: str | Path = "tailor-nano", device: str = "auto", dtype: str = "auto", quantize: str | None = None
) -> Base:
    """Load `tailor-nano` (embedded), a local folder, or a hub id (downloaded once, because you named it).

    `device`: auto, cpu, cuda, mps. `dtype`: auto is bfloat16 on a GPU that has it and float32 elsewhere. Safetensors
    only; code that ships with a model is never run. `quantize: nf4` keeps the decoder's linear layers in 4 bits (QLoRA;
    everything else in `dtype`). Raises NotFoundError, AuthError, ConfigError, and ResourceError when the weights do not
    fit into memory.
    """
    from transformers import AutoModelForCausalLM

    where = pick_device(device)
    kind = pick_dtype(dtype, where)
    if quantize is not None and quantize not in QUANTISED:
        raise ConfigError(f"quantize: {quantize!r} is unknown", hint=nearest(quantize, QUANTISED))
    config = read_config(resolve(name_or_path, weights=False))  # refused before gigabytes are downloaded
    folder = resolve(name_or_path)
    quiet_loading(folder)
    attention.register()
    try:
        if quantize is not None:
            model = load_quantised(folder, config, where, kind)
        else:
            model = AutoModelForCausalLM.from_pretrained(
                str(folder),
                config=config,
                dtype=kind,
                attn_implementation="eager",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
        return wrap_model(model, load_tokenizer(folder), where, name=str(name_or_path), folder=folder)
    except (RuntimeError, MemoryError, OSError) as error:
        if not isinstance(error, MemoryError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        size, name = count_parameters(config) * kind.itemsize / 2**30, dtype_name(kind)
        raise ResourceError(
            f"{name_or_path} does not fit on {where}: its weights take {size:.2g} GiB in {name}",
            hint="choose a smaller base" if kind.itemsize < 4 else "set dtype: bfloat16, or choose a smaller base",
        ) from error


def count_parameters(config: Any) -> int:
    """Parameters of a model with this configuration, tied ones once; no memory is taken and no file read."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return sum(p.numel() for p in model.parameters())


def quiet_loading(folder: Path) -> None:
    """A bar for loading is worth showing from a gigabyte on."""
    from transformers.utils import logging

    large = sum(path.stat().st_size for path in weight_files(folder)) > 1_000_000_000
    (logging.enable_progress_bar if large else logging.disable_progress_bar)()


def wrap_model(
    model: Any, tokenizer: Tokenizer, device: torch.device, *, name: str = "model", folder: Path | None = None
) -> Base:
    """A Base over a transformers model that is already in memory; checks the packed attention against the stock one."""
    attention.register()
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device).eval()
    plain_experts(model)
    stock = _stock_probe(model, device)
    model.set_attn_implementation(ATTENTION)
    if device.type == "cpu":
        fuse(model)
    base = Base(name, folder or Path(), model, tokenizer, device, fingerprint(folder) if folder else "")
    _check_probe(base, stock)
    return base


def plain_experts(model: Any) -> None:
    """Experts one after the other in a float64 model: torch's grouped matrix product has no float64."""
    if next(model.parameters()).dtype == torch.float64 and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")


def _probe_ids(config: Any) -> list[int]:
    return [(7 * k + 11) % min(1000, int(config.vocab_size)) for k in range(12)]


@torch.no_grad()
def _stock_probe(model: Any, device: torch.device) -> Tensor:
    ids = torch.tensor([_probe_ids(model.config)], device=device)
    return model(input_ids=ids, use_cache=False).logits[0].float()  # type: ignore[no-any-return]


def _check_probe(base: Base, stock: Tensor) -> None:
    """Packed copies of the probe must give the stock model's logits: positions, masks, scales and caps agree.

    Two plans, because attention may take two ways: sequences side by side, and two that continue a shared beginning.
    """
    ids = _probe_ids(base.config)
    half, end = len(ids) // 2, len(ids)
    beside = [Segment(0, end), Segment(end, 2 * end)]
    shared = [Segment(0, half), *(Segment(k * half, (k + 1) * half, parent=0, position0=half) for k in (1, 2))]
    off = max(_off(base, ids + ids, beside, stock), _off(base, ids + ids[half:], shared, stock[half:]))
    if not off < LIMIT[base.dtype]:
        raise ConfigError(
            f"{base.name}: the packed forward pass differs from the stock model's by {off:.1e} of a logit's spread",
            hint="this architecture variant is not supported; nothing was trained or generated",
        )


@torch.no_grad()
def _off(base: Base, ids: list[int], segments: list[Segment], stock: Tensor) -> float:
    """How far the last sequence's logits are from `stock`."""
    plan = Plan.of(segments)
    positions = torch.cat([torch.arange(s.length) + s.position0 for s in segments]).to(base.device)
    with base.host.run(plan):
        ours = base.head.logits(base.hidden(plan, torch.tensor(ids, device=base.device), positions))
    return apart(ours[-len(stock) :], stock.to(base.dtype))


def pick_device(device: str) -> torch.device:
    """`auto` is the first of cuda, mps, cpu that is there. Raises ConfigError for one that is not."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return torch.device(next(kind for kind, there in present.items() if there))
    if not present.get(device.split(":")[0], False):
        raise ConfigError(
            f"device {device!r} is not available here", hint=f"there is: {', '.join(k for k in present if present[k])}"
        )
    return torch.device(device)


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that has it, float32 elsewhere (exact, and faster for small bases on a CPU)."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    if dtype not in DTYPES:
        raise ConfigError(f"dtype {dtype!r} is unknown", hint=f"choices: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def dtype_name(dtype: torch.dtype) -> str:
    """A precision as recipes and files spell it: `float32`, not `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def context_length(config: Any) -> int:
    """Longest sequence in tokens. With long-RoPE, the length up to which its short factors hold for every row."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":
        original = rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        return int(original)
    return int(config.max_position_embeddings)
