"""N customizations of one base trained in the same passes, against the same N trained one after the other.

Every slot has rows of its own. A case is a base, N, whether all slots are LoRAs or of mixed techniques, and the rows of
a slot's step: one short row or two, or sixteen longer ones. For each, one process trains N slots in one pass, and N
processes train one slot each; every process has loaded a base of its own, is warmed up, and then they take turns on the
same rows: a repetition of the one with N, then one of each of the N, and back. Seconds are those of optimizer steps;
memory is the highest of a process, and that of N runs one after the other is the greatest of theirs. The ratio is the
time of the one pass over the sum of the others': below 1, together is quicker. Before that, losses of a tiny float64
model must be those of the slots alone: the exit status is 1 when they differ by more than 1e-9.

    python benchmarks/concurrent_training.py [--bases nano large] [--rows one two many] [--slots 1 2 4 8]
        [--techniques lora mixed] [--repeats 5] [--seconds 2] [--device cpu] [--threads N] [--output FILE]

`nano` is tailor-nano in fp32, `large` a 135M Llama shape in bf16. All cases on two quiet cores take about two hours;
the large base with eight slots loads nine copies of it, 6 GiB. `--output` wants
benchmarks/results/<hardware>-<date>-concurrent-training.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from train_worker import TINY, WARMUP, WORKLOADS, Workload, make_model, memory, num_cores

if TYPE_CHECKING:
    from tailor.data.examples import Bundle
    from tailor.models.slots import Slot
    from tailor.training.trainer import Trainer

# torch is imported inside functions: every measurement is a process of its own; the one that starts them stays small

BASES = {"nano": WORKLOADS["c"], "large": WORKLOADS["a"]}
TINY_BASES = {"nano": TINY["b"], "large": TINY["a"]}

ROWS = {"one": (1, 24), "two": (2, 32), "many": (16, 128)}
"""Rows of a slot's step, and the tokens of each; the last fifth counts."""

ANSWER = 0.2
DISTINCT_ROWS = 64
MIXED = ("lora", "prompt_tuning", "ia3", "adapter", "prefix_tuning", "p_tuning", "lora", "prompt_tuning")
"""Whose turn it is among the slots of a mixed case. The second LoRA sits on the upper half of the layers only."""

EXACT = 1e-9
CHECKED_STEPS = 5


@dataclass(frozen=True)
class Case:
    """What is trained: `places` are the numbers of the slots, all of them or one alone."""

    workload: Workload
    base: str
    rows: str
    techniques: str
    places: tuple[int, ...]
    device: str = "cpu"


# ------------------------------------------------------------------------------------------------ one process


