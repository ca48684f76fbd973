"""AdamW over one flat buffer per slot and rate, and the learning-rate schedules.

Loshchilov & Hutter 2019, arXiv:1711.05101. Parameters in the optimizer's precision become views of the buffer, so one
fused call updates a slot; parameters in a narrower precision (full fine-tuning in bf16) keep a wide copy there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Schedule = Literal["cosine", "linear", "constant"]


@dataclass
class _Group:
    """Parameters of one multiple of the learning rate, side by side in one buffer."""

    rate: float
    flat: nn.Parameter

    @property
    def grad(self) -> Tensor:
        assert self.flat.grad is not None
        return self.flat.grad


class FlatAdamW:
    """AdamW with fp32 states (float64 for float64 parameters) over the concatenation of all parameters.

    `rates` are multiples of the learning rate, by parameter; those of one rate share a buffer. `changed` is called
    after every change, which torch does not see in the parameters themselves. It takes the parameters over until
    `close`; before another one may train them.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        weight_decay: float,
        betas: tuple[float, float],
        rates: Mapping[str, float] = MappingProxyType({}),
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.parameters = dict(parameters)
        self._changed = changed
        self._narrow: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[RemovableHandle] = []
        by_rate: dict[float, list[nn.Parameter]] = {}
        for name, parameter in self.parameters.items():
            by_rate.setdefault(rates.get(name, 1.0), []).append(parameter)
        self._groups = [_Group(rate, self._gather(group)) for rate, group in sorted(by_rate.items())]
        self._adamw = torch.optim.AdamW(
            [{"params": [group.flat]} for group in self._groups],
            lr=0.0,
            betas=betas,
            weight_decay=weight_decay,
            fused=True,
        )

    def _gather(self, parameters: Sequence[nn.Parameter]) -> nn.Parameter:
        """One buffer for the parameters, and another for their gradients."""
        first = parameters[0]
        wide = torch.promote_types(first.dtype, torch.float32)
        flat = nn.Parameter(torch.empty(sum(p.numel() for p in parameters), dtype=wide, device=first.device))
        flat.grad = torch.zeros_like(flat)
        offset = 0
        for parameter in parameters:
            part = slice(offset, offset + parameter.numel())
            value = flat.data[part].view_as(parameter)
            grad = flat.grad[part].view_as(parameter)
            value.copy_(parameter.detach())
            if parameter.dtype == wide:
                parameter.data, parameter.grad = value, grad
            else:
                self._narrow.append((parameter, value))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_accumulate_into(grad)))
            offset = part.stop
        return flat

    def close(self) -> None:
        """Let go of the parameters: their values stay, gradients no longer arrive here."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for group in self._groups:
            group.grad.zero_()

    def grad_norm(self) -> float:
        """Euclidean norm of the whole gradient; NaN or infinite when any part is."""
        return grad_norms([self])[0]

    def norms(self) -> list[Tensor]:
        """Euclidean norms of the parts of the gradient, one per rate."""
        return [torch.linalg.vector_norm(group.grad) for group in self._groups]

    def step(self, learning_rate: float, clip: float) -> None:
        """One update with the gradient multiplied by `clip`."""
        for group, settings in zip(self._groups, self._adamw.param_groups, strict=True):
            if clip != 1.0:
                group.grad.mul_(clip)
            settings["lr"] = learning_rate * group.rate
        self._adamw.step()
        self._spread()

    def _spread(self) -> None:
        with torch.no_grad():
            for parameter, value in self._narrow:
                parameter.copy_(value)
        self._changed()

    def state(self) -> dict[str, Tensor]:
        """Buffers and both moments, to resume from; before the first step the moments are absent."""
        kept: dict[str, Tensor] = {}
        for number, group in enumerate(self._groups):
            moments = self._adamw.state.get(group.flat, {})
            kept[f"{number}/parameters"] = group.flat.detach()
            kept |= {f"{number}/{k}": v for k, v in moments.items() if isinstance(v, Tensor)}
        return {name: tensor.cpu().clone() for name, tensor in kept.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state` was taken."""
        for number, group in enumerate(self._groups):
            own = {k.partition("/")[2]: v for k, v in state.items() if k.startswith(f"{number}/")}
            with torch.no_grad():
                group.flat.copy_(own.pop("parameters"))
            if own:  # fused AdamW keeps its step count on the parameters' device too
                self._adamw.state[group.flat] = {k: v.to(group.flat.device, copy=True) for k, v in own.items()}
        self._spread()


def grad_norms(optimizers: Sequence[FlatAdamW]) -> list[float]:
    """`grad_norm` of each, all in one wait for the device."""
    parts = [optimizer.norms() for optimizer in optimizers]
    values = iter(torch.stack([norm for norms in parts for norm in norms]).tolist() if parts else ())
    return [math.hypot(*(next(values) for _ in norms)) for norms in parts]


def _accumulate_into(grad: Tensor):  # type: ignore[no-untyped-def]
    def hook(parameter: nn.Parameter) -> None:
        if parameter.grad is None:
            raise RuntimeError("another FlatAdamW took this parameter's gradient: close() that one first")
        grad.add_(parameter.grad)
        parameter.grad = None

    return hook


def learning_rate_at(step: int, peak: float, num_steps: int, warmup_steps: int, schedule: Schedule) -> float:
    """Learning rate of 0-based `step`: linear warm-up to `peak`, then constant, linear to 0, or half a cosine to 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return peak * (1 - progress if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))
