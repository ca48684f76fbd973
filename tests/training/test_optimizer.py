"""FlatAdamW against torch's AdamW, and the schedules by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from tailor.training.optimizer import FlatAdamW, learning_rate_at

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPES = {"a": (3, 4), "b": (5,), "c": ()}


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return {n: nn.Parameter(torch.randn(s, generator=generator).to(dtype)) for n, s in SHAPES.items()}


def loss(given: dict[str, nn.Parameter], step: int) -> Tensor:
    """Something whose gradient changes with the step and reaches every parameter."""
    return torch.stack([((p.to(torch.float64) - step) ** 2).sum() + p.sum().sin() for p in given.values()]).sum()


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.8)])
def test_equals_torch_adamw_per_parameter(weight_decay: float, betas: tuple[float, float]) -> None:
    ours, theirs = parameters(), parameters()
    flat = FlatAdamW(ours, weight_decay, betas)
    adamw = torch.optim.AdamW(theirs.values(), lr=1.0, betas=betas, weight_decay=weight_decay)
    for step, rate in enumerate([0.1, 0.05, 0.0, 0.2, 0.01]):
        flat.zero_grad()
        loss(ours, step).backward()
        flat.step(rate, 0.5)
        adamw.zero_grad()
        (0.5 * loss(theirs, step)).backward()
        adamw.param_groups[0]["lr"] = rate
        adamw.step()
        for name, parameter in theirs.items():
            torch.testing.assert_close(ours[name].detach(), parameter.detach(), atol=1e-12, rtol=1e-12)


def test_gradients_accumulate_over_micro_batches() -> None:
    ours, theirs = parameters(), parameters()
    flat = FlatAdamW(ours, 0.0, (0.9, 0.999))
    flat.zero_grad()
    for step in (1, 2, 3):
        loss(ours, step).backward()
    sum(loss(theirs, step) for step in (1, 2, 3)).backward()  # type: ignore[union-attr]
    expected = math.sqrt(sum(float((p.grad**2).sum()) for p in theirs.values() if p.grad is not None))
    assert flat.grad_norm() == pytest.approx(expected, rel=1e-12)
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name].grad, parameter.grad, atol=1e-12, rtol=1e-12)
    flat.zero_grad()
    assert flat.grad_norm() == 0.0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_norm_shows_what_is_not_finite(value: float) -> None:
    ours = parameters()
    flat = FlatAdamW(ours, 0.0, (0.9, 0.999))
    assert ours["b"].grad is not None
    ours["b"].grad[2] = value
    assert not math.isfinite(flat.grad_norm())


def test_narrow_parameters_keep_a_wide_copy() -> None:
    """bf16 steps smaller than a bf16 rounding add up; gradients arrive in bf16 and are summed in fp32."""
    ours, wide = parameters(torch.bfloat16), parameters(torch.bfloat16)
    masters = {n: nn.Parameter(p.detach().float()) for n, p in wide.items()}
    flat = FlatAdamW(ours, 0.1, (0.9, 0.999))
    adamw = torch.optim.AdamW(masters.values(), lr=1.0, weight_decay=0.1)
    start = {n: p.detach().clone() for n, p in ours.items()}
    for step in range(40):
        flat.zero_grad()
        for part in (step, step + 1):
            loss(ours, part).backward()
        flat.step(1e-4, 1.0)
        adamw.zero_grad()
        for parameter in masters.values():
            parameter.grad = torch.zeros_like(parameter)
        for part in (step, step + 1):
            for parameter in wide.values():
                parameter.grad = None
            loss(wide, part).backward()
            for name, parameter in wide.items():
                masters[name].grad += parameter.grad.float()  # type: ignore[operator, union-attr]
        adamw.param_groups[0]["lr"] = 1e-4
        adamw.step()
        with torch.no_grad():
            for name, parameter in wide.items():
                parameter.copy_(masters[name])
        assert all(p.grad is None for p in ours.values()), "no bf16 gradient is kept"
    for name, parameter in ours.items():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, wide[name])
    assert any(not torch.equal(p, start[n]) for n, p in ours.items())
    assert flat.state()["0/parameters"].dtype == torch.float32


def test_narrow_and_wide_side_by_side() -> None:
    mixed = {"narrow": nn.Parameter(torch.ones(3, dtype=torch.bfloat16)), "wide": nn.Parameter(torch.ones(2))}
    flat = FlatAdamW(mixed, 0.0, (0.9, 0.999))
    flat.zero_grad()
    (mixed["narrow"].float().sum() * 2 + mixed["wide"].sum() * 3).backward()
    assert flat.grad_norm() == pytest.approx(math.sqrt(3 * 4 + 2 * 9))
    flat.step(0.1, 1.0)
    torch.testing.assert_close(mixed["narrow"].float(), torch.full((3,), 0.9), atol=4e-3, rtol=0)
    torch.testing.assert_close(mixed["wide"].detach(), torch.full((2,), 0.9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_state_and_load_continue_bit_for_bit(dtype: torch.dtype) -> None:
    def train(flat: FlatAdamW, given: dict[str, nn.Parameter], steps: range) -> None:
        for step in steps:
            flat.zero_grad()
            loss(given, step).backward()
            flat.step(0.1, 1.0)

    straight = parameters(dtype)
    flat = FlatAdamW(straight, 0.1, (0.9, 0.999))
    assert set(flat.state()) == {"0/parameters"}, "no moments before the first step"
    train(flat, straight, range(3))
    saved = flat.state()
    copies = {name: tensor.clone() for name, tensor in saved.items()}
    train(flat, straight, range(3, 6))
    assert all(torch.equal(t, copies[n]) for n, t in saved.items()), "a state is a copy"
    resumed = {n: nn.Parameter(torch.zeros_like(p)) for n, p in straight.items()}
    other = FlatAdamW(resumed, 0.1, (0.9, 0.999))
    other.load(saved)
    train(other, resumed, range(3, 6))
    assert all(torch.equal(p, straight[n]) for n, p in resumed.items())
    assert all(torch.equal(t, other.state()[n]) for n, t in flat.state().items())
    assert all(torch.equal(t, copies[n]) for n, t in saved.items()), "loading takes a copy"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_cuda)])
def test_a_loaded_state_lies_with_the_parameters(device: str) -> None:
    given = {n: nn.Parameter(p.detach().float().to(device)) for n, p in parameters().items()}
    flat, loaded = FlatAdamW(given, 0.1, (0.9, 0.999)), FlatAdamW(given, 0.1, (0.9, 0.999))
    for optimizer in (flat, loaded):
        optimizer.zero_grad()
        loss(given, 1).backward()
        optimizer.step(0.1, 1.0)
        loaded.load(flat.state())
    moments = next(iter(loaded._adamw.state.values()))
    assert {name: tensor.device.type for name, tensor in moments.items()} == dict.fromkeys(
        ("step", "exp_avg", "exp_avg_sq"), device
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_closed_optimizer_leaves_its_parameters_to_the_next(dtype: torch.dtype) -> None:
    given, fresh = parameters(dtype), parameters(dtype)
    FlatAdamW(given, 0.1, (0.9, 0.999)).close()
    assert all(p.grad is None for p in given.values())
    for each in (given, fresh):
        flat = FlatAdamW(each, 0.1, (0.9, 0.999))
        for step in range(3):
            flat.zero_grad()
            loss(each, step).backward()
            flat.step(0.1, 1.0)
    assert all(torch.equal(p, fresh[n]) for n, p in given.items())


def test_two_open_optimizers_on_narrow_parameters_are_told_apart() -> None:
    given = parameters(torch.bfloat16)
    first, second = FlatAdamW(given, 0.1, (0.9, 0.999)), FlatAdamW(given, 0.1, (0.9, 0.999))
    with pytest.raises(RuntimeError, match=r"close\(\) that one first"):
        loss(given, 1).backward()
    first.close()
    second.zero_grad()
    loss(given, 1).backward()
    assert second.grad_norm() > 0


def test_schedules_by_hand() -> None:
    def rates(schedule: str, steps: list[int], warmup: int = 2) -> list[float]:
        return [learning_rate_at(s, 8.0, 10, warmup, schedule) for s in steps]  # type: ignore[arg-type]

    assert rates("constant", [0, 1, 2, 5, 9]) == [4.0, 8.0, 8.0, 8.0, 8.0]
    assert rates("linear", [0, 1, 2, 6, 9]) == [4.0, 8.0, 8.0, 4.0, 1.0]
    expected = [4.0, 8.0, 8.0, 4.0, 4.0 * (1 + math.cos(math.pi * 7 / 8))]
    assert rates("cosine", [0, 1, 2, 6, 9]) == pytest.approx(expected)
    assert rates("cosine", [0, 5], warmup=0) == pytest.approx([8.0, 4.0])
    assert rates("linear", [0, 9], warmup=10) == pytest.approx([0.8, 8.0])
    assert learning_rate_at(0, 8.0, 1, 0, "cosine") == 8.0, "a single step is taken at the peak"
