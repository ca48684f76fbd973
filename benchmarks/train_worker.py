"""What one process of train_throughput.py works on: the workloads, their rows and models, and tailor's own side.

A worker trains one system on one workload in a process of its own. It warms up, says that it is ready, and goes on for
one repetition each time it is told to, so that systems take turns and every peak of memory is a system's own.
"""

from __future__ import annotations

import json
import math
import os
import random
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tailor.training.trainer import Trainer

# torch is imported inside functions: the program that starts the workers stays small

LEARNING_RATES = {"lora": 1e-3, "ia3": 1e-2, "prompt_tuning": 1e-2, "full": 1e-4}
"""Constant, the same for every system; speed does not depend on them."""

RANK, ALPHA = 16, 32
WARMUP = 2
"""Steps before anything counts; the time of the second is what TRL's configurations are chosen by."""

MEDIAN, SPREAD, SHORTEST, LONGEST = 120, 0.75, 8, 1024
"""Row lengths in tokens: lognormal around the median, cut at both ends."""

ANSWER = 0.2
"""Share of a row's tokens, at its end, that the loss counts."""


@dataclass(frozen=True)
class Workload:
    """`shape` are the sizes of a random Llama with tied embeddings; without it, the embedded base and real rows.

    `steps` optimizer steps of `batch_size` rows make one measured repetition.
    """

    name: str
    about: str
    dtype: str
    batch_size: int
    steps: int
    shape: Mapping[str, int] | None = None
    median: int = MEDIAN


@dataclass(frozen=True)
class Job:
    """What a worker is told when it starts. `rows` holds the rows of all steps, in order.

    With `num_checked` there are that many steps, all of them over the first step's rows.
    """

    workload: Workload
    technique: str
    rows: str
    repeats: int
    num_virtual_tokens: int
    start: str
    configuration: str = ""
    num_checked: int = 0

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.num_checked or WARMUP + self.repeats * self.workload.steps

    def to_json(self) -> str:
        """As text, for the command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> Job:
        """What `to_json` wrote."""
        given = json.loads(text)
        return Job(**{**given, "workload": Workload(**given["workload"])})


def llama(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocabulary: int) -> dict[str, int]:
    """Sizes under transformers' names."""
    return {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "intermediate_size": inner,
        "vocab_size": vocabulary,
    }


WORKLOADS = {
    "a": Workload("a", "135M Llama shape, random", "bfloat16", 8, 2, llama(576, 30, 9, 3, 1536, 49152)),
    "b": Workload("b", "20M Llama shape, random", "float32", 16, 2, llama(384, 8, 6, 2, 1536, 8192)),
    "c": Workload("c", "tailor-nano on banking77", "float32", 16, 8),
}
TINY = {
    "a": Workload("a", "tiny random Llama", "bfloat16", 4, 1, llama(32, 2, 2, 1, 48, 512), 12),
    "b": Workload("b", "tiny random Llama", "float32", 4, 1, llama(32, 2, 2, 1, 48, 512), 12),
}


class Channel:
    """Lines of JSON to the parent, lines of text from it. What libraries print goes to stderr."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)

    def say(self, **facts: Any) -> None:
        """One line."""
        print(json.dumps(facts), file=self._out, flush=True)

    def told(self) -> str:
        """The next line; empty when there is nothing more to do."""
        return sys.stdin.readline().strip()


def memory() -> dict[str, float]:
    """Resident memory of this process in MiB: now, and at its highest so far."""
    try:
        text = Path("/proc/self/status").read_text("utf-8")
        found = {key: re.search(rf"^{name}:\s+(\d+) kB$", text, re.MULTILINE) for key, name in MARKS.items()}
        return {key: int(match[1]) / 1024 for key, match in found.items() if match}
    except OSError:
        from tailor.training.progress import peak_memory

        return {"resident": math.nan, "peak": peak_memory() / 2**20}


MARKS = {"resident": "VmRSS", "peak": "VmHWM"}


# ------------------------------------------------------------------------------------------------ rows


def write_rows(workload: Workload, num_steps: int, path: Path, seed: int = 0) -> None:
    """Rows of random tokens. A step's lengths are drawn from `batch_size` equal slices of the distribution, so that
    all steps are alike and a few of them stand for many.
    """
    assert workload.shape is not None
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(num_steps):
            lengths = [_length(workload, (k + draw.random()) / workload.batch_size) for k in range(workload.batch_size)]
            draw.shuffle(lengths)
            for length in lengths:
                counted = max(1, round(ANSWER * length))
                token_ids = [draw.randrange(3, workload.shape["vocab_size"]) for _ in range(length)]
                row = {"token_ids": token_ids, "loss_mask": [0] * (length - counted) + [1] * counted}
                file.write(json.dumps(row) + "\n")


def _length(workload: Workload, share: float) -> int:
    wanted = workload.median * math.exp(SPREAD * NormalDist().inv_cdf(min(max(share, 1e-6), 1 - 1e-6)))
    return min(max(round(wanted), SHORTEST), LONGEST)


def render_rows(source: Path, path: Path) -> None:
    """The rows of a prepared data set as the embedded base's chat template renders them."""
    from tailor.data.examples import Rendering, make_examples
    from tailor.data.records import PromptCompletion, Record
    from tailor.models.base import load_base

    base = load_base("tailor-nano", "cpu", "float32")
    with source.open(encoding="utf-8") as lines:
        records: list[Record] = [PromptCompletion(**json.loads(line)) for line in lines]
    examples, _ = make_examples(records, Rendering(base.renderer, base.max_seq_len))
    with path.open("w", encoding="utf-8") as file:
        for example in examples:
            row = {"token_ids": list(example.token_ids), "loss_mask": list(example.loss_mask)}
            file.write(json.dumps(row) + "\n")


