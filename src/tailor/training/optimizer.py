"""AdamW over one flat buffer per slot, and the learning-rate schedules.

Loshchilov & Hutter 2019, arXiv:1711.05101. Parameters in the optimizer's precision become views of the buffer, so one
fused call updates a slot; parameters in a narrower precision (full fine-tuning in bf16) keep a wide copy there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Schedule = Literal["cosine", "linear", "constant"]


class FlatAdamW:
    """AdamW with fp32 states (float64 for float64 parameters) over the concatenation of all parameters.

    It takes the parameters over until `close`; before another one may train them.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], weight_decay: float, betas: tuple[float, float]) -> None:
        self.parameters = dict(parameters)
        first = next(iter(self.parameters.values()))
        wide = torch.promote_types(first.dtype, torch.float32)
        self._flat = nn.Parameter(
            torch.empty(sum(p.numel() for p in parameters.values()), dtype=wide, device=first.device)
        )
        self._flat.grad = torch.zeros_like(self._flat)
        self._narrow: list[tuple[nn.Parameter, Tensor]] = []
        self._hooks: list[RemovableHandle] = []
        offset = 0
        for parameter in self.parameters.values():
            part = slice(offset, offset + parameter.numel())
            value = self._flat.data[part].view_as(parameter)
            grad = self._flat.grad[part].view_as(parameter)
            value.copy_(parameter.detach())
            if parameter.dtype == wide:
                parameter.data, parameter.grad = value, grad
            else:
                self._narrow.append((parameter, value))
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_accumulate_into(grad)))
            offset = part.stop
        self._adamw = torch.optim.AdamW([self._flat], lr=0.0, betas=betas, weight_decay=weight_decay, fused=True)

    def close(self) -> None:
        """Let go of the parameters: their values stay, gradients no longer arrive here."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for parameter in self.parameters.values():
            parameter.grad = None

    def zero_grad(self) -> None:
        """Forget the gradients."""
        assert self._flat.grad is not None
        self._flat.grad.zero_()

    def grad_norm(self) -> float:
        """Euclidean norm of the whole gradient; NaN or infinite when any part is."""
        assert self._flat.grad is not None
        return float(torch.linalg.vector_norm(self._flat.grad))

    def step(self, learning_rate: float, clip: float) -> None:
        """One update with the gradient multiplied by `clip`."""
        assert self._flat.grad is not None
        if clip != 1.0:
            self._flat.grad.mul_(clip)
        self._adamw.param_groups[0]["lr"] = learning_rate
        self._adamw.step()
        with torch.no_grad():
            for parameter, value in self._narrow:
                parameter.copy_(value)

    def state(self) -> dict[str, Tensor]:
        """The buffer and both moments, to resume from; before the first step the moments are absent."""
        moments = self._adamw.state.get(self._flat, {})
        kept = {"parameters": self._flat.detach()} | {k: v for k, v in moments.items() if isinstance(v, Tensor)}
        return {name: tensor.cpu().clone() for name, tensor in kept.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue exactly where `state` was taken."""
        with torch.no_grad():
            self._flat.copy_(state["parameters"])
            for parameter, value in self._narrow:
                parameter.copy_(value)
        # fused AdamW keeps its step count on the parameters' device too
        moments = {k: v.to(self._flat.device, copy=True) for k, v in state.items() if k != "parameters"}
        if moments:
            self._adamw.state[self._flat] = moments


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
