"""TRL's and PEFT's side of train_throughput.py: SFTTrainer on the same rows, weights and settings, on the CPU.

What is set alike on both sides: rows and their order, AdamW (weight decay 0), constant learning rate, clipping at 1,
start of the adapter, precision. TRL gets rows of token ids with a `completion_mask`; for such rows its
`completion_only_loss` must be set (None, its default, means "completion only" for prompt-completion text and "all
tokens" for token ids). In TRL 1.16 the loss head never holds all logits, but on a CPU it computes them at every
position, counted or not; that cannot be changed by a setting. Its default is padding to the longest of 8 rows,
gradient checkpointing on, bf16 autocast on (switched off for fp32 workloads, as they are stated). A bf16 model is
trained under bf16 autocast with fp32 adapters; full tuning then has bf16 weights and bf16 optimizer states, where
tailor keeps both in fp32. Flash attention, Liger and hub kernels need a GPU. Without flash attention, transformers'
SDPA mask keeps rows that stand side by side apart (it reads the position ids), so padding-free and packed LoRA and full
tuning come to the padded losses. With PEFT's prompt tuning they do not: it drops the position ids, so the rows see each
other and the prompt stands before the first only.
"""

from __future__ import annotations

import re
import tempfile
import time
from dataclasses import dataclass, replace
from typing import Any

from train_worker import (
    ALPHA,
    LEARNING_RATES,
    RANK,
    WARMUP,
    Channel,
    Job,
    Workload,
    make_model,
    memory,
    num_tokens,
    read_steps,
)

FORWARD = 1024
"""Tokens that a configuration other than the default aims at in one forward pass; also TRL's default `max_length`."""

COPIED = ("lora", "prompt_tuning")
"""Techniques that begin with random numbers."""


@dataclass(frozen=True)
class Configuration:
    """How TRL is set up; `about` goes into the report."""

    name: str
    about: str
    checkpointing: bool = False
    padding_free: bool = False
    packing: bool = False
    by_length: bool = False


CONFIGURATIONS = {
    found.name: found
    for found in (
        Configuration("default", "padded, 8 rows per forward, gradient checkpointing", checkpointing=True),
        Configuration("padded", "rows of a step sorted by length, padded, no checkpointing", by_length=True),
        Configuration("padding_free", "rows of a forward side by side, no checkpointing", padding_free=True),
        Configuration("packed", "best-fit packs of 1024 tokens, no checkpointing", packing=True),
    )
}
"""`padded` has the savings of transformers' group_by_length and keeps the rows of every step."""


def rows_per_forward(workload: Workload, configuration: Configuration, mean_length: float) -> int:
    """TRL's default of 8, or as many (a divisor of the step's rows) as come to about FORWARD tokens."""
    size = workload.batch_size
    if configuration.name == "default":
        return min(8, size)
    if configuration.packing:
        return 1
    divisors = [k for k in range(1, size + 1) if size % k == 0]
    return max([k for k in divisors if k * mean_length <= FORWARD], default=1)


def make_arguments(job: Job, folder: str, packs_per_step: int | None, logging_steps: int) -> Any:
    """SFTConfig for the job's configuration."""
    import trl

    configuration = CONFIGURATIONS[job.configuration]
    steps = read_steps(job)
    size = job.workload.batch_size
    forward = rows_per_forward(job.workload, configuration, sum(map(num_tokens, steps)) / len(steps) / size)
    accumulation = packs_per_step or size // forward
    own: dict[str, Any] = {}
    if not configuration.checkpointing:
        own["gradient_checkpointing"] = False
    if configuration.padding_free:
        own |= {"padding_free": True, "max_length": None}
    if configuration.packing:
        own |= {"packing": True, "max_length": FORWARD}
    return trl.SFTConfig(
        output_dir=folder,
        max_steps=job.num_steps,
        per_device_train_batch_size=forward,
        gradient_accumulation_steps=accumulation,
        learning_rate=LEARNING_RATES[job.technique],
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        completion_only_loss=True,
        bf16=job.workload.dtype == "bfloat16",
        use_cpu=True,
        train_sampling_strategy="sequential",
        report_to=[],
        save_strategy="no",
        logging_first_step=True,
        logging_steps=logging_steps,
        disable_tqdm=True,
        **own,
    )


def peft_config(job: Job) -> Any:
    """The technique as PEFT's settings, None for full tuning."""
    import peft

    if job.technique == "lora":
        return peft.LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
        )
    if job.technique == "ia3":
        return peft.IA3Config(task_type="CAUSAL_LM")
    if job.technique == "prompt_tuning":
        return peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=job.num_virtual_tokens)
    return None


