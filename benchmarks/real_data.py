"""LoRA, prompt tuning and full fine-tuning on two public data sets, by the command line as a user would type it.

Intent routing (banking77: 77 labels, a tenth of the rows carved out by a hash of the text) and data to text (e2e: the
data's own suggested split by meaning representation), as `public_data.py` prepares them. Each command runs in its own
process, so that its peak memory is its own. The data is not part of the project: give the folder that holds banking77/
and e2e/.

    python benchmarks/real_data.py DATA_FOLDER [--data banking77 e2e] [--output results.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from public_data import prepare

TECHNIQUES = ("lora", "full", "prompt_tuning")
SETTINGS: dict[str, dict[str, list[str]]] = {
    "banking77": {"lora": [], "full": [], "prompt_tuning": ["train.num_epochs=3"]},
    "e2e": {"lora": ["train.num_epochs=2"], "full": ["train.num_epochs=2"], "prompt_tuning": ["train.num_epochs=2"]},
}
"""Overrides of the defaults; each is printed with the result."""


def tailor(*arguments: str, home: Path | None = None) -> dict[str, Any]:
    """Run a command with --json and return its result; its progress goes to this program's stderr.

    `home` is its TAILOR_HOME, else this program's.
    """
    command = [sys.executable, "-c", "from tailor.cli.main import main; main()", *arguments, "--json"]
    environment = os.environ if home is None else {**os.environ, "TAILOR_HOME": str(home)}
    result = subprocess.run(command, stdout=subprocess.PIPE, check=False, text=True, env=environment)
    if result.returncode:
        sys.exit(f"{' '.join(arguments)}: exit code {result.returncode}")
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def main() -> None:
    """Tune, evaluate and print one line per technique and data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--data", nargs="+", default=list(SETTINGS))
    parser.add_argument("--techniques", nargs="+", default=list(TECHNIQUES))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.folder is None:
        print("skipped: this program needs the folder of the public data sets (see --help)")
        return
    results = []
    with tempfile.TemporaryDirectory() as work:
        os.environ.setdefault("TAILOR_HOME", f"{work}/home")
        for name in arguments.data:
            data = prepare(arguments.folder, name, Path(work))
            for technique in ("base", *arguments.techniques):
                tuned: dict[str, Any] = {}
                model = "tailor-nano"
                if technique != "base":
                    model = f"{name}-{technique}"
                    overrides = SETTINGS[name].get(technique, [])
                    tuned = tailor("tune", str(data.train), "-t", technique, "-n", model, "--force", *overrides)
                scored = tailor("eval", model, str(data.test))
                results.append({"data": name, "technique": technique, "tune": tuned, "eval": scored})
                print(line(name, technique, tuned, scored), flush=True)
                if arguments.output:
                    arguments.output.write_text(json.dumps([summary(r) for r in results], indent=1))


def line(name: str, technique: str, tuned: dict[str, Any], scored: dict[str, Any]) -> str:
    """One result in one line."""
    shown = [
        f"{metric} {value['mean']:.3f} [{value['low']:.3f}, {value['high']:.3f}]"
        for metric, value in scored["metrics"].items()
    ]
    metrics = tuned.get("metrics")
    cost = (
        f"{metrics['num_steps']} steps, {metrics['seconds']:.0f} s, {metrics['peak_memory'] / 2**30:.2f} GiB; "
        if metrics
        else ""
    )
    return f"{name:10s} {technique:14s} {cost}{', '.join(shown)}"


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping of a result."""
    tuned = result["tune"]
    kept = {key: tuned[key] for key in ("metrics", "num_parameters", "versions") if key in tuned}
    if "parity" in tuned:
        kept["parity"] = {key: tuned["parity"][key] for key in ("passed", "noise_floor", "gate")}
    return {**result, "tune": kept, "eval": {k: v for k, v in result["eval"].items() if k != "rows"}}


if __name__ == "__main__":
    main()
