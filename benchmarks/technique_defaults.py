"""Where each technique's default learning rate, initialisation and steps come from.

Trains the embedded base on few rows of two public data sets (intent routing and data to text) with a grid of settings
and prints the best validation loss of each and the step where it stood. The data is not part of the project: give the
folder that holds banking77/train.jsonl.gz and e2e/devset.jsonl.gz.

    python benchmarks/technique_defaults.py DATA_FOLDER [--rows 32 300] [--output results.json]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

from tailor.data.examples import make_examples
from tailor.data.readers import read_records
from tailor.data.records import Record
from tailor.models.base import load_base
from tailor.objectives import SFT
from tailor.techniques import Full, LoRA, PromptTuning, Technique
from tailor.techniques.adapter import Adapter
from tailor.techniques.ia3 import IA3
from tailor.techniques.p_tuning import PTuning
from tailor.techniques.prefix_tuning import PrefixTuning
from tailor.training.settings import TrainSettings, resolve_settings
from tailor.training.trainer import SlotRun, Trainer

TEXT = {
    "banking77": "Sort the customer's question into its intent: ",
    "e2e": "Describe the restaurant from its attributes in one or two plain sentences: ",
}
GRID: list[tuple[str, Technique, tuple[float, ...], int]] = [
    ("lora all-linear", LoRA(), (1e-3, 3e-3), 120),
    ("lora query-value", LoRA(target_modules="query-value"), (1e-2,), 120),
    ("adapter", Adapter(), (1e-3, 3e-3, 1e-2), 120),
    ("ia3", IA3(), (3e-2, 1e-1, 3e-1), 120),
    ("full", Full(), (2e-4, 5e-4), 120),
    ("prompt_tuning vocab", PromptTuning(), (0.1, 0.3), 240),
    ("prompt_tuning random", PromptTuning(init="random"), (0.1,), 240),
    ("prompt_tuning text", PromptTuning(init="text", init_text="TEXT"), (0.1,), 240),
    ("p_tuning mlp", PTuning(), (3e-3, 1e-2, 3e-2), 100),
    ("p_tuning lstm", PTuning(encoder="lstm"), (3e-3, 1e-2), 100),
    ("prefix_tuning vocab", PrefixTuning(), (3e-2, 1e-1, 3e-1), 100),
    ("prefix_tuning random", PrefixTuning(init="random"), (1e-1,), 100),
    ("prefix_tuning reparametrised", PrefixTuning(reparametrisation=True), (1e-1, 3e-1), 100),
]


def rows_of(folder: Path, name: str) -> list[Record]:
    """The data set's rows, shuffled once with a fixed seed."""
    files = {
        "banking77": ("banking77/train.jsonl.gz", {"prompt": "text", "completion": "category"}),
        "e2e": ("e2e/devset.jsonl.gz", {"prompt": "mr", "completion": "ref"}),
    }
    path, columns = files[name]
    rows = read_records(folder / path, columns=columns).records
    if name == "banking77":  # few rows of 77 intents would be none of most: keep the first 20 intents of the file
        labels = list(dict.fromkeys(r.completion for r in rows))[:20]
        rows = [r for r in rows if r.completion in labels]
    random.Random(0).shuffle(rows)
    return rows


def measure(
    technique: Technique, learning_rate: float, num_steps: int, train: list[Record], validation: list[Record]
) -> dict:
    """One run on a fresh base; the validation loss every tenth of it."""
    base = load_base()
    slot = base.host.attach([technique], seed=0)
    rendering = base.rendering(slot)
    settings = TrainSettings(learning_rate=learning_rate, num_steps=num_steps, patience=None)
    examples, held_out = make_examples(train, rendering)[0], make_examples(validation, rendering)[0]
    assert technique.traits.defaults is not None
    resolved = resolve_settings(settings, technique.traits.defaults, len(examples), base.host.embedding_rms())
    alone = [[(example,) for example in side] for side in (examples, held_out)]
    run = SlotRun("run", slot, SFT(), *alone, settings, resolved)
    curve: list[tuple[int, float]] = []

    def listen(report) -> None:
        if report.validation_loss is not None:
            curve.append((report.step, round(report.validation_loss, 4)))

    trainer = Trainer(base, [run], listen)
    started = time.perf_counter()
    while not trainer.done:
        trainer.step()
    return {
        "best_loss": run.best_loss,
        "best_step": run.best_step,
        "seconds": time.perf_counter() - started,
        "curve": curve,
    }


def main() -> None:
    """Run the grid and print one line per run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 300])
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.folder is None:
        print("skipped: this program needs the folder of the public data sets (see --help)")
        return
    results = []
    for data in ("banking77", "e2e"):
        rows = rows_of(arguments.folder, data)
        for num_rows in arguments.rows:
            train, validation = rows[:num_rows], rows[-160:]
            for label, technique, rates, num_steps in GRID:
                if arguments.only not in label:
                    continue
                if isinstance(technique, PromptTuning) and technique.init == "text":
                    technique = PromptTuning(init="text", init_text=TEXT[data])
                for rate in rates:
                    result = measure(technique, rate, num_steps, train, validation)
                    results.append(
                        {"data": data, "rows": num_rows, "technique": label, "learning_rate": rate, **result}
                    )
                    print(
                        f"{data:10s} {num_rows:4d} rows  {label:22s} lr {rate:<7g} best {result['best_loss']:.4f} "
                        f"at {result['best_step']:3d}/{num_steps}  {result['seconds']:.0f} s",
                        flush=True,
                    )
                    if arguments.output:
                        arguments.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    sys.exit(main())
