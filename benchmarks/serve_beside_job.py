"""What a fine-tuning job costs the answers of the server that runs it, and what the answers cost the job.

Starts a live `tailor serve` on tailor-nano for each setting of its jobs, and sends it streaming requests at a steady
rate, however long the answers take (an open loop). Phases take turns: traffic beside no job (idle), the same traffic
beside a job (beside), the job without traffic (alone). The job is made through the API from rows that are drawn here,
spans its phases, and is cancelled after them. Every setting has `--pairs` such triples, in turns with the other
settings and each second time in the opposite order; ratios are those of a pair, so that what else the machine does
falls on both sides. Told are the medians of the pairs' ratios and the percentiles of all requests of a kind.

    default    what `tailor serve` does when nothing is said (niceness 19, half of the cores)
    strictest  a job gets one thread and only the time that nothing else wants (niceness 20)
    mild       niceness 10
    none       a job has all cores, and as much claim on them as the server has (niceness 0)

    python benchmarks/serve_beside_job.py [--settings default strictest mild none] [--pairs 5] [--seconds 20] [--rate 4]
        [--tokens 48] [--quick] [--output FILE]

Seconds to the first token count from the moment at which a request was due. The clients are on the same machine, and
the job slows them down like the server. Every answer must come whole, and the server's own counts must be the sums of
what the clients saw: the exit status is 1 when they are not. The defaults take about 25 minutes, `--quick` one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from beside_tally import COUNTED, KINDS, Phase, facts, table
from load_client import HOST, ask
from load_test import CHAT, MODEL, Server, at_rest, serving

from tailor.jobs.process import is_locked
from tailor.machine import describe_machine

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
SETTINGS = {
    "default": (),
    "strictest": ("--job-niceness", "20", "--job-threads", "1"),
    "mild": ("--job-niceness", "10"),
    "none": ("--job-niceness", "0", "--job-threads", str(CORES)),
}
QUICK = {"settings": ["default", "strictest", "none"], "pairs": 1, "seconds": 3.0, "tokens": 16}
PATIENCE = 120.0
"""Seconds that a job may take to begin or to end."""
NUM_ROWS, BATCH_SIZE, STEPS = 512, 2, 1_000_000
FIRST_STEPS = 3
"""Steps of a job before a phase: the first ones are slower."""
WORDS = ("parcel", "bill", "letter", "clerk", "garden", "window", "river", "market", "harbour", "lamp", "bridge")


# ------------------------------------------------------------------------------------------------ the traffic


def body_of(draw: random.Random, num_tokens: int) -> bytes:
    """A request for so many tokens, with a prompt that no other has: nothing of it is known to the server."""
    text = " ".join(draw.choices(WORDS, k=32))
    asked = {"model": MODEL, "messages": [{"role": "user", "content": text}], "temperature": 0, "ignore_eos": True}
    length = {"max_completion_tokens": num_tokens, "stream": True, "stream_options": {"include_usage": True}}
    return json.dumps({**asked, **length}).encode()


async def traffic(server: Server, phase: Phase, options: argparse.Namespace, seed: str) -> None:
    """Requests at a steady rate for the seconds of a phase; ends with the last answer."""
    draw, start = random.Random(seed), time.perf_counter()

    async def one(due: float, body: bytes) -> None:
        phase.take(await ask(server.port, CHAT, body), due)

    async with asyncio.TaskGroup() as group:
        for number in range(max(1, round(options.seconds * options.rate))):
            due, body = start + number / options.rate, body_of(draw, options.tokens)
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            group.create_task(one(due, body))


# ------------------------------------------------------------------------------------------------ the job


@dataclass
class Job:
    """A running job: its process and its run's folder."""

    process: int
    run: Path

    def steps(self) -> int:
        """Steps so far."""
        return steps_in(self.run)

    def claim(self) -> dict[str, Any]:
        """What the system says of the process: its niceness, whether it only gets idle time, its threads."""
        told = Path(f"/proc/{self.process}/environ").read_text("utf-8").split("\0")
        return {
            "niceness": os.getpriority(os.PRIO_PROCESS, self.process),
            "idle": os.sched_getscheduler(self.process) == os.SCHED_IDLE,
            "threads": int(next(line for line in told if line.startswith("OMP_NUM_THREADS=")).partition("=")[2]),
        }


def call(server: Server, path: str, body: bytes = b"", kind: str = "application/json") -> dict[str, Any]:
    """A POST to the server."""
    request = Request(f"http://{HOST}:{server.port}{path}", body, {"content-type": kind})
    with urlopen(request, timeout=PATIENCE) as reply:
        told: dict[str, Any] = json.load(reply)
        return told


def upload(server: Server) -> str:
    """Send rows for the job. Returns the file's id."""
    draw = random.Random("rows")
    rows = [[" ".join(draw.choices(WORDS, k=draw.randint(10, 40))) for _ in range(2)] for _ in range(NUM_ROWS)]
    lines = [
        json.dumps({"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": told}]})
        for asked, told in rows
    ]
    part = 'Content-Disposition: form-data; name="{}"{}\r\n\r\n{}'
    parts = [part.format("purpose", "", "fine-tune"), part.format("file", '; filename="rows.jsonl"', "\n".join(lines))]
    body = "".join(f"--rows\r\n{one}\r\n" for one in parts) + "--rows--\r\n"
    found: str = call(server, "/v1/files", body.encode(), "multipart/form-data; boundary=rows")["id"]
    return found


