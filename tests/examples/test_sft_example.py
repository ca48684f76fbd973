"""The trainer against the loop without abstractions: same rows, same updates, same losses."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from tailor.data.examples import Rendering, make_examples
from tailor.data.readers import read_records
from tailor.models.base import load_base
from tailor.objectives.sft import SFT
from tailor.techniques.full import Full
from tailor.training.settings import TrainSettings, resolve_settings
from tailor.training.trainer import SlotRun, Trainer

EXAMPLE = Path(__file__).parents[2] / "examples" / "sft.py"
STEPS = 5


@pytest.fixture(scope="module")
def sft() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sft_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_trainer_takes_the_same_steps(sft: ModuleType, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in sft.ROWS.read_text("utf-8").splitlines()[:24]]
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(map(json.dumps, rows)), "utf-8")

    base = load_base("tailor-nano", device="cpu", dtype="float32")
    examples, _ = make_examples(read_records(few).records, Rendering(base.renderer, base.max_seq_len))
    # a pack smaller than a step: the trainer accumulates over micro-batches, the loop does not
    settings = TrainSettings(num_steps=STEPS, batch_size=4, tokens_per_batch=256, warmup_ratio=0.4)
    defaults = Full.traits.defaults
    assert defaults is not None
    resolved = resolve_settings(settings, defaults, len(examples), base.host.embedding_rms())
    run = SlotRun("full", base.host.attach([Full()]), SFT(), [(e,) for e in examples], [], settings, resolved)
    trainer = Trainer(base, [run])
    drawn, ours, norms = [], [], []
    for _ in range(STEPS):
        drawn.append([examples.index(placed.example) for placed in run.draw()])
        (report,) = trainer.step()
        ours.append(report.loss)
        norms.append(report.grad_norm)

    tokenizer = sft.AutoTokenizer.from_pretrained(sft.BASE)
    model = sft.AutoModelForCausalLM.from_pretrained(sft.BASE, dtype=sft.torch.float32).eval()
    encoded = [sft.encode(tokenizer, row) for row in rows]
    assert encoded == [(list(e.token_ids), list(e.loss_mask)) for e in examples]
    batches = [[encoded[k] for k in step] for step in drawn]
    theirs = sft.train(model, batches, resolved.learning_rate, resolved.warmup_steps)

    assert ours == pytest.approx(theirs, abs=1e-4)
    # the comparison would be empty if nothing moved, or if clipping never came into play
    assert ours[-1] < ours[0] - 0.3
    assert max(norms) > 1.0
