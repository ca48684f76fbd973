"""`tailor serve` as a process of its own, on a free port, and the official client in front of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import openai

START = (sys.executable, "-c", "from tailor.cli.main import main; main()", "serve", "--port", "0", "--json")
START += ("--job-niceness", "0")  # other tests may want all cores
PATIENCE = 200


class Command(NamedTuple):
    process: subprocess.Popen[str]
    url: str
    client: openai.OpenAI
    log: Path

    def kill(self) -> None:
        """Without a chance to say or save anything."""
        self.process.kill()
        self.process.wait()


@contextlib.contextmanager
def running(home: Path, *options: str, inside: Sequence[str] = ()) -> Iterator[Command]:
    """The command with its TAILOR_HOME until the block ends; `inside` is a program that starts it."""
    log = home.with_name(f"{home.name}-{time.monotonic_ns()}.log")
    environment = {**os.environ, "TAILOR_HOME": str(home), "OMP_NUM_THREADS": "1"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [*inside, *START, *options], stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        )
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line, log.read_text()
        url = json.loads(line)["url"]
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            yield Command(process, url, client, log)
    finally:
        process.terminate()
        process.wait(60)
        process.stdout.close()


def until(happened: Callable[[], bool], told: Callable[[], object] = lambda: "it did not happen") -> None:
    """Wait for something."""
    end = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < end, told()
        time.sleep(0.05)
