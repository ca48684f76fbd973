"""How far `tailor plan` is off: estimated against measured memory and seconds of real tuning runs.

Every run and every estimate has a process of its own, so that peak memory is its own. The rows are random words, the
larger bases random Llama shapes with the embedded tokenizer; nothing is downloaded. The estimate's constants (PROCESS
and HEAP_SLACK in training/estimate.py) come from the runs of `--set calibration`; the error is reported on those of
`--set test`, which have other sizes, rows, techniques and seeds.

    python benchmarks/plan_error.py [--set test|calibration] [--only NAME ...] [--output results.json]

Keep the machine quiet: seconds are estimated from a measurement of a second, and compared with seconds measured later.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# torch is imported in the children only: on Linux a child's ru_maxrss begins with what its parent held

RESULTS = Path(__file__).parent / "results"
WORDS = "river mountain cloud stone window ticket parcel order refund account billing delivery late again thanks please"
ROWS = {"short": (4, 16), "medium": (20, 60), "long": (80, 200)}
"""Words per prompt, from and to; completions have a quarter of that."""


@dataclass(frozen=True)
class Shape:
    """A random Llama with the embedded base's tokenizer. `dtype` is the one its weights are stored in."""

    hidden: int
    layers: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int
    dtype: str = "float32"

    @property
    def name(self) -> str:
        """As a folder's name."""
        return f"llama-{self.hidden}x{self.layers}-{self.vocabulary}-{self.dtype}"


@dataclass(frozen=True)
class Case:
    """One tuning run."""

    technique: dict[str, Any]
    rows: str
    tokens_per_batch: int
    batch_size: int
    num_steps: int
    shape: Shape | None = None
    dtype: str = "float32"
    seed: int = 1
    num_rows: int = 160

    @property
    def name(self) -> str:
        """What it is, in one line."""
        base = self.shape.name if self.shape else "tailor-nano"
        settings = "".join(f" {value}" for key, value in self.technique.items() if key != "type")
        return f"{base} {self.dtype} {self.technique['type']}{settings}, {self.rows} rows, {self.tokens_per_batch}"


SMALL, MIDDLE, LARGE = (
    Shape(384, 9, 1024, 6, 2, 8192),
    Shape(512, 14, 1536, 8, 4, 16384, "bfloat16"),
    Shape(640, 20, 1728, 10, 5, 16384),
)
LORA, FULL, PROMPT = {"type": "lora"}, {"type": "full"}, {"type": "prompt_tuning"}
TEST = (
    Case({**LORA, "rank": 4}, "short", 1024, 16, 80),
    Case({**LORA, "rank": 64}, "short", 4096, 64, 30),
    Case({**LORA, "rank": 64, "dropout": 0.1}, "long", 1024, 8, 30),
    Case({**LORA, "rank": 4}, "long", 4096, 24, 15),
    Case({**LORA, "target_modules": "query-value"}, "long", 4096, 24, 15),
    Case(FULL, "short", 1024, 16, 80),
    Case(FULL, "long", 4096, 24, 15),
    Case(PROMPT, "short", 1024, 16, 60),
    Case({**PROMPT, "num_virtual_tokens": 20}, "long", 4096, 24, 15),
    Case({**LORA, "rank": 16}, "long", 1024, 8, 10, SMALL),
    Case(FULL, "short", 4096, 32, 12, SMALL),
    Case({**LORA, "rank": 64}, "short", 1024, 16, 10, MIDDLE),
    Case(FULL, "long", 1024, 4, 6, MIDDLE, "bfloat16"),
    Case({**LORA, "rank": 4}, "long", 1024, 4, 6, LARGE),
    Case(FULL, "short", 1024, 16, 6, LARGE),
)
CALIBRATION = (
    Case({**LORA, "rank": 16}, "medium", 2048, 32, 10, seed=11),
    Case({**LORA, "rank": 8}, "medium", 4096, 48, 8, seed=12),
    Case(FULL, "medium", 2048, 32, 10, seed=13),
    Case(PROMPT, "medium", 4096, 48, 8, seed=14),
    Case({**LORA, "rank": 8}, "medium", 2048, 16, 5, Shape(448, 12, 1280, 7, 7, 4096), seed=15),
    Case(FULL, "medium", 2048, 16, 5, Shape(576, 12, 1536, 9, 3, 12288), seed=16),
    Case({**LORA, "rank": 16}, "medium", 2048, 16, 6, Shape(704, 14, 1920, 11, 11, 12288), seed=17),
)