def read_steps(job: Job) -> list[list[dict[str, list[int]]]]:
    """The rows of every optimizer step."""
    size = job.workload.batch_size
    with Path(job.rows).open(encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    if job.num_checked:
        return [rows[:size]] * job.num_checked
    return [rows[start : start + size] for start in range(0, size * job.num_steps, size)]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def num_tokens(step: Sequence[Mapping[str, Sequence[int]]]) -> int:
    """Real tokens: neither padding nor virtual ones."""
    return sum(len(row["token_ids"]) for row in step)


# ------------------------------------------------------------------------------------------------ models


def make_model(workload: Workload) -> Any:
    """The transformers model, the same weights in every process; attention is torch's own fused kernel."""
    import torch
    import transformers

    from tailor.models.base import DTYPES
    from tailor.models.files import EMBEDDED

    dtype = DTYPES[workload.dtype]
    if workload.shape is None:
        return transformers.AutoModelForCausalLM.from_pretrained(str(EMBEDDED["tailor-nano"]), dtype=dtype)
    config = transformers.LlamaConfig(
        **workload.shape,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)


def make_trainer(job: Job) -> Trainer:
    """tailor's trainer with its default settings, a constant learning rate and the rows in the order of the file.

    The slot's start is written to `job.start`, where TRL's side reads it.
    """
    import torch
    from safetensors.torch import save_file

    from tailor.data.examples import Example
    from tailor.data.packing import Placed
    from tailor.models.base import wrap_model
    from tailor.models.files import EMBEDDED
    from tailor.objectives.sft import SFT
    from tailor.techniques import TECHNIQUES
    from tailor.text.tokenizer import load_tokenizer
    from tailor.training.settings import TrainSettings, resolve_settings
    from tailor.training.trainer import SlotRun, Trainer, place

    class InOrder(SlotRun):
        """Draws the rows as they stand, for every system the same."""

        def draw(self) -> list[Placed]:
            size = self.resolved.batch_size
            return place(self.train[self.step * size : (self.step + 1) * size], self.slot.number)

    base = wrap_model(make_model(job.workload), load_tokenizer(EMBEDDED["tailor-nano"]), torch.device("cpu"))
    own = {"lora": {"rank": RANK, "alpha": ALPHA}, "prompt_tuning": {"num_virtual_tokens": job.num_virtual_tokens}}
    technique = TECHNIQUES[job.technique](**own.get(job.technique, {}))
    slot = base.host.attach([technique])
    if technique.traits.frozen_base and not Path(job.start).exists():
        save_file({name: value.contiguous() for name, value in slot.state().items()}, job.start)
    prefix = list(slot.virtual_ids)
    bundles = [
        (Example(prefix + row["token_ids"], [0] * len(prefix) + row["loss_mask"]),)
        for step in read_steps(job)
        for row in step
    ]
    settings = TrainSettings(
        num_steps=job.num_steps,
        batch_size=job.workload.batch_size,
        learning_rate=LEARNING_RATES[job.technique],
        schedule="constant",
        warmup_ratio=0.0,
    )
    assert technique.traits.defaults is not None
    resolved = resolve_settings(settings, technique.traits.defaults, len(bundles), base.host.embedding_rms())
    return Trainer(base, [InOrder("measured", slot, SFT(), bundles, [], settings, resolved)])


# ------------------------------------------------------------------------------------------------ tailor's worker


def train(job: Job, channel: Channel) -> None:
    """Warm up, then one repetition for every line from the parent."""
    trainer = make_trainer(job)
    tokens = [num_tokens(step) for step in read_steps(job)]
    baseline = memory()["resident"]
    first = [trainer.step()[0].loss for _ in range(WARMUP)]
    channel.say(baseline=baseline, first_loss=first[0])
    done = WARMUP
    while channel.told():
        started = time.perf_counter()
        for _ in range(job.workload.steps):
            trainer.step()
        seconds = time.perf_counter() - started
        counted = tokens[done : done + job.workload.steps]
        done += job.workload.steps
        channel.say(seconds=seconds, tokens=sum(counted), peak=memory()["peak"])


def tell_machine(job: Job, channel: Channel) -> None:
    """Where this runs, and the techniques there are."""
    import torch
    import transformers

    from tailor.machine import describe_machine
    from tailor.techniques import TECHNIQUES

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    machine = {**describe_machine(), **versions, "num_threads": torch.get_num_threads(), "load": os.getloadavg()}
    channel.say(machine=machine, techniques=list(TECHNIQUES))


def tell_rows(job: Job, channel: Channel) -> None:
    """Render `job.start`, a file of prompts and completions, into `job.rows`."""
    render_rows(Path(job.start), Path(job.rows))
    channel.say(written=job.rows)


def tell_losses(job: Job, channel: Channel) -> None:
    """The loss of every step."""
    trainer = make_trainer(job)
    channel.say(losses=[trainer.step()[0].loss for _ in range(job.num_steps)])


def profile(job: Job, channel: Channel) -> None:
    """Where one repetition's time goes: the operations with the highest self CPU time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    trainer = make_trainer(job)
    for _ in range(WARMUP):
        trainer.step()
    with profiler(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(job.workload.steps):
            trainer.step()
    table = found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=45)
    channel.say(table=table)
