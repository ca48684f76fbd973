"""From a data file to tokens: seconds and memory as the rows grow from 10³ to 10⁶, beside `datasets.map`.

Every measurement has a process of its own: read the file, set a tenth aside, and cut every row into token ids and a
loss mask, first with empty caches (cold), then again with what the first run kept (cached). Importing packages and
loading the tokenizer are not counted. The peer does the same work with the `datasets` package, batched and with two
processes: the same template and tokenizer, prompt and completion tokenised once each. Memory is the highest resident
size (VmHWM) of the main process, above what it held before it opened the file; the workers' is listed apart. The last
lines are exponents: the slope of a straight line through the logarithms (1 is linear, 0 is flat). The seconds that all
processors worked are told apart, since they are less sensitive to what else the machine does.

    python benchmarks/data_scale.py [--rows 1000 10000 100000] [--million] [--output results.json]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TEXT = (
    "river mountain cloud stone window ticket parcel order refund account billing delivery late again thanks please "
    "where is my the not yet arrived number changed since monday could you check"
)
FRACTION, SEED = 0.1, 0
STAGES = ("read", "split", "tokenise")


def write_rows(path: Path, num_rows: int) -> None:
    """Random words: prompts of 8 to 60, completions of 2 to 20, no two rows alike."""
    draw, words = random.Random(num_rows), TEXT.split()
    with path.open("w", encoding="utf-8") as file:
        for k in range(num_rows):
            prompt = " ".join(draw.choices(words, k=draw.randint(8, 60)))
            completion = " ".join(draw.choices(words, k=draw.randint(2, 20)))
            file.write(json.dumps({"prompt": f"{prompt} {k}", "completion": completion}) + "\n")


class Clock:
    """Seconds per stage, and the highest memory."""

    def __init__(self) -> None:
        self.before, self.peak = memory(), memory()
        self.used_before = self.used = processor_seconds()
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def stage(self, name: str) -> None:
        """What was done since the last stage."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now
        self.used, self.peak = processor_seconds(), memory()

    def result(self, num_tokens: int) -> dict[str, Any]:
        """As JSON."""
        return {
            "seconds": self.seconds,
            "total": sum(self.seconds.values()),
            "processor_seconds": self.used - self.used_before,
            "peak": self.peak,
            "peak_above": self.peak - self.before,
            "largest_worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024,
            "num_tokens": num_tokens,
        }


def processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def memory() -> int:
    """VmHWM in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def run_tailor(path: Path) -> dict[str, Any]:
    """As `tailor tune` does it."""
    from tailor.data.examples import Rendering
    from tailor.data.prepare import split
    from tailor.data.readers import read_records
    from tailor.data.tokenise import tokenise
    from tailor.models.files import resolve
    from tailor.objectives.sft import SFT
    from tailor.text.render import make_renderer
    from tailor.text.tokenizer import load_tokenizer

    rendering = Rendering(make_renderer(load_tokenizer(resolve("tailor-nano"))), 1024)
    clock = Clock()
    reading = read_records(path)
    clock.stage("read")
    sides = split(reading.records, validation_fraction=FRACTION, seed=SEED)
    clock.stage("split")
    found = [tokenise(side, SFT().examples, rendering, made_by=["sft"])[0] for side in sides]
    clock.stage("tokenise")
    return clock.result(sum(len(e.token_ids) for bundles in found for bundle in bundles for e in bundle))


def run_datasets(path: Path) -> dict[str, Any]:
    """By the `datasets` package, with the same template, tokenizer and cut."""
    import datasets
    from transformers import AutoTokenizer

    from tailor.models.files import resolve

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(str(resolve("tailor-nano")), local_files_only=True)

    def cut(rows: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        prompts, completions = [], []
        for prompt, completion in zip(rows["prompt"], rows["completion"], strict=True):
            asked = [{"role": "user", "content": prompt}]
            whole = [*asked, {"role": "assistant", "content": completion}]
            opened = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
            prompts.append(opened)
            completions.append(tokenizer.apply_chat_template(whole, tokenize=False)[len(opened) :])
        before = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        after = tokenizer(completions, add_special_tokens=False)["input_ids"]
        return {
            "input_ids": [a + b for a, b in zip(before, after, strict=True)],
            "completion_mask": [[0] * len(a) + [1] * len(b) for a, b in zip(before, after, strict=True)],
        }

    clock = Clock()
    rows = datasets.load_dataset("json", data_files=str(path), split="train")
    clock.stage("read")
    sides = rows.train_test_split(test_size=FRACTION, seed=SEED)
    clock.stage("split")
    names = ["prompt", "completion"]
    found = [sides[side].map(cut, batched=True, num_proc=2, remove_columns=names) for side in ("train", "test")]
    clock.stage("tokenise")
    return clock.result(sum(len(row["input_ids"]) for side in found for row in side))


WHO = {"tailor": run_tailor, "datasets": run_datasets}


def measure(who: str, path: Path, home: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    environment = {**os.environ, "TAILOR_HOME": str(home), "HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--worker", who, str(path)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: exit code {done.returncode}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def exponent(rows: list[int], values: list[float]) -> float:
    """The slope of log(value) over log(rows) by least squares; NaN for fewer than two sizes."""
    if len(rows) < 2:
        return math.nan
    return statistics.linear_regression([math.log(n) for n in rows], [math.log(max(v, 1e-9)) for v in values]).slope


def show(who: str, num_rows: int, state: str, found: dict[str, Any]) -> None:
    """One line of the table."""
    parts = "  ".join(f"{name} {found['seconds'][name]:7.2f}" for name in STAGES)
    speed = num_rows / found["total"]
    print(
        f"{who:9}{num_rows:>9,}  {state:6}  {parts}  total {found['total']:7.2f} s  "
        f"(processors {found['processor_seconds']:7.2f} s)  {speed:>9,.0f} rows/s  "
        f"peak +{found['peak_above'] / 2**20:6.1f} MiB (of {found['peak'] / 2**20:.0f})  "
        f"worker {found['largest_worker'] / 2**20:.0f} MiB",
        flush=True,
    )


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--million", action="store_true", help="10⁶ rows as well (minutes)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", nargs=2, metavar=("WHO", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(WHO[options.worker[0]](Path(options.worker[1]))))
        return
    sizes = sorted({*options.rows, *([1_000_000] if options.million else [])})
    names = ["tailor"] + (["datasets"] if importlib.util.find_spec("datasets") else [])
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for num_rows in sizes:
            path = Path(folder) / f"rows-{num_rows}.jsonl"
            write_rows(path, num_rows)
            for who in names:
                for state in ("cold", "cached"):
                    found = measure(who, path, Path(folder) / f"{who}-{num_rows}")
                    results.append({"who": who, "rows": num_rows, "state": state, **found})
                    show(who, num_rows, state, found)
            assert len({r["num_tokens"] for r in results if r["rows"] == num_rows}) == 1, "the tokens are not the same"
    for who in names:
        for state in ("cold", "cached"):
            mine = [r for r in results if (r["who"], r["state"]) == (who, state)]
            counts = [r["rows"] for r in mine]
            time_, peak = (exponent(counts, [r[key] for r in mine]) for key in ("total", "peak"))
            print(f"{who:9} {state:6}  seconds ~ rows^{time_:.2f}   peak memory ~ rows^{peak:.2f}")
    if options.output:
        options.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
