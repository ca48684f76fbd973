"""From pressing Enter to the first help line and to the first training step, beside TRL and PEFT.

Every run is a process of its own; the programs take turns, and medians are told of the wall clock and of the CPU time
(user and system), which other work on the machine disturbs less. A training run has taken its first step when the step
is in its own log: `metrics.jsonl` of tailor's run folder, and a line that a callback writes after the step for TRL.
Then the process is killed. Both train LoRA of rank 16 on every linear layer of the embedded base, on the sample
tickets, with the same batch size; tailor sets a tenth of the rows aside, TRL is in its default configuration, in fp32.

    python benchmarks/startup.py [--repeats 9] [--step-repeats 5] [--output results.json]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tailor.machine import describe_machine

PACKAGE = Path(__file__).parents[1] / "src" / "tailor"
BASE = PACKAGE / "models" / "embedded"
ROWS = PACKAGE / "data" / "sample" / "tickets.jsonl"
BATCH_SIZE = 8
PAUSE = 0.002
"""Seconds between two looks at a log."""

PEER = """
import json, sys
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

base, rows, batch_size, log, folder = sys.argv[1:]


class FirstStep(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        with open(log, "a") as file:
            file.write(f"{state.global_step}\\n")


def chat(row):
    return {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


with open(rows, encoding="utf-8") as lines:
    dataset = Dataset.from_list([chat(json.loads(line)) for line in lines])
SFTTrainer(
    model=base,
    args=SFTConfig(
        output_dir=folder, per_device_train_batch_size=int(batch_size), bf16=False, use_cpu=True, report_to=[]
    ),
    train_dataset=dataset,
    peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
    callbacks=[FirstStep()],
).train()
"""
"""What a user of TRL would write for the same run."""


@dataclass
class Start:
    """A program, and how long it took each time. With `log` it is timed until that file (a pattern) has a line.

    `limit` is the goal in seconds, `beside` the peer's program for the same end.
    """

    name: str
    command: list[str]
    log: str = ""
    limit: float | None = None
    beside: str = ""
    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Once more, in a folder of its own that is its home and its caches' too. Exits when the program fails."""
        with tempfile.TemporaryDirectory() as folder:
            seconds, cpu = timed([part.replace("FOLDER", folder) for part in self.command], Path(folder), self.log)
        self.seconds.append(seconds)
        self.cpu.append(cpu)


def starts() -> list[Start]:
    """What is measured: tailor's programs, and the peers' where they are installed."""
    tailor = installed("tailor")
    tune = ["tune", str(ROWS), "--quiet", f"train.batch_size={BATCH_SIZE}"]
    found = [
        Start("tailor --help", [*tailor, "--help"], limit=0.3, beside="trl --help"),
        Start("tailor tune --help", [*tailor, "tune", "--help"], limit=0.3, beside="trl sft --help"),
        Start(
            "tailor tune, first step",
            [*tailor, *tune],
            log="home/runs/*/metrics.jsonl",
            limit=6.0,
            beside="SFTTrainer, first step",
        ),
    ]
    if importlib.util.find_spec("trl") and importlib.util.find_spec("peft"):
        trainer = [sys.executable, "-c", PEER, str(BASE), str(ROWS), str(BATCH_SIZE), "FOLDER/steps", "FOLDER/run"]
        found += [
            Start("trl --help", [*installed("trl"), "--help"]),
            Start("trl sft --help", [*installed("trl"), "sft", "--help"]),
            Start("import trl, peft", [sys.executable, "-c", "import trl, peft"]),
            Start("SFTTrainer, first step", trainer, log="steps"),
        ]
    return found


def installed(name: str) -> list[str]:
    """A console script of this Python's environment."""
    path = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if path is None:
        sys.exit(f"there is no program {name!r} beside {sys.executable}")
    return [path]


def timed(command: list[str], folder: Path, log: str) -> tuple[float, float]:
    """(wall clock, CPU) seconds until the program ends, or until a file `log` in `folder` has a whole line."""
    homes = {"TAILOR_HOME": str(folder / "home"), "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1"}
    with (folder / "said").open("w+", encoding="utf-8") as said:
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, env={**os.environ, **homes}, stdout=said, stderr=said)
        ended, logged = 0, False
        while not (ended or logged):
            ended, status, usage = os.wait4(process.pid, os.WNOHANG if log else 0)
            logged = bool(log) and any(b"\n" in path.read_bytes() for path in folder.glob(log))
            if log and not (ended or logged):
                time.sleep(PAUSE)
        seconds = time.perf_counter() - began
        if not ended:
            process.kill()
            _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)  # it was waited for here, not by subprocess
        if not logged and (log or status):
            said.seek(0)
            sys.exit(f"{command[0]} ended before it was measured:\n{said.read()[-2000:]}")
    return seconds, usage.ru_utime + usage.ru_stime


def report(found: list[Start]) -> list[str]:
    """A line per program: medians, the goal, and the same of the program it stands beside over it."""
    known = {start.name: start for start in found if start.seconds}
    lines = [f"{'program':26}{'wall s':>9}{'CPU s':>9}   goal"]
    for start in known.values():
        wall, cpu = statistics.median(start.seconds), statistics.median(start.cpu)
        line = f"{start.name:26}{wall:9.3f}{cpu:9.3f}"
        if start.limit is not None:
            line += f"   < {start.limit:g} s: {'met' if wall < start.limit else 'NOT met'}"
        if peer := known.get(start.beside):
            ratios = [statistics.median(of) / mine for of, mine in ((peer.seconds, wall), (peer.cpu, cpu))]
            line += f";  {peer.name} takes {ratios[0]:.2f} × the wall clock, {ratios[1]:.2f} × the CPU"
        lines.append(line)
    return lines


def main() -> None:
    """Measure in turns, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=9, help="of the programs that end by themselves")
    parser.add_argument("--step-repeats", type=int, default=5, help="of those that train")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found, load = starts(), os.getloadavg()
    for number in range(max(options.repeats, options.step_repeats)):
        for start in found:
            if number < (options.step_repeats if start.log else options.repeats):
                start.run()
    print("\n".join(report(found)))
    if len(found) == 3:
        print("trl and peft are not installed (extra: bench), so nothing stands beside these")
    if options.output:
        # names only: where things stand on this machine is nobody's business
        told = [{**asdict(start), "command": [Path(part).name for part in start.command]} for start in found]
        facts = {"machine": {**describe_machine(), "load": load}, "programs": told}
        options.output.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
