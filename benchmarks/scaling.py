"""What a training step costs as the work grows: longer rows, higher ranks, more slots in one pass, more data.

LoRA on a random Llama of 5 M parameters in fp32, every measurement in a process of its own. The rows sweep goes the way
of `tailor tune`, from a data file by way of the cache of tokens; the others draw random tokens. Told are the median
seconds of a step, the same per token, and the highest resident memory while steps are taken, above what the process
held before the first (reading the rows is not counted, holding them is). The exponent is the slope of a straight line
through the logarithms, over all sizes and between the last two: 0 is flat, 1 grows with the size.

    python benchmarks/scaling.py [--sweeps rank slots] [--seconds 2] [--output FOLDER]

Into FOLDER go one drawing per sweep (SVG) and scaling.json.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from train_worker import llama, memory

if TYPE_CHECKING:
    from markupsafe import Markup

    from tailor.data.examples import Bundle
    from tailor.evaluation.drawing.plot import Axis, Frame
    from tailor.models.base import Base
    from tailor.training.trainer import Trainer

SHAPE = llama(hidden=256, layers=4, heads=4, kv_heads=2, inner=768, vocabulary=8192)
CONTEXT = 4096
FEWEST_STEPS = 3
ANSWER = 0.2
"""Share of a row's tokens, at its end, that the loss counts."""


@dataclass(frozen=True)
class Work:
    """One measurement. A step takes `batch_size` rows per slot; `length` is a row's in tokens.

    With `num_rows` the rows are short texts from a data file instead, so many of them.
    """

    length: int = 256
    rank: int = 16
    slots: int = 1
    batch_size: int = 4
    num_rows: int = 0


@dataclass(frozen=True)
class Sweep:
    """One size grows and the rest stays. `field` is the one of Work, `expected` says what it ought to cost."""

    name: str
    field: str
    sizes: tuple[int, ...]
    expected: str
    others: Work = Work()

    def works(self) -> list[Work]:
        """What to measure, smallest first."""
        return [replace(self.others, **{self.field: size}) for size in self.sizes]


SWEEPS = {
    sweep.field: sweep
    for sweep in (
        Sweep(
            "tokens of a row",
            "length",
            (128, 256, 512, 1024, 2048, 4096),
            "1, more where attention weighs",
            Work(batch_size=1),
        ),
        Sweep("LoRA rank", "rank", (4, 8, 16, 32, 64, 128, 256), "below 1: the base's own work stays"),
        Sweep("slots in one pass", "slots", (1, 2, 4, 8, 16), "1: every slot brings its row", Work(batch_size=1)),
        Sweep("rows of data", "num_rows", (1_000, 10_000, 100_000), "0"),
    )
}


@dataclass(frozen=True)
class Measured:
    """Seconds of the median step, its tokens, and MiB: `held` before the first step, `peak` while steps are taken."""

    work: Work
    seconds: float
    num_steps: int
    num_tokens: float
    held: float
    peak: float

    @property
    def growth(self) -> float:
        """Memory that training itself took, in MiB."""
        return max(self.peak - self.held, 0.0)


# ------------------------------------------------------------------------------------------------ one process


def make_base() -> Base:
    """A random Llama with the tokenizer of the embedded base."""
    import torch
    import transformers

    from tailor.models.base import wrap_model
    from tailor.models.files import EMBEDDED
    from tailor.text.tokenizer import load_tokenizer

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        **SHAPE,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return wrap_model(model, load_tokenizer(EMBEDDED["tailor-nano"]), torch.device("cpu"))


def random_rows(work: Work, num_rows: int, seed: int) -> list[Bundle]:
    """Rows of random tokens, all of one length."""
    from tailor.data.examples import Example

    draw = random.Random(seed)
    counted = max(1, round(ANSWER * work.length))
    mask = [0] * (work.length - counted) + [1] * counted
    return [
        (Example([draw.randrange(3, SHAPE["vocab_size"]) for _ in range(work.length)], mask),) for _ in range(num_rows)
    ]