def technique_of(case: Case, place: int, num_layers: int) -> Any:
    """The technique of the slot with this number, the same whoever is beside it."""
    from tailor.techniques import TECHNIQUES

    name = MIXED[place % len(MIXED)] if case.techniques == "mixed" else "lora"
    own: dict[str, Any] = {"num_virtual_tokens": 10} if name in ("prompt_tuning", "p_tuning", "prefix_tuning") else {}
    if case.techniques == "mixed" and place % len(MIXED) == 6:
        own = {"target_layers": tuple(range(num_layers // 2, num_layers))}
    return TECHNIQUES[name](**own)


def random_rows(case: Case, place: int, slot: Slot, vocabulary: int) -> list[Bundle]:
    """Rows of random tokens behind the slot's virtual tokens, the same whoever is beside it."""
    from tailor.data.examples import Example

    _, length = ROWS[case.rows]
    draw = random.Random(place)
    counted = max(1, round(ANSWER * length))
    lead = list(slot.virtual_ids)
    mask = [0] * (len(lead) + length - counted) + [1] * counted
    return [
        (Example(lead + [draw.randrange(3, vocabulary) for _ in range(length)], mask),) for _ in range(DISTINCT_ROWS)
    ]


def make_trainer(case: Case) -> Trainer:
    """The slots of the case on a base of their own."""
    import torch

    from tailor.models.base import wrap_model
    from tailor.models.files import EMBEDDED
    from tailor.objectives.sft import SFT
    from tailor.text.tokenizer import load_tokenizer
    from tailor.training.settings import TrainSettings, resolve_settings
    from tailor.training.trainer import SlotRun, Trainer

    device = torch.device(case.device)
    base = wrap_model(make_model(case.workload), load_tokenizer(EMBEDDED["tailor-nano"]), device)
    batch_size, _ = ROWS[case.rows]
    settings = TrainSettings(num_steps=10**6, batch_size=batch_size, schedule="constant", warmup_ratio=0.0)
    runs = []
    for place in case.places:
        technique = technique_of(case, place, base.host.num_layers)
        slot = base.host.attach([technique], seed=place)
        rows = random_rows(case, place, slot, base.host.embedding_shape()[0])
        assert technique.traits.defaults is not None
        calm = replace(technique.traits.defaults, learning_rate=technique.traits.defaults.learning_rate / 10)
        resolved = resolve_settings(settings, calm, len(rows), base.host.embedding_rms())
        runs.append(SlotRun(f"slot {place}", slot, SFT(), rows, [], settings, resolved))
    return Trainer(base, runs)


def timed(trainer: Trainer, num_steps: int) -> float:
    """Seconds of so many steps, the device's work included."""
    import torch

    started = time.perf_counter()
    for _ in range(num_steps):
        trainer.step()
    if trainer.base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def work(case: Case, channel: Connection) -> None:
    """Warm up, then as many steps as the parent asks for, until it asks for none."""
    from tailor.training.progress import peak_memory

    trainer = make_trainer(case)
    loaded = memory()["resident"]
    timed(trainer, WARMUP)
    channel.send({"loaded": loaded})
    while num_steps := channel.recv():
        seconds = timed(trainer, num_steps)
        peak = peak_memory(trainer.base.device) / 2**20 if case.device.startswith("cuda") else memory()["peak"]
        channel.send({"seconds": seconds / num_steps, "peak": peak})


@contextmanager
def worker(case: Case) -> Iterator[Connection]:
    """A process that works on one case, and the line to it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=work, args=(case, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        with suppress(OSError):
            ours.send(0)
        process.join()


# ------------------------------------------------------------------------------------------------ exactness


def largest_difference(techniques: str, num_slots: int) -> float:
    """Of a loss in float64, together and alone, over some steps."""
    places = tuple(range(num_slots))
    case = Case(replace(TINY["b"], dtype="float64"), "tiny", "two", techniques, places)
    together = make_trainer(case)
    apart = [make_trainer(replace(case, places=(place,))) for place in places]
    found = 0.0
    for _ in range(CHECKED_STEPS):
        ours = [report.loss for report in together.step()]
        theirs = [trainer.step()[0].loss for trainer in apart]
        found = max(found, *(abs(one - other) for one, other in zip(ours, theirs, strict=True)))
    return found


# ------------------------------------------------------------------------------------------------ taking turns


@dataclass
class Measured:
    """One case: per repetition the seconds of a step together, and the sum of those alone. Memory in MiB."""

    base: str
    rows: str
    techniques: str
    num_slots: int
    num_steps: int
    together: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    loaded: float = 0.0
    peak_together: float = 0.0
    peak_alone: float = 0.0

    @property
    def ratios(self) -> list[float]:
        """Time together over the sum alone, of every pair of repetitions."""
        return [one / other for one, other in zip(self.together, self.alone, strict=True)]

    def line(self) -> str:
        """Its row of the table."""
        return (
            f"{self.base:6s} {self.techniques:6s} {self.rows:5s} {self.num_slots:5d} {median(self.together):11.4f} "
            f"{median(self.alone):11.4f} {median(self.ratios):7.2f}  {self.loaded:7.0f} {self.peak_together:9.0f} "
            f"{self.peak_alone:7.0f}  ({' '.join(f'{ratio:.2f}' for ratio in self.ratios)})"
        )


HEAD = (
    f"{'base':6s} {'kinds':6s} {'rows':5s} {'slots':>5s} {'together, s':>11s} {'in turn, s':>11s} {'ratio':>7s}  "
    f"{'loaded':>7s} {'peak MiB':>9s} {'in turn':>7s}  (every ratio)"
)


def measure(case: Case, repeats: int, seconds: float) -> Measured:
    """A case and its slots alone, each in a process: all are started and warmed up, then they take turns."""
    with ExitStack() as stack:
        lines = [stack.enter_context(worker(case))]
        facts = [lines[0].recv()]
        for place in case.places:
            lines.append(stack.enter_context(worker(replace(case, places=(place,)))))
            facts.append(lines[-1].recv())
        lines[0].send(1)
        num_steps = max(1, math.ceil(seconds / lines[0].recv()["seconds"]))
        found = Measured(case.base, case.rows, case.techniques, len(case.places), num_steps, loaded=facts[0]["loaded"])
        for turn in range(repeats):
            said: dict[int, dict[str, float]] = {}
            for number in range(len(lines))[:: -1 if turn % 2 else 1]:
                lines[number].send(num_steps)
                said[number] = lines[number].recv()
            found.together.append(said[0]["seconds"])
            found.alone.append(sum(said[number]["seconds"] for number in said if number))
            found.peak_together = max(found.peak_together, said[0]["peak"])
            found.peak_alone = max(found.peak_alone, *(said[number]["peak"] for number in said if number))
    return found


def over_one(found: Sequence[Measured]) -> list[dict[str, Any]]:
    """Time of N slots in one pass over the time of one slot, where both were measured."""
    ones = {(m.base, m.rows, m.techniques): median(m.together) for m in found if m.num_slots == 1}
    return [
        {
            "base": m.base,
            "rows": m.rows,
            "techniques": m.techniques,
            "slots": m.num_slots,
            "over_one": median(m.together) / one,
        }
        for m in found
        if (one := ones.get((m.base, m.rows, m.techniques))) and m.num_slots > 1
    ]


# ------------------------------------------------------------------------------------------------ the program


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", choices=tuple(BASES), default=list(BASES))
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS))
    parser.add_argument("--slots", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--techniques", nargs="+", choices=("lora", "mixed"), default=["lora", "mixed"])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of one repetition of the slots together, about")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries the program, measures nothing of use")
    parser.add_argument("--output", type=Path, help="where to write the results as JSON")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, measure, report. Returns the exit status."""
    options = parse(arguments)
    os.environ.update(OMP_NUM_THREADS=str(options.threads), HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    exact = {kind: largest_difference(kind, max(options.slots)) for kind in options.techniques}
    for kind, value in exact.items():
        print(
            f"{kind}: largest difference of a loss from the slot's alone, float64, {CHECKED_STEPS} steps: {value:.1e}"
        )
    print(f"\n{options.device}, {options.threads} threads, medians of {options.repeats}\n{HEAD}")
    found = []
    bases = TINY_BASES if options.tiny else BASES
    for base, techniques, rows, slots in itertools.product(
        options.bases, options.techniques, options.rows, options.slots
    ):
        case = Case(bases[base], base, rows, techniques, tuple(range(slots)), options.device)
        found.append(measure(case, options.repeats, options.seconds))
        print(found[-1].line(), flush=True)
    for one in over_one(found):
        print("{base} {techniques} {rows}: {slots} slots take {over_one:.2f} times as long as one".format(**one))
    if options.output:
        runs = [{**asdict(one), "ratio": median(one.ratios)} for one in found]
        result = {"machine": machine(options), "exactness": exact, "over_one": over_one(found), "runs": runs}
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(value > EXACT for value in exact.values()))


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Where this ran and how."""
    import torch

    from tailor.machine import describe_machine

    settings = {key: value for key, value in vars(options).items() if key != "output"}
    return {**describe_machine(), "torch": torch.__version__, "settings": settings}


if __name__ == "__main__":
    sys.exit(main())
