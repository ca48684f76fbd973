"""Training speed and memory beside TRL + PEFT and beside the step's own matrix products, in one interleaved run.

Workloads: (a) a 135M Llama shape in bf16 and (b) a 20M one in fp32, random weights, rows of lognormal length whose last
fifth is the answer; (c) the embedded base on banking77, with `--data` (see public_data.py). Every system has a process
of its own, is warmed up, and then takes turns with the others on the same rows. Peak memory is the process's own,
everything included. Before that, every configuration of TRL must come to tailor's losses (fp32, 1e-4); one that does
not is called `inexact` and enters no goal. The exit status is 1 when TRL's default does not.

    python benchmarks/train_throughput.py [--workloads a b c] [--techniques lora prompt_tuning full ia3]
        [--peers default best] [--repeats 3] [--steps N] [--threads N] [--data FOLDER] [--profile] [--output FILE]

`best` is the configuration without gradient checkpointing that is fastest in the second warm-up step. On (a) TRL is
slow, so it is measured for LoRA only, unless `--all-peers` is given. The systems of a workload are loaded side by side,
which takes about 16 GB on (a); everything takes about a quarter of an hour on two quiet cores. Tokens are real ones:
neither padding nor virtual.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import matrix_floor
import peer_trl
import train_worker
from public_data import prepare
from throughput_report import LOSS_LIMIT, Measured, goals, report
from train_worker import LEARNING_RATES, TINY, WORKLOADS, Channel, Job, Workload, write_rows

RESULTS = Path(__file__).parent / "results"
CHECKED_STEPS, CHECKED_ROWS = 3, 8


class Worker:
    """A process that works on one job. The parent talks to one worker at a time, so that systems take turns."""

    def __init__(self, kind: str, job: Job, threads: int) -> None:
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self._log = tempfile.TemporaryFile("w+", encoding="utf-8")  # noqa: SIM115  (closed with the worker)
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--worker", kind, job.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=environment,
        )
        self.name = f"{job.workload.name} {job.technique} {kind} {job.configuration}".strip()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Tell it that there is nothing more to do."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def hear(self) -> dict[str, Any]:
        """What it says next. Raises RuntimeError with the end of its log when it died."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            said: dict[str, Any] = json.loads(line)
            return said
        self._process.wait()
        self._log.seek(0)
        raise RuntimeError(f"{self.name} failed:\n" + "".join(self._log.readlines()[-12:]))

    def go(self, text: str = "go") -> dict[str, Any]:
        """Let it work on, and hear what came of it."""
        assert self._process.stdin is not None
        self._process.stdin.write(text + "\n")
        self._process.stdin.flush()
        return self.hear()


