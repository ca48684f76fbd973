"""What slots do around the attention and MLP blocks of a decoder layer: adapters see a block's input and output.

Hooks, not wrappers: the modules inside a block keep their names, and the model's own code never hears of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from tailor.models.bank import KEPT_BANKS, Rows
from tailor.models.dropout import keep_mask

if TYPE_CHECKING:
    from tailor.models.host import SlotHost
    from tailor.models.plan import Plan, Span

Change = Callable[[Tensor, Tensor], Tensor]
"""(t, H) input rows and (t, H) output rows of a block to what is added to the output rows, (t, H)."""


Together = Callable[[Tensor, Tensor, Rows], object]
"""As `Change`, for rows of several slots, but the output rows are changed in place; rows of nobody stay."""


@dataclass(frozen=True, eq=False)
class BlockDelta:
    """One technique's addition to a block's output; `dropout` is on what is added.

    `parameters` are those `change` uses, for counts of operations. Deltas of one `kind` can be stacked where nothing is
    learned: `together(their parts)` makes one change of them all. `part(dtype)` is this one's.
    """

    change: Change
    parameters: tuple[Tensor, ...] = ()
    dropout: float = 0.0
    kind: Hashable = None
    part: Callable[[torch.dtype], Any] = lambda dtype: None
    together: Callable[[Sequence[Any]], Together] | None = None

    def num_operations(self) -> int:
        """Multiplications per token."""
        return sum(p.numel() for p in self.parameters)


class SlotBlock:
    """Stands on a block: `entry` is the module whose input is the block's, `exit` the one whose output is.

    `linears` names those of the two that are wrapped linear layers: the wrappers stay as long as this does.
    """

    def __init__(
        self, name: str, entry: nn.Module, exit: nn.Module, host: SlotHost, linears: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.linears = tuple(linears)
        self.deltas: dict[int, list[BlockDelta]] = {}
        self.slot_host = host
        self._stacks: OrderedDict[tuple[Any, ...], Together] = OrderedDict()
        self._input: Tensor | None = None
        self._hooks = [
            entry.register_forward_pre_hook(self._enter, with_kwargs=True),
            exit.register_forward_hook(self._leave),
        ]

    def remove(self) -> None:
        """Take the hooks off again."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._input = args[0] if args else kwargs["hidden_states"]

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Attention returns a tuple, an MLP a tensor, experts either; only the hidden states change."""
        hidden = output[0] if isinstance(output, tuple) else output
        assert self._input is not None
        changed = self.changed(self._input.reshape(-1, self._input.shape[-1]), hidden.reshape(-1, hidden.shape[-1]))
        self._input = None
        if changed is None:
            return output
        changed = changed.view(hidden.shape)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    def changed(self, inputs: Tensor, outputs: Tensor) -> Tensor | None:
        """(T, H) outputs with each span's additions, None when no slot of this pass has any."""
        plan = self.slot_host.running()
        if not any(span.slot in self.deltas for span in plan.spans):
            return None
        if not torch.is_grad_enabled():
            return self.add(inputs, outputs.clone())
        lengths = [span.end - span.start for span in plan.spans]
        ins, outs = inputs.split(lengths), list(outputs.split(lengths))
        for k, span in enumerate(plan.spans):
            rows = outs[k]
            for number, delta in enumerate(self.deltas.get(span.slot, ())):
                added = delta.change(ins[k], rows)
                outs[k] = outs[k] + self._noisy(added, plan, span, number, delta.dropout)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def add(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """(T, H) outputs with each span's additions, in place and without a record for backward.

        Spans of few tokens are changed together where they can be.
        """
        plan = self.slot_host.running()
        touched = [span for span in plan.spans if span.slot in self.deltas]
        for rows, slots in plan.rows_of(touched, outputs.device):
            stack = self._stack(plan, slots, outputs.dtype) if len(slots) > 1 and not plan.training else None
            if stack is not None:
                stack(rows.of(inputs), rows.of(outputs), rows)
                continue
            for span in [span for span in touched if span.slot in slots]:
                deltas, own = self.deltas[span.slot], outputs[span.start : span.end]
                before = own.clone() if len(deltas) > 1 else own  # all of them see what the block gave
                for number, delta in enumerate(deltas):
                    added = delta.change(inputs[span.start : span.end], before)
                    own += self._noisy(added, plan, span, number, delta.dropout)
        return outputs

    def _stack(self, plan: Plan, slots: tuple[int, ...], dtype: torch.dtype) -> Together | None:
        """The slots' changes in one, as their parameters are now; None when they are not of one kind, or not finite.

        What one of them has that is no number would reach the others' rows through the products.
        """
        every = [self.deltas[number] for number in slots]
        first = every[0][0]
        if first.together is None or any(len(own) != 1 or own[0].kind != first.kind for own in every):
            return None
        key = (dtype, *((number, plan.state_of(self.slot_host.slots[number])) for number in slots))
        if key not in self._stacks:
            if not all(bool(p.isfinite().all()) for own in every for p in own[0].parameters):
                return None
            self._stacks[key] = first.together([own[0].part(dtype) for own in every])
            if len(self._stacks) > KEPT_BANKS:
                self._stacks.popitem(last=False)
        return self._stacks[key]

    def _noisy(self, rows: Tensor, plan: Plan, span: Span, number: int, dropout: float) -> Tensor:
        if not dropout or not plan.training:
            return rows
        return rows * keep_mask(self.slot_host, plan, span, f"{self.name}/{number}", dropout, rows)
