"""What an instruction costs that all rows begin with: stored once per micro-batch, as by default, or with every row.

Rows of lognormal length (median 40 tokens, the last fifth counts) are trained on alone, behind 300 common tokens that
are shared, and behind the same tokens with sharing switched off. Every case has a process of its own, is warmed up, and
takes turns with the others on the same rows. Row tokens are the rows' own, without the instruction; stored tokens are
what passes through the model, virtual ones included. Before that, a tiny float64 model must come to the same losses and
gradients with and without sharing, at the start and after one update: the exit status is 1 when they differ by more
than 1e-9.

    python benchmarks/shared_prefixes.py [--workloads a b] [--techniques lora prompt_tuning] [--repeats 5] [--steps 1]
        [--instruction 300] [--virtual-tokens 20] [--threads N] [--output FILE]

Workload (b), the default, is a 20M Llama shape in fp32; (a) is a 135M one in bf16. Two quiet cores take about a minute
for (b).
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from train_worker import (
    TINY,
    WARMUP,
    WORKLOADS,
    Job,
    Workload,
    make_trainer,
    memory,
    num_cores,
    num_tokens,
    read_steps,
    write_rows,
)

if TYPE_CHECKING:
    from torch import Tensor

    from tailor.data.packing import Batch, Placed

# torch is imported inside functions: every case is a process of its own, and the one that starts them stays small

CASES = {"alone": "none", "shared": "shared", "unshared": "not shared"}
"""The three cases, and what they say of the instruction. The first is the lower bound."""

MEDIAN = 40
CHECKED_STEPS = 3
EXACT = 1e-9
"""How far a float64 loss or gradient with sharing may be from the one without."""


class Packer:
    """`pack` as the trainer calls it, with sharing on or off; it counts tokens and micro-batches."""

    def __init__(self, share: bool) -> None:
        self.share = share
        self.num_stored = 0
        self.num_batches = 0

    def __call__(self, placed: Sequence[Placed], tokens_per_batch: int, **options: Any) -> list[Batch]:
        """The micro-batches of a step."""
        from tailor.data.packing import pack

        batches = pack(placed, tokens_per_batch, **{**options, "share_prefixes": self.share})
        self.num_stored += sum(batch.num_tokens for batch in batches)
        self.num_batches += len(batches)
        return batches

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Let the trainer pack with it."""
        with patch("tailor.training.trainer.pack", self):
            yield


# ------------------------------------------------------------------------------------------------ rows


def write_files(workload: Workload, num_steps: int, instruction: int, folder: Path) -> tuple[Path, Path]:
    """The rows alone, and the same rows behind an instruction of so many random tokens, none of which counts."""
    assert workload.shape is not None
    alone, behind = folder / f"{workload.name}-alone.jsonl", folder / f"{workload.name}-behind.jsonl"
    write_rows(workload, num_steps, alone)
    draw = random.Random(1)
    common = [draw.randrange(3, workload.shape["vocab_size"]) for _ in range(instruction)]
    with alone.open(encoding="utf-8") as lines, behind.open("w", encoding="utf-8") as file:
        for row in map(json.loads, lines):
            longer = {"token_ids": common + row["token_ids"], "loss_mask": [0] * instruction + row["loss_mask"]}
            file.write(json.dumps(longer) + "\n")
    return alone, behind


# ------------------------------------------------------------------------------------------------ exactness


def differences(technique: str, instruction: int, num_virtual_tokens: int) -> dict[str, float]:
    """Largest absolute differences that sharing makes in float64: of a loss, and of a gradient.

    Two steps on the same rows: at the first, half of LoRA's gradients are 0.
    """
    workload = replace(TINY["b"], dtype="float64", median=MEDIAN)
    with tempfile.TemporaryDirectory() as name:
        _, rows = write_files(workload, 1, instruction, Path(name))
        job = Job(workload, technique, str(rows), 0, num_virtual_tokens, f"{name}/start", num_checked=2)
        losses, gradients, stored = zip(*(losses_and_gradients(job, share) for share in (True, False)), strict=True)
    assert stored[0] < stored[1], "nothing was shared"
    pairs = zip(*gradients, strict=True)
    return {
        "loss": max(abs(one - other) for one, other in zip(*losses, strict=True)),
        "gradient": max(float((one - other).abs().max()) for one, other in pairs),
    }