def ask(kind: str, job: Job, threads: int) -> dict[str, Any]:
    """What a worker with a single answer says."""
    with Worker(kind, job, threads) as worker:
        return worker.hear()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--techniques", nargs="+", choices=list(LEARNING_RATES), default=list(LEARNING_RATES))
    parser.add_argument("--peers", nargs="*", choices=("default", "best"), default=["default", "best"])
    parser.add_argument("--all-peers", action="store_true", help="TRL for every technique on (a) too: up to 30 GB")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="optimizer steps of one repetition")
    parser.add_argument("--threads", type=int, default=train_worker.num_cores())
    parser.add_argument("--virtual-tokens", type=int, default=20, help="of prompt tuning")
    parser.add_argument("--data", type=Path, help="folder of the public data sets, for workload c")
    parser.add_argument("--profile", action="store_true", help="print where tailor's time goes, and measure nothing")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: tries the program, measures nothing of use")
    parser.add_argument("--output", type=Path, help="where to write results; in results/ for a complete run")
    parser.add_argument("--worker", nargs=2, metavar=("KIND", "JOB"), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Check the losses, measure, and report. Returns the exit status."""
    arguments = parse()
    if arguments.worker:
        kind, text = arguments.worker
        WORKERS[kind](Job.from_json(text), Channel())
        return 0
    missing = [name for name in ("trl", "peft") if importlib.util.find_spec(name) is None]
    if arguments.peers and missing:
        print(f"{' and '.join(missing)} not installed (extra: bench): only tailor is measured")
        arguments.peers = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        there = ask("machine", Job(WORKLOADS["b"], "", "", 0, 0, ""), arguments.threads)
        jobs = make_jobs(arguments, there["techniques"], folder)
        if arguments.profile:
            print_profiles(jobs, arguments.threads)
            return 0
        checks = check_losses(jobs, arguments, folder) if arguments.peers else []
        measured = [one for group in by_workload(jobs) for one in measure(group, arguments, checks)]
    found = goals(measured)
    print(report(measured, found))
    write(arguments, {"machine": there["machine"], "checks": checks, "goals": found}, measured)
    return int(any(not check["equal"] for check in checks if check["configuration"] == "default"))


def make_jobs(arguments: argparse.Namespace, known: Sequence[str], folder: Path) -> list[Job]:
    """Every workload with every technique that there is, and the files of their rows."""
    if absent := [name for name in arguments.techniques if name not in known]:
        print(f"tailor has no {', '.join(absent)}: left out")
    jobs: list[Job] = []
    for name in arguments.workloads:
        workload = (TINY if arguments.tiny else WORKLOADS).get(name)
        if workload is None or (workload.shape is None and arguments.data is None):
            print(f"workload {name} skipped: " + ("it has no tiny form" if arguments.tiny else "give --data"))
            continue
        workload = replace(workload, steps=arguments.steps or workload.steps)
        jobs += [
            make_job(workload, technique, arguments, folder) for technique in arguments.techniques if technique in known
        ]
        if workload.shape is not None:
            write_rows(workload, jobs[-1].num_steps, Path(jobs[-1].rows))
        else:
            wanted = jobs[-1].num_steps * workload.batch_size
            source = prepare(arguments.data, "banking77", folder, max_train=wanted, max_test=1).train
            ask("rows", replace(jobs[-1], start=str(source)), arguments.threads)
    return jobs


def make_job(workload: Workload, technique: str, arguments: argparse.Namespace, folder: Path) -> Job:
    """One technique on one workload."""
    return Job(
        workload,
        technique,
        str(folder / f"{workload.name}.jsonl"),
        arguments.repeats,
        arguments.virtual_tokens,
        str(folder / f"{workload.name}-{technique}.safetensors"),
    )


def by_workload(jobs: Sequence[Job]) -> list[list[Job]]:
    """The jobs of each workload."""
    names = dict.fromkeys(job.workload.name for job in jobs)
    return [[job for job in jobs if job.workload.name == name] for name in names]


def print_profiles(jobs: Sequence[Job], threads: int) -> None:
    """The operations that take tailor's time, for every job."""
    for job in jobs:
        print(f"\n({job.workload.name}) {job.workload.about}, {job.technique}\n{ask('profile', job, threads)['table']}")


def check_losses(jobs: Sequence[Job], arguments: argparse.Namespace, folder: Path) -> list[dict[str, Any]]:
    """The losses of a few fp32 steps beside TRL's, for every configuration of it; (b) stands in where all is bf16."""
    checked = [job for job in jobs if job.workload.dtype == "float32"]
    if not checked:
        workload = (TINY if arguments.tiny else WORKLOADS)["b"]
        checked = [make_job(workload, name, arguments, folder) for name in dict.fromkeys(j.technique for j in jobs)]
        write_rows(workload, 1, Path(checked[0].rows))
    found = []
    for job in checked:
        few = replace(job.workload, batch_size=min(CHECKED_ROWS, job.workload.batch_size))
        job = replace(job, workload=few, num_checked=CHECKED_STEPS, start=f"{job.start}-checked")
        ours = ask("losses", job, arguments.threads)["losses"]
        for name, theirs in ask("trl-losses", job, arguments.threads)["losses"].items():
            check: dict[str, Any] = {"workload": few.name, "technique": job.technique, "configuration": name}
            if isinstance(theirs, str):
                check |= {"equal": False, "error": theirs}
                said = f"does not run: {theirs}"
            else:
                difference = max(abs(x - y) for x, y in zip(ours, theirs, strict=True))
                check |= {"equal": difference <= LOSS_LIMIT, "difference": difference, "ours": ours, "theirs": theirs}
                said = f"{difference:.1e}" + ("" if difference <= LOSS_LIMIT else ": not the same result")
            print(f"({few.name}) {job.technique}: {CHECKED_STEPS} losses against TRL {name}: {said}", flush=True)
            found.append(check)
    return found


# ------------------------------------------------------------------------------------------------ taking turns


def measure(jobs: Sequence[Job], arguments: argparse.Namespace, checks: Sequence[Mapping[str, Any]]) -> list[Measured]:
    """All systems on one workload: each is started and warmed up, then they take turns, there and back."""
    threads = arguments.threads
    with ExitStack() as stack:
        floor = stack.enter_context(Worker("floor", jobs[0], threads))
        floor.hear()
        lanes: list[tuple[Measured, Worker, str]] = []
        for job in jobs:
            own = stack.enter_context(Worker("tailor", job, threads))
            lanes.append((Measured.of(job, "tailor", "", own.hear()), own, "go"))
            lanes.append((Measured.of(job, "floor", "", {}), floor, job.technique))
            if job.workload.name == "a" and job.technique != "lora" and not arguments.all_peers:
                print(f"(a) {job.technique}: not measured with TRL (--all-peers does)")
            else:
                for system, names in configurations(job.technique, arguments.peers, checks).items():
                    lanes += peer_lane(job, system, names, threads, stack)
        for turn in range(arguments.repeats):
            for measured, worker, text in lanes[:: -1 if turn % 2 else 1]:
                measured.add(worker.go(text))
                print(measured.line(), flush=True)
    return [measured for measured, _, _ in lanes]


def configurations(technique: str, peers: Sequence[str], checks: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """TRL's configurations that stand for `default`, `best`, and `inexact`: those that run and give other losses."""
    own = [check for check in checks if check["technique"] == technique]
    failing = {check["configuration"] for check in own if "error" in check}
    inexact = {check["configuration"] for check in own if not check["equal"]} - failing
    right = [name for name in peer_trl.CONFIGURATIONS if name not in failing | inexact]
    found = {"default": [name for name in right if name == "default"] if "default" in peers else []}
    if "best" in peers:
        found["best"] = [name for name in right if name != "default"]
        found["inexact"] = sorted(inexact)
    return {system: names for system, names in found.items() if names}


def peer_lane(
    job: Job, system: str, names: Sequence[str], threads: int, stack: ExitStack
) -> list[tuple[Measured, Worker, str]]:
    """TRL in the fastest of these configurations, warmed up."""
    best: tuple[float, str, Worker, dict[str, Any]] | None = None
    for name in names:
        worker = Worker("trl", replace(job, configuration=name), threads)
        said = worker.hear()
        speed = said["tokens"] / said["seconds"]
        if len(names) > 1:
            print(f"({job.workload.name}) {job.technique}: TRL {name} warms up at {speed:.0f} tokens/s", flush=True)
        if best is not None and best[0] >= speed:
            worker.close()
            continue
        if best is not None:
            best[2].close()
        best = speed, name, worker, said
    assert best is not None
    _, name, worker, said = best
    stack.callback(worker.close)
    return [(Measured.of(job, system, name, said), worker, "go")]


def write(arguments: argparse.Namespace, facts: dict[str, Any], measured: Sequence[Measured]) -> None:
    """Results as JSON, to the file that was named; a complete run has a place of its own."""
    complete = not arguments.tiny and set(arguments.workloads) == set(WORKLOADS) and arguments.data and arguments.peers
    if not (arguments.output or complete):
        return
    today = datetime.datetime.now(datetime.UTC).date()
    output = arguments.output or RESULTS / f"cpu-{train_worker.num_cores()}core-{today}-train-throughput.json"
    settings = {key: value.name if isinstance(value, Path) else value for key, value in vars(arguments).items()}
    about = {name: found.about for name, found in peer_trl.CONFIGURATIONS.items()}
    result = {**facts, "settings": settings, "configurations": about, "runs": [m.to_dict() for m in measured]}
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


WORKERS: dict[str, Callable[[Job, Channel], None]] = {
    "tailor": train_worker.train,
    "losses": train_worker.tell_losses,
    "profile": train_worker.profile,
    "machine": train_worker.tell_machine,
    "rows": train_worker.tell_rows,
    "trl": peer_trl.train,
    "trl-losses": peer_trl.tell_losses,
    "floor": matrix_floor.measure,
}


if __name__ == "__main__":
    sys.exit(main())