def main() -> None:
    """Run the cases and print one line for each, then the median errors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=("test", "calibration"), default="test", dest="chosen")
    parser.add_argument("--only", nargs="+", help="run the cases whose name holds one of these")
    parser.add_argument("--output", type=Path, help="where to write results; in results/ when not given")
    parser.add_argument("--child", nargs=2, metavar=("WORK", "ARGUMENTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        work, given = arguments.child
        print(json.dumps(CHILDREN[work](**json.loads(given))))
        return
    cases = [case for case in (TEST if arguments.chosen == "test" else CALIBRATION) if _wanted(case, arguments.only)]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            runs.append(measure(case, Path(folder)))
            print(line(runs[-1]), flush=True)
    machine = child("machine")
    result = {"machine": machine, "set": arguments.chosen, **errors(runs), "runs": runs}
    for name, error in errors(runs).items():
        print(f"{name}: median {error['median']:.1%}, worst {error['worst']:.1%}")
    today = datetime.datetime.now(datetime.UTC).date()
    output = arguments.output or RESULTS / f"cpu-{machine['cores']}core-{today}-plan-error.json"
    if arguments.output or (arguments.chosen == "test" and not arguments.only):
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def _wanted(case: Case, only: list[str] | None) -> bool:
    return not only or any(part in case.name for part in only)


def measure(case: Case, folder: Path) -> dict[str, Any]:
    """The estimate, then the run, each in its own process."""
    data = write_rows(case, folder)
    base = "tailor-nano"
    if case.shape is not None:
        base = str(folder / case.shape.name)
        if not Path(base).is_dir():
            child("make", folder=base, shape=asdict(case.shape))
    recipe = {
        "base": {"name": base, "dtype": case.dtype},
        "data": {"train": str(data)},
        "technique": [case.technique],
        "train": {
            "tokens_per_batch": case.tokens_per_batch,
            "batch_size": case.batch_size,
            "num_steps": case.num_steps,
            "eval_every": max(2, case.num_steps // 3),
            "patience": None,
            "seed": case.seed,
        },
        "output": {"name": "measured"},
    }
    home = folder / "home"
    estimate = child("estimate", recipe=recipe, home=str(home))
    measured = child("run", recipe=recipe, home=str(home))
    shutil.rmtree(home)
    return {
        "name": case.name,
        "case": asdict(case),
        "estimated": estimate,
        "measured": measured,
        "memory_ratio": estimate["memory"] / measured["memory"],
        "training_memory_ratio": estimate["training_memory"] / measured["training_memory"],
        "seconds_ratio": estimate["seconds"] / measured["seconds"],
    }


def write_rows(case: Case, folder: Path) -> Path:
    """Rows of random words; lengths are spread evenly between the kind's limits."""
    draw = random.Random(case.seed)
    low, high = ROWS[case.rows]
    words = WORDS.split()
    path = folder / f"{case.rows}-{case.seed}-{case.num_rows}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(case.num_rows):
            length = draw.randint(low, high)
            prompt = " ".join(draw.choices(words, k=length))
            completion = " ".join(draw.choices(words, k=max(1, length // 4)))
            file.write(json.dumps({"prompt": f"{number} {prompt}", "completion": completion}) + "\n")
    return path


def line(run: dict[str, Any]) -> str:
    """One run in one line."""
    estimated, measured = run["estimated"], run["measured"]
    return (
        f"{run['name']:78s} memory {estimated['memory'] / 2**20:6.0f} of {measured['memory'] / 2**20:6.0f} MiB "
        f"({run['memory_ratio']:.2f}; until saved {run['training_memory_ratio']:.2f})  "
        f"time {estimated['seconds']:5.1f} of {measured['seconds']:5.1f} s ({run['seconds_ratio']:.2f})"
    )


def errors(runs: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Median and worst absolute relative error of every estimate."""
    found = {}
    for name in ("memory", "training_memory", "seconds"):
        off = [abs(run[f"{name}_ratio"] - 1) for run in runs]
        found[name] = {"median": statistics.median(off), "worst": max(off)}
    return found


def child(work: str, **given: Any) -> dict[str, Any]:
    """Do a part of the work in a process of its own."""
    command = [sys.executable, __file__, "--child", work, json.dumps(given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def estimate_run(recipe: dict[str, Any], home: str) -> dict[str, Any]:
    """What `tailor plan` says."""
    os.environ["TAILOR_HOME"] = home
    from tailor.recipes.plan import plan
    from tailor.recipes.tune_settings import TuneRecipe

    found = plan(TuneRecipe(**recipe)).to_dict()
    peaks = {moment["name"]: moment["bytes"] for moment in found["memory"]["moments"]}
    training = max(size for name, size in peaks.items() if name != "verification")
    return {"memory": found["memory"]["peak"], "training_memory": training, "seconds": found["seconds"], "plan": found}


def run_run(recipe: dict[str, Any], home: str) -> dict[str, Any]:
    """What `tailor tune` takes: memory until the artifact is saved and to the end, seconds as it reports them."""
    os.environ["TAILOR_HOME"] = home
    from tailor.recipes.tune import tune
    from tailor.recipes.tune_settings import TuneRecipe
    from tailor.training.progress import peak_memory

    metrics = tune(TuneRecipe(**recipe), quiet=True).artifact.manifest["metrics"]
    return {
        "memory": peak_memory(),
        "training_memory": metrics["peak_memory"],
        "seconds": metrics["seconds"],
        "num_tokens": metrics["num_tokens"],
    }


def make_base(folder: str, shape: dict[str, Any]) -> dict[str, Any]:
    """Save a random Llama with the embedded tokenizer."""
    import torch
    import transformers

    from tailor.models.files import EMBEDDED

    config = transformers.LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["inner"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(getattr(torch, shape["dtype"]))
    model.save_pretrained(folder)
    for pattern in ("tokenizer*", "chat_template*"):
        for path in EMBEDDED["tailor-nano"].glob(pattern):
            shutil.copyfile(path, Path(folder) / path.name)
    return {"num_parameters": sum(parameter.numel() for parameter in model.parameters())}


def machine() -> dict[str, Any]:
    """Where this ran."""
    import torch
    import transformers

    from tailor.machine import describe_machine

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {**describe_machine(), **versions, "num_threads": torch.get_num_threads(), "load": os.getloadavg()}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {
    "estimate": estimate_run,
    "run": run_run,
    "make": make_base,
    "machine": machine,
}


if __name__ == "__main__":
    main()
