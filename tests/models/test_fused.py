"""Fused norms, gates and rotary embeddings: numbers and gradients of what they replace, and nothing else replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tailor.models.fused import fuse, rms_norm, rotary, silu_gate
from tiny_models import ARCHITECTURES, tiny_model


def fused_kinds(model: nn.Module) -> set[str]:
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """The result and the gradient of a weighted sum of it with respect to every input."""
    ours = [tensor.detach().clone().requires_grad_() for tensor in inputs]
    out = function(*ours)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), ours)]


def draw(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(1, 7, 6), (5, 6), (1, 300, 1000)])
def test_rms_norm_follows_its_formula(shape: tuple[int, ...], offset: float) -> None:
    def formula(x: Tensor, weight: Tensor) -> Tensor:
        return (offset + weight) * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()

    x, weight = draw(*shape), draw(shape[-1])
    for ours, theirs in zip(
        gradients(lambda a, b: rms_norm(a, b, 1e-5, offset), x, weight), gradients(formula, x, weight), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


def test_gradients_that_nobody_wants_are_not_computed() -> None:
    x, weight = draw(4, 6), draw(6).requires_grad_()
    (grad,) = torch.autograd.grad(rms_norm(x, weight, 1e-5).sum(), [weight])
    torch.testing.assert_close(grad, (x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()).sum(0))


def test_silu_gate_follows_its_formula() -> None:
    gate, up = draw(1, 9, 5), draw(1, 9, 5) + 1
    for ours, theirs in zip(
        gradients(silu_gate, gate, up), gradients(lambda g, u: F.silu(g) * u, gate, up), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("turned", [8, 4])
def test_rotary_is_a_rotation_by_the_angle(turned: int) -> None:
    """Pairs (x_i, x_i+h) as complex numbers, times e^(i·angle)."""
    half = turned // 2
    angles = draw(3, half)
    q, k = draw(1, 2, 3, 8), draw(1, 1, 3, 8) + 1

    def formula(x: Tensor) -> Tensor:
        pairs = torch.complex(x[..., :half], x[..., half:turned]) * torch.polar(torch.ones_like(angles), angles)
        return torch.cat([pairs.real, pairs.imag, x[..., turned:]], dim=-1)

    twice = angles.repeat(1, 2)[None]
    for which, x in enumerate((q, k)):
        ours = gradients(lambda t, w=which: rotary(*((t, k) if w == 0 else (q, t)), twice.cos(), twice.sin())[w], x)
        for mine, theirs in zip(ours, gradients(formula, x), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_a_fused_model_has_the_logits_and_gradients_of_the_stock_one(model_type: str) -> None:
    stock = tiny_model(model_type)
    model = copy.deepcopy(stock)
    fuse(model)
    ids = torch.tensor([[5, 9, 2, 77, 31, 8]])
    results = []
    for one in (stock, model):
        logits = one(input_ids=ids, use_cache=False).logits
        logits.square().sum().backward()
        results.append((logits.detach(), {n: p.grad for n, p in one.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=0)
    assert results[1][1].keys() == results[0][1].keys()
    for name, grad in results[0][1].items():
        torch.testing.assert_close(results[1][1][name], grad, atol=1e-5 * max(1.0, float(grad.abs().max())), rtol=0)


FUSED = {
    "llama": {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"},
    "qwen3": {"Qwen3RMSNorm", "Qwen3MLP", "Qwen3Attention"},
    "gemma2": {"Gemma2RMSNorm", "Gemma2Attention"},  # its gate is a GELU
    "gpt_neox": {"GPTNeoXAttention"},
    "glm4": {"Glm4RMSNorm"},  # it turns neighbours, not halves
    "gpt2": set(),
}


@pytest.mark.parametrize("model_type", FUSED)
def test_what_is_fused(model_type: str) -> None:
    model = tiny_model(model_type)
    fuse(model)
    assert fused_kinds(model) == FUSED[model_type]
    assert fused_kinds(tiny_model(model_type)) == set(), "other models of the class are as they were"


def test_a_module_that_computes_something_else_keeps_its_forward() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(4)), 1e-5

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.eps)

    class OddMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(F.silu(self.up_proj(x)) * self.gate_proj(x))

    model = nn.Sequential(OddRMSNorm(), OddMLP())
    fuse(model)
    assert fused_kinds(model) == set()


def test_a_copy_of_a_fused_model_uses_its_own_weights() -> None:
    model = tiny_model("llama")
    fuse(model)
    twin = copy.deepcopy(model)
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    ids = torch.tensor([[5, 9, 2]])
    assert not twin(input_ids=ids).logits.eq(0).all()
