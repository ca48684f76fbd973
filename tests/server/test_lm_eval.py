"""lm-eval scores a local task through the server, and its log-likelihoods are the engine's own.

lm-eval[api] is of the bench extra; `PYTHONPATH=FOLDER pytest tests/server/test_lm_eval.py` finds it in a folder, too.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from live_server import Live, start

from tailor.inference.backend import Request, SamplingParams
from tailor.inference.library import Library
from tailor.inference.local import LocalBackend
from tailor.inference.service import Service
from tailor.models.base import Base, load_base

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "aiohttp")), reason="lm-eval[api] is not there"
)

MODEL = "tailor-nano"
ROWS = (
    ("Where is my parcel?", ("on its way", "a blue moon", "seven"), 0),
    ("Can I return a tent?", ("never on Sundays", "yes, within 30 days", "no"), 1),
    ("The bill is wrong.", ("sorry", "we will check the invoice", "tomorrow it rains"), 1),
    ("Is the hut open?", ("the poles are short", "it is", "from June on"), 2),
)
TASK = """\
task: parcels
dataset_path: json
dataset_kwargs: {data_files: {test: ROWS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
PROGRAM = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

folder, settings = sys.argv[1], json.loads(sys.argv[2])
tasks = TaskManager(include_path=folder, include_defaults=False)
found = lm_eval.simple_evaluate(
    "local-completions", model_args=settings, tasks=["parcels"], task_manager=tasks, bootstrap_iters=0, batch_size=2
)
samples = sorted(found["samples"]["parcels"], key=lambda sample: sample["doc_id"])
said = [[(float(response[0][0]), str(response[0][1]) == "True") for response in one["resps"]] for one in samples]
print("RESULT" + json.dumps({"accuracy": found["results"]["parcels"]["acc,none"], "said": said}))
"""


@pytest.fixture
def base() -> Base:
    """The oracle's own: a base runs one pass at a time."""
    return load_base(MODEL, dtype="float32")


@pytest.fixture
def live(own_home: Path) -> Iterator[Live]:
    running = start(Service(Library([load_base(MODEL, dtype="float32")])))
    yield running
    running.stop()


def log_likelihood(base: Base, context: str, continuation: str) -> tuple[float, bool]:
    """Of the continuation's tokens after the context's, by an echo of the engine; and whether each is the likeliest."""
    tokenizer = base.renderer.tokenizer
    ids, num = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    sampling = SamplingParams(max_new_tokens=1, num_top_logprobs=1)
    (answer,) = LocalBackend(base).generate([Request((), prompt=tuple(ids), echo=True, sampling=sampling)])
    told = answer.prompt_tokens[-(len(ids) - num) :]
    assert all(token is not None for token in told)
    best = [token.top[0][1] for token in told if token]
    logprobs = [token.logprob for token in told if token]
    return sum(logprobs), logprobs == best


def test_a_local_task_is_scored(live: Live, base: Base, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    told = [{"question": question, "choices": choices, "label": label} for question, choices, label in ROWS]
    rows.write_text("".join(json.dumps(row) + "\n" for row in told), "utf-8")
    (tmp_path / "parcels.yaml").write_text(TASK.replace("ROWS", str(rows)), "utf-8")
    settings = {
        "model": MODEL,
        "base_url": f"{live.url}/completions",
        "tokenizer": str(base.folder),
        "num_concurrent": 2,
        "max_length": base.max_seq_len,
    }
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(settings)]
    ran = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.rpartition("RESULT")[2])

    expected = [[log_likelihood(base, question, f" {choice}") for choice in choices] for question, choices, _ in ROWS]
    for answers, ours in zip(found["said"], expected, strict=True):
        assert [number for number, _ in answers] == pytest.approx([number for number, _ in ours], abs=1e-4)
        assert [greedy for _, greedy in answers] == [greedy for _, greedy in ours]
    right = [
        max(range(3), key=lambda k: numbers[k][0]) == label
        for numbers, (_, _, label) in zip(expected, ROWS, strict=True)
    ]
    assert found["accuracy"] == sum(right) / len(right)