@contextmanager
def training(server: Server, home: Path, file: str) -> Iterator[Job]:
    """A job that trains while the block runs; it is cancelled and gone after it."""
    known = set(home.glob("runs/*"))
    train: dict[str, Any] = {"num_steps": STEPS, "batch_size": BATCH_SIZE, "patience": None}
    train |= {"eval_every": STEPS, "checkpoint_every": STEPS, "schedule": "constant", "warmup_ratio": 0}
    asked = {"model": MODEL, "training_file": file, "tailor": {"technique": "lora", "recipe": {"train": train}}}
    number = call(server, "/v1/fine_tuning/jobs", json.dumps(asked).encode())["id"]
    folder = home / "jobs" / number
    try:
        wait_for(lambda: any(steps_in(run) >= FIRST_STEPS for run in set(home.glob("runs/*")) - known), folder)
        (run,) = set(home.glob("runs/*")) - known
        yield Job(int((folder / "pid").read_text("ascii").split()[0]), run)
    finally:
        with suppress(HTTPError):  # it may have ended by itself
            call(server, f"/v1/fine_tuning/jobs/{number}/cancel")
        wait_for(lambda: not is_locked(folder / "lock"), folder)


def steps_in(run: Path) -> int:
    """Steps that a run has logged."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def wait_for(happened: Callable[[], bool], folder: Path) -> None:
    """Wait for something to come of a job. Raises RuntimeError with what its process said when nothing does."""
    end = time.monotonic() + PATIENCE
    while not happened():
        if time.monotonic() > end:
            said = folder / "stderr.txt"
            raise RuntimeError(f"the job does not go on: {said.read_text('utf-8')[-2000:] if said.is_file() else ''}")
        time.sleep(0.05)


# ------------------------------------------------------------------------------------------------ the phases


@dataclass
class Side:
    """A server with its setting, and the phases that it has gone through."""

    name: str
    home: Path
    server: Server
    file: str
    phases: dict[str, list[Phase]] = field(default_factory=lambda: {kind: [] for kind in KINDS})
    claim: dict[str, Any] = field(default_factory=dict)

    async def pair(self, number: int, options: argparse.Namespace) -> None:
        """Each kind of phase once; in the opposite order every second time."""
        forward = number % 2 == 0
        if forward:
            await self.phase("idle", options)
        with training(self.server, self.home, self.file) as job:
            self.claim = job.claim()
            for kind in ("beside", "alone") if forward else ("alone", "beside"):
                await self.phase(kind, options, job)
        if not forward:
            await self.phase("idle", options)

    async def phase(self, kind: str, options: argparse.Namespace, job: Job | None = None) -> None:
        """One phase, and what the server has counted in it."""
        phase, before = Phase(kind), await at_rest(self.server)
        cpu, steps, start = cpu_seconds(self.server.process.pid), job.steps() if job else 0, time.perf_counter()
        if kind == "alone":
            await asyncio.sleep(options.seconds)
        else:
            await traffic(self.server, phase, options, f"{self.name} {kind} {len(self.phases[kind])}")
        phase.seconds = time.perf_counter() - start
        phase.steps = job.steps() - steps if job else 0
        phase.server_cpu_seconds = cpu_seconds(self.server.process.pid) - cpu
        after = await at_rest(self.server)
        phase.counted = {name: after[f"tailor_{name}"] - before[f"tailor_{name}"] for name in COUNTED}
        self.phases[kind].append(phase)


def cpu_seconds(pid: int) -> float:
    """Processor time of a process so far."""
    numbers = Path(f"/proc/{pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


async def measure(folder: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The figures of every setting; their servers run all the time, and nobody asks more than one of them."""
    with ExitStack() as held:
        sides = []
        for name in options.settings:
            home = folder / name
            home.mkdir()
            server = held.enter_context(serving(home, folder / f"{name}.log", *SETTINGS[name]))
            sides.append(Side(name, home, server, upload(server)))
            await traffic(server, Phase("warm-up"), options, f"{name} warm-up")
        for number in range(options.pairs):
            for side in sides[number % len(sides) :] + sides[: number % len(sides)]:
                print(f"pair {number + 1} of {options.pairs}: {side.name}", file=sys.stderr, flush=True)
                await side.pair(number, options)
    return {side.name: {"options": SETTINGS[side.name], "claim": side.claim, **facts(side.phases)} for side in sides}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; `--quick` shortens what nothing is said about."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a phase")
    parser.add_argument("--rate", type=float, default=4.0, help="requests a second")
    parser.add_argument("--tokens", type=int, default=48, help="of an answer")
    parser.add_argument(
        "--quick", action="store_true", help="one pair of short phases of three settings: does it work?"
    )
    parser.add_argument("--output", type=Path)
    if "--quick" in (sys.argv[1:] if arguments is None else arguments):
        parser.set_defaults(**QUICK)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, keep. Returns the exit status."""
    options = parse(arguments)
    loads = {"before": os.getloadavg()}
    with tempfile.TemporaryDirectory(prefix="tailor-beside-") as folder:
        found = asyncio.run(measure(Path(folder), options))
    loads["after"] = os.getloadavg()
    print("\n".join(table(found)))
    if options.output:
        asked = {name: value for name, value in vars(options).items() if name != "output"}
        told = {"machine": {**describe_machine(), "load": loads}, "asked": asked, "settings": found}
        options.output.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    wrong = [f"{name}: {one}" for name, told in found.items() for one in told["wrong"]]
    for one in wrong:
        print(one, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