def make_trainer(job: Job, folder: str, callback: Any, logging_steps: int) -> Any:
    """The SFTTrainer, with the adapter's start copied from tailor's.

    Packs are made of a whole data set; a step takes so many of them that they last for all steps.
    """
    import datasets  # type: ignore[import-untyped]
    import trl

    from tailor.models.files import EMBEDDED
    from tailor.text.tokenizer import load_tokenizer

    datasets.disable_progress_bars()
    configuration = CONFIGURATIONS[job.configuration]
    steps = read_steps(job)
    if configuration.packing and job.num_checked:
        steps = steps[:1]
    if configuration.by_length:
        steps = [sorted(step, key=lambda row: len(row["token_ids"])) for step in steps]
    rows = [
        {"input_ids": row["token_ids"], "completion_mask": [0, *row["loss_mask"][1:]]} for step in steps for row in step
    ]
    dataset = datasets.Dataset.from_list(rows)
    packs_per_step = None
    if configuration.packing:
        packs = trl.pack_dataset(dataset.select_columns(["input_ids"]), FORWARD)
        packs_per_step = max(1, len(packs) // len(steps))
    trainer = trl.SFTTrainer(
        model=make_model(job.workload),
        args=make_arguments(job, folder, packs_per_step, logging_steps),
        train_dataset=dataset,
        processing_class=load_tokenizer(EMBEDDED["tailor-nano"]).hf,
        peft_config=peft_config(job),
        callbacks=[] if callback is None else [callback],
    )
    if job.technique in COPIED:
        copy_start(trainer.model, job)
    return trainer


def copy_start(model: Any, job: Job) -> None:
    """Give PEFT's parameters the values tailor's began with. Raises ValueError unless all of them are met."""
    import torch
    from safetensors.torch import load_file

    trained = {_our_name(name): p for name, p in model.named_parameters() if p.requires_grad}
    start = load_file(job.start)
    if trained.keys() != start.keys():
        raise ValueError(f"PEFT trains other parameters: {sorted(trained.keys() ^ start.keys())[:4]}")
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(start[name].view_as(parameter))


def _our_name(name: str) -> str:
    """`base_model.model.X.lora_A.default.weight` is X.lora_A.weight; a prompt encoder's embedding is the table."""
    if name.startswith("prompt_encoder."):
        return "prompt_embeddings"
    return re.sub(r"\.default\b", "", name.removeprefix("base_model.model."))


def make_clock(job: Job, channel: Channel) -> Any:
    """A callback that reports each repetition and waits for the next; needs `trainer` set before training."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        trainer: Any = None
        loss = 0.0
        began = 0.0
        baseline = memory()["resident"]

        def tokens(self, first: int, last: int) -> int:
            """Real tokens of these steps."""
            arguments = self.trainer.args
            size = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
            rows = self.trainer.train_dataset
            return sum(len(rows[k % len(rows)]["input_ids"]) for k in range(first * size, last * size))

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.baseline = memory()["resident"]

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in (logs or {}) and state.global_step == 1:
                self.loss = logs["loss"]

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            step, per = state.global_step, job.workload.steps
            if step < WARMUP - 1 or (step > WARMUP and (step - WARMUP) % per):
                return
            if step >= WARMUP:
                seconds = time.perf_counter() - self.began
                first = step - (1 if step == WARMUP else per)
                facts = {"baseline": self.baseline, "first_loss": self.loss} if step == WARMUP else {}
                tokens = self.tokens(first, step)
                channel.say(seconds=seconds, tokens=tokens, peak=memory()["peak"], **facts)
                control.should_training_stop = not channel.told()
            self.began = time.perf_counter()

    return Clock()


def train(job: Job, channel: Channel) -> None:
    """Warm up, then one repetition for every line from the parent."""
    clock = make_clock(job, channel)
    with tempfile.TemporaryDirectory() as folder:
        clock.trainer = make_trainer(job, folder, clock, logging_steps=10**6)
        clock.trainer.train()


def tell_losses(job: Job, channel: Channel) -> None:
    """The loss of every step in every configuration, or why there is none.

    All steps take the same rows, so that packing, which mixes the rows of a whole data set, has them in every step too.
    """
    found: dict[str, Any] = {}
    for name in CONFIGURATIONS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                trainer = make_trainer(replace(job, configuration=name), folder, None, logging_steps=1)
                trainer.train()
                found[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
            except (ValueError, RuntimeError, TypeError, IndexError, KeyError) as error:
                found[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    channel.say(losses=found)
