"""Tensors that a technique computes from its parameters: norms, encoders' outputs, concatenations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from tailor.models.slots import Slot

T = TypeVar("T")


class Derived(Generic[T]):
    """A value that follows from parameters, computed once per pass while gradients are recorded.

    Without gradients it is kept until one of the parameters changes: generation asks for it at every token.
    """

    def __init__(self, slot: Slot, compute: Callable[[], T], parameters: Sequence[nn.Parameter]) -> None:
        self._slot = slot
        self._compute = compute
        self._parameters = parameters
        self._kept: tuple[tuple[int, ...], T] | None = None

    def __call__(self) -> T:
        plan = self._slot.host.plan
        if plan is None:
            return self._compute()
        if torch.is_grad_enabled():
            if self not in plan.derived:
                plan.derived[self] = self._compute()
            return plan.derived[self]  # type: ignore[no-any-return]
        now = (self._slot.revision, *(p._version for p in self._parameters))
        if self._kept is None or self._kept[0] != now:
            self._kept = (now, self._compute())
        return self._kept[1]


class Baked:
    """A tensor that small networks make while they train, and that stands alone afterwards (a prompt table).

    `compute` takes the training parameters by name. Baking replaces them by one parameter, `name`: the slot then holds
    what serving needs and no more, and answers the same. A slot attached for use is baked from the start.
    """

    def __init__(
        self,
        slot: Slot,
        name: str,
        shape: Sequence[int],
        start: Callable[[], Mapping[str, Tensor]],
        compute: Callable[[Mapping[str, Tensor]], Tensor],
        rate: float,
    ) -> None:
        self._slot = slot
        self._owner = slot.attaching
        self.name = name
        self._compute = compute
        self._training: dict[str, nn.Parameter] = {}
        self._rows: Callable[[], Tensor]
        if slot.baked:
            self._stand_alone(torch.zeros(*shape))
            return
        self._training = {key: slot.new_parameter(key, value, rate) for key, value in start().items()}
        self._rows = Derived(slot, lambda: compute(self._training), list(self._training.values()))

    def __call__(self) -> Tensor:
        """The tensor, differentiable in whatever is trained."""
        return self._rows()

    def bake(self) -> None:
        """Replace the training parameters by their result."""
        if not self._training:
            return
        with torch.no_grad():
            value = self._compute(self._training)
        for key in self._training:
            del self._slot.parameters[key]
            self._slot.rates.pop(key, None)
        self._training = {}
        self._slot.attaching = self._owner
        self._stand_alone(value)

    def _stand_alone(self, value: Tensor) -> None:
        parameter = self._slot.new_parameter(self.name, value)
        self._rows = lambda: parameter