def losses_and_gradients(job: Job, share: bool) -> tuple[list[float], list[Tensor], int]:
    """The loss of every step, its gradient as one vector, and the tokens stored."""
    import torch

    packer = Packer(share)
    losses, gradients = [], []
    with packer.at_work():
        trainer = make_trainer(job)
        run = trainer.runs[0]
        run.settings = run.settings.model_copy(update={"max_grad_norm": None})
        for _ in range(job.num_steps):
            losses.append(trainer.step()[0].loss)
            own = [p.grad.flatten() for p in run.slot.parameters.values() if p.grad is not None]
            gradients.append(torch.cat(own))
    return losses, gradients, packer.num_stored


# ------------------------------------------------------------------------------------------------ one process


def work(job: Job, channel: Connection) -> None:
    """Warm up, then one repetition every time the parent asks for one."""
    packer = Packer(share=job.configuration != "unshared")
    with packer.at_work():
        trainer = make_trainer(job)
        loaded = memory()["resident"]
        warm = [trainer.step()[0].loss for _ in range(WARMUP)]
        channel.send({"loaded": loaded, "losses": warm})
        while channel.recv():
            packer.num_stored = packer.num_batches = 0
            started = time.perf_counter()
            losses = [trainer.step()[0].loss for _ in range(job.workload.steps)]
            seconds = time.perf_counter() - started
            counted = {"stored": packer.num_stored, "batches": packer.num_batches}
            channel.send({"seconds": seconds, "losses": losses, "peak": memory()["peak"], **counted})


