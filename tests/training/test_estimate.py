"""Bytes, operations and seconds: against sums by hand, and against what the optimizer really allocates."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from tailor.training.estimate import (
    COLD,
    CUDA_CONTEXT,
    HEAP_LIMIT,
    HEAP_REUSED,
    HEAP_SLACK,
    PROCESS,
    ROW_BYTES_PER_TOKEN,
    Moment,
    Needs,
    Pass,
    Speed,
    Trained,
    Work,
    highest,
    host_bytes,
    moments,
    slot_bytes,
)
from tailor.training.optimizer import FlatAdamW

MIB = 2**20
ONE = Pass(
    tokens=100,
    targets=40,
    activations=30 * MIB,
    logits=2 * MIB,
    peak=36 * MIB,
    heap=36 * MIB,
    forward_flops=1000,
    flops=2500,
)
NEEDS = Needs(
    weights=80 * MIB, converted=0, trained=Trained(MIB), heaviest=ONE, row_tokens=5000, verifies=True, on_gpu=False
)


def by_name(moment: Moment) -> dict[str, int]:
    return {component.name: component.bytes for component in moment.components}


@pytest.mark.parametrize(
    ("dtype", "owns_base"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True)],
    ids=["adapter", "full", "full in bfloat16"],
)
def test_what_is_trained_takes_what_the_optimizer_allocates(dtype: torch.dtype, owns_base: bool) -> None:
    parameters = {"a": nn.Parameter(torch.ones(30, 20, dtype=dtype)), "b": nn.Parameter(torch.ones(17, dtype=dtype))}
    optimizer = FlatAdamW(parameters, 0.0, (0.9, 0.999))
    optimizer.step(0.1, 1.0)
    trained = Trained(617, dtype.itemsize, owns_base)
    state = {name: tensor for name, tensor in optimizer.state().items() if tensor.numel() > 1}
    assert trained.checkpoint == sum(tensor.nbytes for tensor in state.values())
    assert trained.moments == sum(tensor.nbytes for name, tensor in state.items() if name != "0/parameters")
    assert trained.gradients == state["0/parameters"].nbytes
    assert trained.best == sum(parameter.nbytes for parameter in parameters.values())
    storages = {p.untyped_storage()._cdata: p.untyped_storage().nbytes() for p in parameters.values()}
    base = sum(p.nbytes for p in parameters.values()) if owns_base else 0  # counted with the weights
    flat = 0 if dtype == torch.float32 else state["0/parameters"].nbytes  # in fp32 the parameters are views of it
    assert trained.parameters == sum(storages.values()) + flat - base


def test_a_slot_takes_24_bytes_per_parameter() -> None:
    assert slot_bytes(0) == 0
    assert slot_bytes(1000) == 24_000


def test_training_holds_every_part_once() -> None:
    loading, training, *_ = moments(NEEDS)
    assert by_name(loading) == {"process": PROCESS, "weights": 80 * MIB}
    assert by_name(training) == {
        "process": PROCESS,
        "weights": 80 * MIB,
        "trained parameters": 4 * MIB,
        "gradients": 4 * MIB,
        "optimizer": 8 * MIB,
        "best state": 4 * MIB,
        "rows": 5000 * ROW_BYTES_PER_TOKEN,
        "activations": 30 * MIB,
        "logits": 2 * MIB,
        "backward": 4 * MIB,
        "heap": round((HEAP_SLACK - 1) * 36 * MIB),
    }
    assert training.bytes == sum(by_name(training).values())


def test_a_small_checkpoint_is_made_in_the_freed_heap_and_a_large_one_is_not() -> None:
    *_, checkpoint, verification = moments(NEEDS)
    freed = round(HEAP_SLACK * 36 * MIB)
    assert by_name(checkpoint)["freed heap"] == freed
    assert "checkpoint" not in by_name(checkpoint)
    assert by_name(verification)["twin"] == round(2 * 80 * MIB - HEAP_REUSED * freed)
    large = moments(replace(NEEDS, weights=20 * MIB, trained=Trained(HEAP_LIMIT // 4)))
    assert by_name(large[2])["checkpoint"] == 3 * HEAP_LIMIT
    assert highest(large) is large[2]


def test_full_fine_tuning_needs_no_second_copy_of_the_weights() -> None:
    fp32 = by_name(moments(replace(NEEDS, trained=Trained(20 * MIB, 4, owns_base=True)))[1])
    assert "trained parameters" not in fp32
    assert (fp32["gradients"], fp32["optimizer"], fp32["best state"]) == (80 * MIB, 160 * MIB, 80 * MIB)
    bf16 = by_name(moments(replace(NEEDS, trained=Trained(20 * MIB, 2, owns_base=True)))[1])
    assert (bf16["trained parameters"], bf16["best state"]) == (80 * MIB, 40 * MIB)


def test_a_gpu_holds_neither_rows_nor_best_states() -> None:
    found = moments(replace(NEEDS, on_gpu=True, converted=40 * MIB))
    assert [moment.name for moment in found] == ["loading", "training", "verification"]
    training = by_name(found[1])
    assert training["process"] == CUDA_CONTEXT
    assert not {"rows", "best state", "heap"} & set(training)
    assert host_bytes(NEEDS) == PROCESS + 80 * MIB  # weights pass through main memory
    many = replace(NEEDS, trained=Trained(100 * MIB))
    assert host_bytes(many) == PROCESS + 5000 * ROW_BYTES_PER_TOKEN + (2 * 400 + 1200) * MIB


def test_a_prompt_is_loaded_and_verified_only() -> None:
    found = moments(replace(NEEDS, trained=Trained(0), heaviest=None, converted=40 * MIB))
    assert [moment.name for moment in found] == ["loading", "verification"]
    assert by_name(found[0])["files"] == 40 * MIB
    assert by_name(found[1])["twin"] == 200 * MIB
    assert [m.name for m in moments(replace(NEEDS, heaviest=None, verifies=False))] == ["loading"]


def test_seconds_and_operations_by_hand() -> None:
    work = Work(
        num_steps=10,
        row_tokens=170.0,
        passes=2.0,
        tokens=150.0,
        targets=60.0,
        num_validations=3,
        validation_passes=4,
        validation_tokens=400,
        validation_targets=100,
    )
    assert work.num_tokens == 1700
    assert work.flops(ONE) == 1500 * 25 + 1200 * 10
    speed = Speed(layers=0.01, layers_forward=0.004, head=0.02, head_forward=0.01, per_pass=0.5, per_step=0.25)
    step = 0.25 + 2 * 0.5 + 150 * 0.01 * COLD + 60 * 0.02
    validation = 4 * 0.5 + 400 * 0.004 * COLD + 100 * 0.01
    assert speed.seconds(work) == pytest.approx(10 * step + 3 * validation)
