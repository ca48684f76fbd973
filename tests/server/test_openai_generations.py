"""The client's contract once more with its first generation, where a folder holds one.

`make test` makes one; otherwise `pip install --target FOLDER openai==1.109.1 httpx`, and set OPENAI_1 to it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = os.environ.get("OPENAI_1", "")


@pytest.mark.skipif(not FOLDER, reason="OPENAI_1 names no folder with openai 1.x")
def test_the_first_generation_agrees() -> None:
    environment = {**os.environ, "PYTHONPATH": FOLDER, "OPENAI_1": ""}
    version = [sys.executable, "-c", "import openai; print(openai.__version__)"]
    assert subprocess.run(version, env=environment, capture_output=True, text=True, check=True).stdout.startswith("1.")
    suites = [str(Path(__file__).with_name(f"test_{name}_client.py")) for name in ("openai", "workshop")]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *suites]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
