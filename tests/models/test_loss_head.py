"""The loss head against torch's cross-entropy and against autograd of the plain formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tailor.models.loss_head import Head, token_logprobs

N, H, V = 23, 7, 31
EXACT = {"atol": 1e-10, "rtol": 0.0}


def toy(dtype: torch.dtype = torch.float64, n: int = N) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias (all with gradients), targets, and a different weight for every token's loss."""
    hidden, weight, bias = (torch.randn(*s, dtype=dtype).requires_grad_() for s in ((n, H), (V, H), (V,)))
    return hidden, weight, bias, torch.randint(0, V, (n,)), torch.rand(n, dtype=dtype)


def plain(head: Head, hidden: Tensor, targets: Tensor) -> Tensor:
    """The formula written out, for autograd."""
    z = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    z = z * head.scale
    if head.softcap is not None:
        z = head.softcap * torch.tanh(z / head.softcap)
    return -torch.nn.functional.cross_entropy(z, targets, reduction="none")


def gradients(value: Tensor, factors: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((value * factors).sum(), inputs)


@pytest.mark.parametrize("chunk", [1, 4, 5, 23, 1024])
def test_value_and_gradients_equal_cross_entropy(chunk: int) -> None:
    hidden, weight, bias, targets, factors = toy()
    ours = token_logprobs(hidden, Head(weight, bias), targets, chunk)
    theirs = -torch.nn.functional.cross_entropy(hidden @ weight.T + bias, targets, reduction="none")
    torch.testing.assert_close(ours, theirs, **EXACT)
    found, expected = (gradients(v, factors, hidden, weight, bias) for v in (ours, theirs))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, **EXACT)


@pytest.mark.parametrize("chunk", [4, 1024])
@pytest.mark.parametrize("softcap", [None, 0.9, 30.0])
@pytest.mark.parametrize("scale", [1.0, 0.125, 3.0])
@pytest.mark.parametrize("with_bias", [True, False])
def test_scale_and_softcap_equal_autograd_of_the_formula(
    scale: float, softcap: float | None, with_bias: bool, chunk: int
) -> None:
    hidden, weight, bias, targets, factors = toy()
    head = Head(weight, bias if with_bias else None, scale, softcap)
    inputs = (hidden, weight, bias) if with_bias else (hidden, weight)
    ours, theirs = token_logprobs(hidden, head, targets, chunk), plain(head, hidden, targets)
    torch.testing.assert_close(ours, theirs, **EXACT)
    for f, e in zip(gradients(ours, factors, *inputs), gradients(theirs, factors, *inputs), strict=True):
        torch.testing.assert_close(f, e, **EXACT)


def test_logits_and_logprobs_agree() -> None:
    hidden, weight, bias, targets, _ = toy()
    head = Head(weight, bias, 0.5, 2.0)
    expected = head.logits(hidden).log_softmax(1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(token_logprobs(hidden, head, targets), expected, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_no_token_at_all(dtype: torch.dtype) -> None:
    hidden, weight, bias, targets, _ = toy(dtype, n=0)
    value = token_logprobs(hidden, Head(weight, bias), targets)
    assert value.shape == (0,)
    assert value.dtype == torch.promote_types(dtype, torch.float32)
    for gradient, source in zip(
        gradients(value.sum(), torch.ones(()), hidden, weight, bias), (hidden, weight, bias), strict=True
    ):
        assert torch.equal(gradient, torch.zeros_like(source))


def test_only_what_needs_a_gradient_gets_one() -> None:
    hidden, weight, bias, targets, factors = toy()
    frozen = Head(weight.detach(), bias.detach())
    (token_logprobs(hidden, frozen, targets, 4) * factors).sum().backward()
    assert hidden.grad is not None
    assert frozen.weight.grad is None
    trained = Head(weight, bias.detach())
    (token_logprobs(hidden.detach(), trained, targets, 4) * factors).sum().backward()
    expected = gradients(plain(trained, hidden.detach(), targets), factors, weight)[0]
    torch.testing.assert_close(weight.grad, expected, **EXACT)


def test_bf16_accumulates_in_fp32() -> None:
    hidden, weight, bias, targets, factors = toy(torch.bfloat16, n=300)
    value = token_logprobs(hidden, Head(weight, bias), targets, 7)
    assert value.dtype == torch.float32
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight, bias)]
    exact = plain(Head(wide[1], wide[2]), wide[0], targets)
    torch.testing.assert_close(value, exact, atol=0.05, rtol=0.02)
    found = gradients(value, factors.float(), hidden, weight, bias)
    for f, e in zip(found, gradients(exact, factors.float(), *wide), strict=True):
        assert f.dtype == torch.bfloat16
        # 43 chunks summed in bf16 would lose whole chunks; summed in fp32 only the products' own rounding is left
        assert float((f.float() - e).norm() / e.norm()) < 0.02


def test_a_nan_row_stays_in_its_row() -> None:
    hidden, weight, _, targets, _ = toy()
    clean = token_logprobs(hidden, Head(weight.detach()), targets)
    clean_grad = gradients(clean, torch.ones(N, dtype=torch.float64), hidden)[0]
    broken = hidden.detach().clone()
    broken[3] = float("nan")
    broken.requires_grad_()
    value = token_logprobs(broken, Head(weight.detach()), targets)
    others = torch.arange(N) != 3
    assert torch.isnan(value[3])
    assert torch.equal(value[others], clean[others])
    assert torch.equal(gradients(value, torch.ones(N, dtype=torch.float64), broken)[0][others], clean_grad[others])
