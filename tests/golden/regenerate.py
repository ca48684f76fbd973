"""Write the golden files again and show what changed: python tests/golden/regenerate.py [technique ...]

Do this only when a change of the numbers is meant, and say in the change's description why they moved.
"""

from __future__ import annotations

import difflib
import json
import platform
import sys

import torch
import transformers
from golden_runs import golden_run, path

from tailor.models.base import load_base
from tailor.techniques import TECHNIQUES


def main(techniques: list[str]) -> None:
    """Run the named techniques (all when none is named), each on a fresh tailor-nano in fp32 on the CPU."""
    torch.set_num_threads(1)
    for technique in techniques or TECHNIQUES:
        header = {
            "made_by": f"python tests/golden/regenerate.py {technique}",
            "how": "golden_run() of tests/golden/golden_runs.py: tailor-nano, fp32, one CPU thread, seed 0, three "
            "steps of four of six rows, constant learning rate; settings and rate were the defaults that day",
            "made_with": f"torch {torch.__version__}, transformers {transformers.__version__}, {platform.machine()}",
        }
        found = header | golden_run(load_base("tailor-nano", "cpu", "float32"), technique)
        before = path(technique).read_text() if path(technique).exists() else ""
        after = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
        path(technique).write_text(after)
        changes = difflib.unified_diff(
            before.splitlines(), after.splitlines(), "before", path(technique).name, n=0, lineterm=""
        )
        print("\n".join(changes) or f"{path(technique).name}: unchanged")


if __name__ == "__main__":
    main(sys.argv[1:])
