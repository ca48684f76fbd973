"""`tailor compare` on public data sets, as a user would type it: learning curves, costs, and the verdict of each.

The data is not part of the project: give the folder that holds banking77/, e2e/, ... (see public_data.py). A comparison
that was interrupted goes on; one that is finished is only read. The step budgets keep the whole program at about two
hours on two cores; `--names` chooses. The reports stay in HOME/comparisons.

    python benchmarks/comparisons.py DATA [--names banking77 ...] [--home HOME] [--output results.json]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from public_data import prepare
from real_data import tailor

CURVES: dict[str, list[str]] = {
    "banking77": ["--sizes", "8,64,512,all", "--max-test-rows", "300", "train.num_steps=200"],
    "sentence_polarity": ["--sizes", "8,64,512,all", "--max-test-rows", "300", "train.num_steps=200"],
    "clinc150": ["--sizes", "512", "--max-test-rows", "300", "train.num_steps=200"],
    "e2e": ["--sizes", "512", "--max-test-rows", "150", "train.num_steps=100"],
    "mts-dialog": [
        *("--sizes", "64,256,all", "--max-test-rows", "100"),
        *("evaluation.sampling={max_new_tokens: 128}", "train.num_steps=50"),
    ],
}
"""The arguments of each comparison; each is kept with its result."""

SHORT: dict[str, list[str]] = {
    "quarel": ["--max-test-rows", "200"],
    "wiqa": ["--max-test-rows", "200"],
    "strategyqa": ["--max-test-rows", "198", "train.num_steps=100"],
    "common_gen": ["--max-test-rows", "63", "train.num_steps=100"],
    "toxicity": ["--max-test-rows", "150", "train.num_steps=100"],
    "product_review_aspects": ["--max-test-rows", "150", "train.num_steps=100"],
    "sgd-nlg": ["--max-test-rows", "150", "train.num_steps=100"],
    "gsm8k": ["--max-test-rows", "80", "evaluation.sampling={max_new_tokens: 120}", "train.num_steps=80"],
    "quartz": ["--max-test-rows", "134", "train.num_steps=80"],
    "factbook": ["--max-test-rows", "80", "evaluation.sampling={max_new_tokens: 50}", "train.num_steps=80"],
    "sgd-tool-calls": ["--max-test-rows", "80", "evaluation.sampling={max_new_tokens: 80}", "train.num_steps=60"],
    "scitldr": ["--max-test-rows", "60", "evaluation.sampling={max_new_tokens: 60}", "train.num_steps=60"],
    "wiki_bio": ["--max-test-rows", "59", "evaluation.sampling={max_new_tokens: 80}", "train.num_steps=60"],
    "medquad": ["--max-test-rows", "60", "evaluation.sampling={max_new_tokens: 80}", "train.num_steps=60"],
}
"""One size each, 300 rows: what recommend_rule.py judges the rule by, beside the curves."""

KEPT = ("id", "kind", "status", "metrics", "num_parameters", "rows_used", "training", "mixed_batch", "forgetting")


def compare(folder: Path, name: str, home: Path) -> dict[str, Any]:
    """Prepare the rows, run the command and return its report."""
    rows = prepare(folder, name, home / "rows")
    arguments = CURVES.get(name) or ["--sizes", "300", *SHORT[name]]
    pattern = ["--answer-pattern", rows.answer_pattern] if rows.answer_pattern else []
    data = [str(rows.train), "--test", str(rows.test), "--name", name]
    return tailor("compare", *data, *pattern, *arguments, home=home)


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """What is worth keeping of a report: no rows of data, no paths."""
    rows = []
    for row in report["rows"]:
        inference = row["inference"] or {}
        ratios = {"ratio": inference.get("ratio"), "merged_ratio": inference.get("merged_ratio")}
        rows.append({**{key: row[key] for key in KEPT}, **ratios})
    data = {key: report["data"][key] for key in ("kind", "num_train", "num_validation", "num_test")}
    claims = {
        claim["column"]: {
            line: {key: cell[key] for key in ("claim", "measured", "agrees")} for line, cell in claim["cells"].items()
        }
        for claim in report["claims"]
    }
    same = ("name", "machine", "versions", "settings", "metric", "curves", "crossovers")
    verdict = {key: report["verdict"][key] for key in ("best", "tied", "pick", "sentences", "differences")}
    return {**{key: report[key] for key in same}, "data": data, "rows": rows, "verdict": verdict, "claims": claims}


def lines(report: dict[str, Any]) -> list[str]:
    """A data set's learning curves as rows of a Markdown table, and its verdict."""
    metric, sizes = report["metric"]["name"], report["settings"]["sizes"]
    told = [f"### {report['name']}: {metric}", "", f"| | {' | '.join(f'{size:,} rows' for size in sizes)} |"]
    told.append("|---" * (len(sizes) + 1) + "|")
    for curve in report["curves"]:
        points = {point["size"]: point for point in curve["points"]}
        cells = [
            f"{points[s]['mean']:.3f} [{points[s]['low']:.3f}, {points[s]['high']:.3f}]" if s in points else ""
            for s in sizes
        ]
        told.append(f"| {curve['id'].split('/', 1)[1]} | {' | '.join(cells)} |")
    return [*told, "", *report["verdict"]["sentences"], *report["crossovers"], ""]


def main() -> None:
    """Run the comparisons one after the other; print and keep each as soon as it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--names", nargs="+", default=list(CURVES), choices=[*CURVES, *SHORT])
    parser.add_argument("--home", type=Path)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.folder is None:
        print("skipped: this program needs the folder of the public data sets (see --help)")
        return
    kept = []
    with tempfile.TemporaryDirectory() as work:
        for name in arguments.names:
            report = compare(arguments.folder, name, (arguments.home or Path(work)).absolute())
            kept.append(summary(report))
            print("\n".join(lines(report)), flush=True)
            if arguments.output:
                arguments.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