@contextmanager
def worker(job: Job) -> Iterator[Connection]:
    """A process that works on one case, and the line to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(job, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        with suppress(OSError):
            ours.send(False)
        process.join()


# ------------------------------------------------------------------------------------------------ taking turns


@dataclass
class Measured:
    """One case: per repetition the seconds of a step, its rows' own tokens, its stored tokens and its micro-batches.

    Memory in MiB, of the whole process: `loaded` before the first step, `peak` the highest.
    """

    workload: str
    technique: str
    case: str
    loaded: float
    losses: list[float]
    peak: float = 0.0
    seconds: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    stored: list[float] = field(default_factory=list)
    batches: list[float] = field(default_factory=list)

    def add(self, said: dict[str, Any], tokens: int, num_steps: int) -> None:
        """One more repetition of so many steps, over rows of so many tokens."""
        self.losses += said["losses"]
        self.peak = max(self.peak, said["peak"])
        self.seconds.append(said["seconds"] / num_steps)
        self.tokens.append(tokens / num_steps)
        self.stored.append(said["stored"] / num_steps)
        self.batches.append(said["batches"] / num_steps)

    @property
    def speed(self) -> float:
        """Row tokens per second, median."""
        return median(tokens / seconds for tokens, seconds in zip(self.tokens, self.seconds, strict=True))

    def line(self) -> str:
        """Its row of the table."""
        return (
            f"({self.workload}) {self.technique:14s} {CASES[self.case]:11s} {median(self.seconds):8.3f} "
            f"{self.speed:12.0f} {median(self.stored):11.0f} {median(self.batches):8.1f} "
            f"{self.loaded:7.0f} {self.peak:8.0f}"
        )


HEAD = (
    f"{'':3s} {'technique':14s} {'instruction':11s} {'s/step':>8s} {'row tokens/s':>12s} {'stored/step':>11s} "
    f"{'batches':>8s} {'loaded':>7s} {'peak MiB':>8s}"
)


def measure(jobs: Sequence[Job]) -> list[Measured]:
    """The cases of one technique: each is started and warmed up, then they take turns, there and back."""
    size, few = jobs[0].workload.steps, read_steps(jobs[0])
    with ExitStack() as stack:
        lanes = []
        for job in jobs:
            line = stack.enter_context(worker(job))
            lanes.append((Measured(job.workload.name, job.technique, job.configuration, **line.recv()), line))
        for turn in range(jobs[0].repeats):
            first = WARMUP + turn * size
            own = sum(num_tokens(step) for step in few[first : first + size])
            for measured, line in lanes[:: -1 if turn % 2 else 1]:
                line.send(True)
                measured.add(line.recv(), own, size)
    return [measured for measured, _ in lanes]


def summarise(alone: Measured, shared: Measured, unshared: Measured) -> dict[str, Any]:
    """What sharing gains and what the instruction still costs: ratios of every pair of repetitions."""
    checked = zip(shared.losses[:CHECKED_STEPS], unshared.losses[:CHECKED_STEPS], strict=True)
    return {
        "workload": shared.workload,
        "technique": shared.technique,
        "speed_over_unshared": _ratios(unshared.seconds, shared.seconds),
        "memory_over_unshared": shared.peak / unshared.peak,
        "stored_over_unshared": median(shared.stored) / median(unshared.stored),
        "seconds_over_alone": {one.case: _ratios(one.seconds, alone.seconds) for one in (shared, unshared)},
        "loss_difference": max(abs(one - other) for one, other in checked),
    }


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def told(summary: dict[str, Any], dtype: str) -> str:
    """The summary as text; ratios are medians of the pairs, with every pair where it fits."""
    speeds, cost = summary["speed_over_unshared"], summary["seconds_over_alone"]
    return (
        f"({summary['workload']}) {summary['technique']}: shared over not shared: speed x{median(speeds):.2f} "
        f"({' '.join(f'{speed:.2f}' for speed in speeds)}), stored tokens x{summary['stored_over_unshared']:.2f}, "
        f"peak memory x{summary['memory_over_unshared']:.2f}\n"
        f"    a step takes x{median(cost['shared']):.2f} of the rows alone with the instruction shared, "
        f"x{median(cost['unshared']):.2f} not shared; the first {CHECKED_STEPS} losses ({dtype}) differ by "
        f"{summary['loss_difference']:.1e}"
    )


# ------------------------------------------------------------------------------------------------ the program


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=("a", "b"), default=["b"])
    parser.add_argument("--techniques", nargs="+", choices=("lora", "prompt_tuning"), default=["lora", "prompt_tuning"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="optimizer steps of one repetition")
    parser.add_argument("--instruction", type=int, default=300, help="tokens that all rows begin with")
    parser.add_argument("--virtual-tokens", type=int, default=20, help="of prompt tuning")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries the program, measures nothing of use")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, report. Returns the exit status."""
    options = parse(arguments)
    os.environ.update(OMP_NUM_THREADS=str(options.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    exact = {name: differences(name, options.instruction, options.virtual_tokens) for name in options.techniques}
    for name, found in exact.items():
        said = ", ".join(f"{what} {value:.1e}" for what, value in found.items())
        print(f"{name}: largest difference that sharing makes, float64, two steps: {said} (limit {EXACT:.0e})")
    measured: list[Measured] = []
    summaries: list[dict[str, Any]] = []
    for name in options.workloads:
        workload = replace((TINY if options.tiny else WORKLOADS)[name], median=MEDIAN, steps=options.steps)
        print(
            f"\n({name}) {workload.about}, {workload.dtype}: {workload.batch_size} rows per step, instruction of "
            f"{options.instruction} tokens, {options.threads} threads, median of {options.repeats}\n{HEAD}"
        )
        with tempfile.TemporaryDirectory() as folder:
            for jobs in make_jobs(workload, options, Path(folder)):
                cases = measure(jobs)
                measured += cases
                summaries.append(summarise(*cases))
                print("\n".join(one.line() for one in cases), told(summaries[-1], workload.dtype), sep="\n", flush=True)
    if options.output:
        result = {"machine": machine(options), "exactness": exact, "summaries": summaries}
        result["runs"] = [asdict(one) for one in measured]
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(value > EXACT for found in exact.values() for value in found.values()))


def make_jobs(workload: Workload, options: argparse.Namespace, folder: Path) -> Iterator[list[Job]]:
    """The three cases of every technique, and the files of their rows."""
    alone, behind = write_files(workload, WARMUP + options.repeats * options.steps, options.instruction, folder)
    for technique in options.techniques:
        yield [
            Job(
                workload,
                technique,
                str(alone if case == "alone" else behind),
                options.repeats,
                options.virtual_tokens,
                str(folder / f"{technique}-{case}.safetensors"),
                configuration=case,
            )
            for case in CASES
        ]


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Where this ran and how."""
    import torch

    from tailor.machine import describe_machine

    settings = {key: value for key, value in vars(options).items() if key != "output"}
    return {**describe_machine(), "torch": torch.__version__, "settings": settings}


if __name__ == "__main__":
    sys.exit(main())
