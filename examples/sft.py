"""Supervised fine-tuning of every weight, without abstractions: torch and transformers only, padding and all.

    python examples/sft.py

A test holds tailor's trainer to the losses of this loop (tests/examples/test_sft_example.py), so what happens between
a row and an update can be read here in one place. `tailor tune` does the same without padding, and much more besides.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

PACKAGE = Path(__file__).parents[1] / "src" / "tailor"
BASE = PACKAGE / "models" / "embedded"
ROWS = PACKAGE / "data" / "sample" / "tickets.jsonl"


def encode(tokenizer: Any, row: dict[str, str]) -> tuple[list[int], list[int]]:
    """Token ids of a row, and 1 where the loss counts: the completion and the token that ends it."""
    turns = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    turns.append({"role": "assistant", "content": row["completion"]})
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    completion_ids = tokenizer(whole[len(prompt) :], add_special_tokens=False)["input_ids"]
    return prompt_ids + completion_ids, [0] * len(prompt_ids) + [1] * len(completion_ids)


def batch_loss(model: Any, encoded: list[tuple[list[int], list[int]]]) -> torch.Tensor:
    """Mean cross-entropy over the counted tokens of all rows, padded on the right."""
    width = max(len(ids) for ids, _ in encoded)
    input_ids = torch.tensor([ids + [0] * (width - len(ids)) for ids, _ in encoded])
    attention_mask = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in encoded])
    counted = torch.tensor([mask + [0] * (width - len(mask)) for _, mask in encoded]).bool()
    logits = model(input_ids=input_ids, attention_mask=attention_mask).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits[counted[:, 1:]], input_ids[:, 1:][counted[:, 1:]])


def train(model: Any, batches: list[list[tuple[list[int], list[int]]]], peak: float, warmup_steps: int) -> list[float]:
    """One AdamW step per batch; warm-up to `peak`, then half a cosine to zero. Returns the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0)
    losses = []
    for step, encoded in enumerate(batches):
        progress = (step - warmup_steps) / max(1, len(batches) - warmup_steps)
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        optimizer.param_groups[0]["lr"] = peak * ((step + 1) / warmup_steps if step < warmup_steps else cosine)
        loss = batch_loss(model, encoded)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Sixty steps on the sample rows; prints the losses and one answer."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    rows = [json.loads(line) for line in ROWS.read_text("utf-8").splitlines()]
    encoded = [encode(tokenizer, rows[k]) for k in torch.randint(len(rows) - 1, (60 * 8,)).tolist()]
    losses = train(model, [encoded[k : k + 8] for k in range(0, len(encoded), 8)], peak=5e-4, warmup_steps=6)
    print("loss:", " ".join(f"{loss:.2f}" for loss in losses[::6]), f"{losses[-1]:.2f}")
    ids, mask = encode(tokenizer, rows[-1])  # the row that was kept out
    prompt = torch.tensor([ids[: mask.index(1)]])
    answer = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=64,
        do_sample=False,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|end|>"),
        pad_token_id=tokenizer.pad_token_id,
    )
    print(f"{rows[-1]['prompt']}\n→ {tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
