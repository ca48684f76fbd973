"""The fixed runs behind the golden files: three steps of each technique, with its defaults, on the embedded base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tailor.data.examples import make_examples
from tailor.data.records import PromptCompletion
from tailor.models.base import Base
from tailor.objectives.sft import SFT
from tailor.techniques import TECHNIQUES
from tailor.training.settings import TrainSettings, resolve_settings
from tailor.training.trainer import SlotRun, Trainer, mean_loss

FOLDER = Path(__file__).parent
TOLERANCE = 1e-4
ROWS = [
    PromptCompletion(prompt=prompt, completion=completion)
    for prompt, completion in (
        ("My parcel is a week late.", "Queue: delivery. We are sorry; a courier will call you today."),
        ("I was charged twice for one order.", "Queue: billing. The second charge goes back to your card."),
        ("How do I reset my password?", "Queue: account. Choose 'forgot password' and follow the letter we send."),
        ("The kettle arrived broken.", "Queue: returns. Keep the box; we will bring you a new one."),
        ("Can I change the address of my order?", "Queue: delivery. Yes, until it has left our house."),
        ("Your app closes when I open it.", "Queue: technical. Please tell us which telephone you use."),
    )
]


SETTINGS: dict[str, dict[str, Any]] = {"new_tokens": {"tokens": ["courier", "kettle", "telephone"]}}
"""Settings of techniques that have none by default."""


def path(technique: str) -> Path:
    """Where the golden file of a technique is."""
    return FOLDER / f"sft-{technique}.json"


def golden_run(base: Base, technique: str, pinned: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Losses of three steps of four rows and gradient norms; a technique that trains nothing has a loss only.

    Settings and learning rate are those of `pinned` (a golden file, so that better defaults break none), or the
    technique's defaults. A `full` run changes the base: give it a fresh one.
    """
    kind: Any = TECHNIQUES[technique]
    prepared = kind(**pinned["settings"]) if pinned else kind(**SETTINGS.get(technique, {})).prepare(ROWS, seed=0)
    slot = base.host.attach([prepared], seed=0)
    rendering = base.rendering(slot)
    examples, _ = make_examples(ROWS, rendering)
    bundles = [(example,) for example in examples]
    found: dict[str, Any] = {
        "settings": prepared.model_dump(mode="json"),
        "num_parameters": slot.num_parameters,
        "loss_before": mean_loss(base, slot, SFT(), bundles, 4096),
    }
    if kind.traits.defaults is not None:
        rate = pinned["learning_rate"] if pinned else None
        settings = TrainSettings(num_steps=3, batch_size=4, schedule="constant", warmup_ratio=0, learning_rate=rate)
        resolved = resolve_settings(settings, kind.traits.defaults, len(examples), base.host.embedding_rms())
        trainer = Trainer(base, [SlotRun(technique, slot, SFT(), bundles, [], settings, resolved)])
        reports = [trainer.step()[0] for _ in range(3)]
        found |= {
            "learning_rate": resolved.learning_rate,
            "losses": [r.loss for r in reports],
            "grad_norms": [r.grad_norm for r in reports],
            "loss_after": mean_loss(base, slot, SFT(), bundles, 4096),
        }
    base.host.detach(slot)
    return found


def read(technique: str) -> dict[str, Any]:
    """The golden numbers of a technique."""
    return json.loads(path(technique).read_text())  # type: ignore[no-any-return]