def rows_from_file(base: Base, num_rows: int, folder: Path) -> Sequence[Bundle]:
    """So many short rows, written to a file, read and cut into tokens as `tailor tune` does it."""
    from tailor.data.examples import Rendering
    from tailor.data.readers import read_records
    from tailor.data.tokenise import tokenise
    from tailor.objectives.sft import SFT

    path, draw = folder / "rows.jsonl", random.Random(0)
    words = ["river", "cloud", "stone", "ticket", "order", "late", "again", "please"]
    with path.open("w", encoding="utf-8") as file:
        for k in range(num_rows):
            row = {"prompt": f"{' '.join(draw.choices(words, k=12))} {k}", "completion": " ".join(draw.choices(words))}
            file.write(json.dumps(row) + "\n")
    rendering = Rendering(base.renderer, CONTEXT)
    return tokenise(read_records(path).records, SFT().examples, rendering, made_by=["sft"])[0]


def make_trainer(work: Work, folder: Path) -> Trainer:
    """As many slots as asked for, side by side."""
    from tailor.objectives.sft import SFT
    from tailor.techniques.lora import LoRA
    from tailor.training.settings import TrainSettings, resolve_settings
    from tailor.training.trainer import SlotRun, Trainer

    base = make_base()
    defaults = LoRA.traits.defaults
    assert defaults is not None
    settings = TrainSettings(
        num_steps=10**6, batch_size=work.batch_size, learning_rate=1e-4, schedule="constant", warmup_ratio=0.0
    )
    runs = []
    for number in range(work.slots):
        rows = rows_from_file(base, work.num_rows, folder) if work.num_rows else random_rows(work, 16, number)
        slot = base.host.attach([LoRA(rank=work.rank, alpha=2.0 * work.rank)], seed=number)
        resolved = resolve_settings(settings, defaults, len(rows), base.host.embedding_rms())
        runs.append(SlotRun(f"slot {number}", slot, SFT(), rows, [], settings, resolved))
    return Trainer(base, runs)


def measure(work: Work, seconds: float) -> Measured:
    """Steps for so many seconds, after one that does not count."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TAILOR_HOME"] = folder
        trainer = make_trainer(work, Path(folder))
        held = memory()["resident"]
        forget_peak()
        trainer.step()
        tokens = trainer.runs[0].num_tokens
        times: list[float] = []
        while sum(times) < seconds or len(times) < FEWEST_STEPS:
            started = time.perf_counter()
            trainer.step()
            times.append(time.perf_counter() - started)
        tokens = sum(run.num_tokens for run in trainer.runs) - tokens * work.slots
        return Measured(work, statistics.median(times), len(times), tokens / len(times), held, memory()["peak"])


def forget_peak() -> None:
    """Let the highest resident memory count from now on, where the system can (Linux)."""
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def in_a_process(work: Work, seconds: float) -> Measured:
    """`measure` in a process of its own. Exits when that fails."""
    command = [sys.executable, __file__, "--worker", json.dumps(asdict(work)), "--seconds", str(seconds)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True)
    if done.returncode:
        sys.exit(f"{work}: exit code {done.returncode}")
    found = json.loads(done.stdout.splitlines()[-1])
    return Measured(**{**found, "work": Work(**found["work"])})


# ------------------------------------------------------------------------------------------------ what came of it


def exponents(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Slope of log(value) over log(size): by least squares over all, and between the last two."""
    x, y = ([math.log(max(v, 1e-9)) for v in side] for side in (sizes, values))
    return statistics.linear_regression(x, y).slope, (y[-1] - y[-2]) / (x[-1] - x[-2])


def table(sweep: Sweep, found: Sequence[Measured]) -> list[str]:
    """A line per size, and one with the exponents."""
    lines = [f"{sweep.name:>18}  seconds/step  µs/token  tokens/step   held MiB  training MiB"]
    for one in found:
        lines.append(
            f"{getattr(one.work, sweep.field):>18,}{one.seconds:14.4f}{one.seconds / one.num_tokens * 1e6:10.1f}"
            f"{one.num_tokens:13,.0f}{one.held:11.0f}{one.growth:14.1f}"
        )
    time_, memory_ = (exponents(sweep.sizes, values) for values in (_seconds(found), _growths(found)))
    lines.append(
        f"exponent: seconds {time_[0]:.2f}, last two {time_[1]:.2f} (expected: {sweep.expected}); "
        f"training memory {memory_[0]:.2f}, last two {memory_[1]:.2f}"
    )
    return lines


