"""TRL as an oracle: the same rows through its SFT trainer and ours give the same losses, step by step."""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from tailor.data.examples import Rendering, make_examples
from tailor.data.records import Conversation, PromptCompletion, Record
from tailor.objectives.sft import SFT
from tailor.techniques.full import Full
from tailor.text.messages import Message, assistant, system, user
from tailor.training.settings import TrainSettings, resolve_settings
from tailor.training.trainer import SlotRun, Trainer
from tiny_models import tiny_base, tiny_model

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

ROWS = [
    ("the quick fox", " jumps over"),
    ("hello there", " how are you?"),
    ("the lazy dog and the fox", " over"),
    ("how", " hello there, how are you? the dog"),
]
CHATS: list[tuple[Message, ...]] = [
    (system("Be short."), user("the quick fox"), assistant("jumps over")),
    (user("hello"), assistant("there"), user("how are you?"), assistant("the quick brown fox")),
    (user("lazy dog"), assistant("hello there, how are you?")),
]


def their_losses(rows: list[dict[str, Any]], chat: bool, folder: Path, num_steps: int, rate: float) -> list[Any]:
    """(loss, gradient norm) of every step with all rows in one padded batch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl = pytest.importorskip("trl")
        datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    base = tiny_base(chat=chat)
    config = trl.SFTConfig(
        output_dir=str(folder),
        max_steps=num_steps,
        per_device_train_batch_size=len(rows),
        learning_rate=rate,
        lr_scheduler_type="linear",
        warmup_steps=0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        max_grad_norm=1.0,
    )
    trainer = trl.SFTTrainer(
        model=tiny_model(),
        args=config,
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=copy.deepcopy(base.tokenizer.hf),
    )
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


def our_losses(records: list[Record], chat: bool, num_steps: int, rate: float) -> list[Any]:
    base = tiny_base(chat=chat)
    slot = base.host.attach([Full()])
    examples, _ = make_examples(records, Rendering(base.renderer, base.max_seq_len, trained_turns="last"))
    settings = TrainSettings(
        num_steps=num_steps, learning_rate=rate, schedule="linear", warmup_ratio=0, tokens_per_batch=40
    )
    resolved = resolve_settings(settings, Full.traits.defaults, len(examples), base.host.embedding_rms())
    trainer = Trainer(base, [SlotRun("full", slot, SFT(), [(e,) for e in examples], [], settings, resolved)])
    return [(r.loss, r.grad_norm) for r in (trainer.step()[0] for _ in range(num_steps))]


def same(found: list[Any], expected: list[Any]) -> None:
    assert len(found) == len(expected)
    for (loss, norm), (their_loss, their_norm) in zip(found, expected, strict=True):
        assert loss == pytest.approx(their_loss, abs=1e-4)
        assert norm == pytest.approx(their_norm, abs=2e-3)


@pytest.mark.parametrize("rate", [1e-12, 3e-3])
def test_chats(rate: float, tmp_path: Path) -> None:
    rows = [{"prompt": [m.to_dict() for m in chat[:-1]], "completion": [chat[-1].to_dict()]} for chat in CHATS]
    num_steps = 1 if rate < 1e-6 else 3
    expected = their_losses(rows, True, tmp_path, num_steps, rate)
    same(our_losses([Conversation(messages=chat) for chat in CHATS], True, num_steps, rate), expected)


def test_prompts_and_completions_without_a_chat_template(tmp_path: Path) -> None:
    expected = their_losses([{"prompt": p, "completion": c} for p, c in ROWS], False, tmp_path, 2, 3e-3)
    same(our_losses([PromptCompletion(prompt=p, completion=c) for p, c in ROWS], False, 2, 3e-3), expected)
    assert torch.isfinite(torch.tensor(expected)).all()
