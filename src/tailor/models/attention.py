"""One attention function for packed training and cached generation.

Shapes: B = 1 always; H query heads, G key/value heads, T packed tokens, S keys of one sequence, D head size.

transformers calls `attend` through its attention interface with q, k, v of the whole packed row. It cuts them at the
segment boundaries of the running plan and attends inside each sequence: [prefix | cache or parents | own keys].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tailor.models.block_attention import Scores, block_attention
from tailor.models.decode import Options, decode

if TYPE_CHECKING:
    from tailor.models.host import SlotHost
    from tailor.models.plan import Plan

ATTENTION = "tailor"


def attend(  # noqa: PLR0913  (the signature is transformers')
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attention over packed sequences: q (1, H, T, D), k and v (1, G, T, D) → (1, T, H, D).

    `module.slot_host` (set at load) knows the running plan. `attention_mask` is always None (see `no_mask`): segment
    boundaries take its place. `dropout` is 0: the base always runs in evaluation mode.
    """
    plan: Plan = module.slot_host.running()  # type: ignore[union-attr, operator]
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    options = Options(scaling, sliding_window, softcap)
    prefixes = _prefixes(module.slot_host, plan, layer, key)  # type: ignore[arg-type]
    if plan.in_blocks(query):
        scores = Scores(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap)
        sizes = [(slot, keys.shape[2]) for slot, (keys, _) in prefixes.items()]
        blocks = plan.blocks(query.shape[1] // key.shape[1], sliding_window, query.dtype, sizes)
        for own in prefixes.values():
            key, value = torch.cat([key, own[0]], dim=2), torch.cat([value, own[1]], dim=2)
        return block_attention(query[0], key[0], value[0], blocks, scores)[None], None
    decoding = plan.decoding(query.device) if plan.generates else None
    if decoding is None or not decoding.groups:
        return _one_by_one(plan, range(len(plan.segments)), layer, (query, key, value), prefixes, options), None
    plan.options[layer] = options
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    parts = [decode(group, layer, q, k, v, options) for group in decoding.groups]
    if not decoding.left:
        return decoding.answered(parts)[None], None
    found = parts[0] if len(parts) == 1 else torch.cat(parts)
    rest = _one_by_one(plan, decoding.left, layer, (query, key, value), prefixes, options)
    output = found.new_empty(query.shape[2], *found.shape[1:])
    output[torch.cat([group.tokens for group in decoding.groups])] = found
    done = 0
    for number in decoding.left:
        segment = plan.segments[number]
        output[segment.start : segment.end] = rest[0, done : done + segment.length]
        done += segment.length
    return output[None], None


def _one_by_one(
    plan: Plan,
    numbers: Sequence[int],
    layer: int,
    packed: tuple[Tensor, Tensor, Tensor],
    prefixes: Mapping[int, tuple[Tensor, Tensor]],
    options: Options,
) -> Tensor:
    """(1, t, H, D): the attention of some of the plan's segments, each in a call of its own."""
    if len(numbers) == len(plan.segments):
        lengths = [segment.length for segment in plan.segments]
        # split, not slices: its backward is one concatenation, a slice's is a full-size zero tensor per segment
        queries, keys, values = (list(t.split(lengths, dim=2)) for t in packed)
    else:
        where = [slice(segment.start, segment.end) for segment in plan.segments]
        queries, keys, values = ([t[:, :, place] for place in where] for t in packed)
    outputs = []
    for row in numbers:
        segment = plan.segments[row]
        prefix = prefixes.get(segment.slot)
        if (cache := plan.caches[row]) is not None:
            if prefix is not None:
                cache.begin(layer, *prefix)
            keys[row], values[row] = cache.append(layer, keys[row], values[row])
        elif segment.parent < 0 and prefix is not None:
            keys[row] = torch.cat([prefix[0], keys[row]], dim=2)
            values[row] = torch.cat([prefix[1], values[row]], dim=2)
        elif segment.parent >= 0:
            # parents stand before their children, so the parent's keys already include its own parents'
            keys[row] = torch.cat([keys[segment.parent], keys[row]], dim=2)
            values[row] = torch.cat([values[segment.parent], values[row]], dim=2)
        outputs.append(attention(queries[row], keys[row], values[row], *options))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _prefixes(host: SlotHost, plan: Plan, layer: int, like: Tensor) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values (1, G, P, D) of this layer by slot, of the slots with a prefix that begin sequences here."""
    found = {}
    for slot in plan.beginning:
        if (prefix := host.prefix_of(slot)) is not None:
            key, value = prefix.layers()[layer].to(like.dtype)[:, None]
            found[slot] = (key, value)
    return found


def attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None, softcap: float | None
) -> Tensor:
    """Causal attention of the last t tokens of one sequence over all its S tokens: (1, H, t, D) → (1, H, t, D).

    `window` lets a token see itself and the `window` - 1 before it; `softcap` c maps scores x to c·tanh(x/c)
    (Gemma 2, arXiv:2408.00118 section 2).
    """
    t, s = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    windowed = window is not None and s > window
    if softcap is None and not windowed and (t == s or t == 1):
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=t == s and t > 1, scale=scaling, enable_gqa=grouped
        )
    mask = visible(t, s, window if windowed else None, query.device)
    if softcap is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scaling, enable_gqa=grouped)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(
        dim=-1, dtype=torch.promote_types(scores.dtype, torch.float32)
    )
    return weights.to(query.dtype) @ value


def visible(t: int, s: int, window: int | None, device: torch.device) -> Tensor:
    """(t, s) booleans: what each of the last t of s tokens may look at."""
    own = torch.arange(s - t, s, device=device)[:, None]
    other = torch.arange(s, device=device)[None, :]
    mask = other <= own
    return mask if window is None else mask & (other > own - window)


def no_mask(*args: Any, **kwargs: Any) -> None:
    """The mask function that goes with `attend`: there is no mask, segments say who sees whom."""
    return None


def register() -> None:
    """Make `attend` known to transformers under the name `tailor` (idempotent)."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, no_mask)