def _seconds(found: Sequence[Measured]) -> list[float]:
    return [one.seconds for one in found]


def _growths(found: Sequence[Measured]) -> list[float]:
    return [one.growth for one in found]


STYLE = """
.chart { background: #fff; font-family: system-ui, sans-serif; } .chart text { fill: #1a1f26; }
.chart path { fill: none; } .grid { stroke: #cfd5dd; } .axis { stroke: #545e6b; }
.line { stroke: #0b5fa5; stroke-width: 2; } .dot { fill: #0b5fa5; } .dashed { stroke: #b03d06; stroke-dasharray: 6 5; }
"""
WIDTH, HEIGHT = 640, 300


def drawing(sweep: Sweep, found: Sequence[Measured]) -> Markup:
    """Seconds and memory over the size, both axes logarithmic, each with its straight line (dashed)."""
    from markupsafe import Markup

    from tailor.evaluation.drawing.plot import Axis, Frame
    from tailor.evaluation.drawing.svg import tag

    x_axis = Axis(sweep.name, "{:,.0f}".format)
    panels = []
    for row, (title, values) in enumerate((("seconds/step", _seconds(found)), ("training MiB", _growths(found)))):
        frame = Frame(f"panel{row}", title, f"{title} over {sweep.name}", WIDTH)
        panel = _panel(frame, sweep.sizes, values, x_axis, Axis(title, "{:g}".format))
        panels.append(tag("g", panel, transform=f"translate(0 {row * HEIGHT})"))
    whole = Frame("sweep", sweep.name, f"What a step costs over {sweep.name}", WIDTH)
    return whole.around(len(panels) * HEIGHT, tag("style", Markup(STYLE)), *panels)


def _panel(frame: Frame, sizes: Sequence[int], values: Sequence[float], x_axis: Axis, y_axis: Axis) -> Markup:
    from tailor.evaluation.drawing.plot import Plot
    from tailor.evaluation.drawing.scales import logarithmic
    from tailor.evaluation.drawing.svg import Box, Style, marker, path, tag

    values = [max(value, 1e-3) for value in values]
    area = Box(62.0, 34.0, WIDTH - 24.0, HEIGHT - 52.0)
    y = logarithmic([min(values) / 2, 2 * max(values)], area.bottom, area.top)
    plot = Plot(area, logarithmic(sizes, area.left, area.right), y, x_axis, y_axis)
    fit = statistics.linear_regression(*([math.log(v) for v in side] for side in (sizes, values)))
    last = exponents(sizes, values)[1]
    ends = [(plot.x.at(s), y.held(math.exp(fit.intercept + fit.slope * math.log(s)))) for s in (sizes[0], sizes[-1])]
    places = [(plot.x.at(size), y.at(value)) for size, value in zip(sizes, values, strict=True)]
    return frame.around(
        HEIGHT,
        plot.grid(sizes),
        tag("path", class_="dashed", d=path(ends)),
        tag("path", class_="line", d=path(places)),
        *(marker(Style(0, 0), *place) for place in places),
        tag("text", f"exponent {fit.slope:.2f}, last two {last:.2f}", x=area.right, y=16, text_anchor="end"),
    )


def main() -> None:
    """Measure, print, draw, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS))
    parser.add_argument("--sizes", type=int, help="only so many of each sweep's sizes, the smallest (at least two)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of steps per measurement")
    parser.add_argument("--output", type=Path, help="a folder")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(asdict(measure(Work(**json.loads(options.worker)), options.seconds))))
        return
    results: dict[str, Any] = {}
    for name in options.sweeps:
        sweep = replace(SWEEPS[name], sizes=SWEEPS[name].sizes[: options.sizes])
        found = [in_a_process(work, options.seconds) for work in sweep.works()]
        print("\n".join(table(sweep, found)), end="\n\n", flush=True)
        results[name] = [asdict(one) for one in found]
        if options.output:
            options.output.mkdir(parents=True, exist_ok=True)
            (options.output / f"scaling-{name}.svg").write_text(f"{drawing(sweep, found)}\n", "utf-8")
            (options.output / "scaling.json").write_text(json.dumps(results, indent=2) + "\n", "utf-8")


if __name__ == "__main__":
    main()
