from __future__ import annotations

import torch

from tailor.data.examples import Example, Rendering
from tailor.data.records import PromptCompletion
from tailor.evaluation.likelihood import completion_logprobs, packed_logprobs
from tailor.inference.local import LocalBackend
from tailor.models.base import Base
from tailor.models.slots import Slot
from tailor.techniques import LoRA, PromptTuning
from tailor.text.messages import assistant, user
from tiny_models import tiny_base


def by_logits(base: Base, example: Example, slot: Slot | None = None) -> torch.Tensor:
    """The counted tokens' logprobs from one sequence's full logits: the textbook way."""
    logits = base.logits(list(example.token_ids), slot.number if slot else 0).log_softmax(dim=1)
    wanted = [k for k in range(1, len(example.token_ids)) if example.loss_mask[k]]
    return torch.stack([logits[k - 1, example.token_ids[k]] for k in wanted])


def shaken(slot: Slot) -> Slot:
    for parameter in slot.parameters.values():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return slot


def test_packed_logprobs_equal_those_from_logits_for_every_slot() -> None:
    base = tiny_base()
    lora, soft = shaken(base.host.attach([LoRA(rank=2)])), base.host.attach([PromptTuning(num_virtual_tokens=3)])
    done: list[int] = []
    for slot in (None, lora, soft):
        rendering = Rendering(base.renderer, 256, slot.virtual_ids if slot else ())
        rows = [PromptCompletion(prompt="hello" * k, completion="there" * (4 - k)) for k in range(1, 4)]
        examples = [e for e in map(rendering.example, rows) if e is not None]
        found = packed_logprobs(base, slot, examples, tokens_per_batch=40, progress=done.append)
        for example, logprobs in zip(examples, found, strict=True):
            torch.testing.assert_close(logprobs, by_logits(base, example, slot), atol=1e-5, rtol=0)
    assert done[-1] == 3


def test_scores_of_labels_equal_brute_force() -> None:
    base = tiny_base()
    backend = LocalBackend(base, {"mine": shaken(base.host.attach([LoRA(rank=2)]))})
    labels = ["card", "card payment", "fox"]
    prompts = [(user(f"which queue {k}?"),) for k in range(18)]
    for ends in (True, False):
        done: list[int] = []
        scores = completion_logprobs(backend, "mine", prompts, labels, ends=ends, progress=done.append)
        assert (scores.shape, done) == ((18, 3), [16, 18])
        for row in (0, 17):
            for column, label in enumerate(labels):
                rendered = base.renderer.example([*prompts[row], assistant(label)])
                whole = by_logits(base, Example(rendered.token_ids, rendered.loss_mask), backend.slots["mine"])
                expected = float((whole if ends else whole[:-1]).double().sum())
                assert abs(float(scores[row, column]) - expected) < 1e-4
