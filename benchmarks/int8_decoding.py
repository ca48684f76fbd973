"""Decoding with weights in 8 bits against the weights' own precision: what it costs in quality, what it gives in speed.

Quality, on tailor-nano in fp32 and bf16: the words of known texts are fed one by one, so that every number comes from a
decoding step; both sides see the same words. `loss` is the mean of -log p (nats a token) with a 95 % interval of the
difference over texts, `same_best` how often the likeliest token is the same. Speed, on random weights too: seconds a
step of 1 and of 16 requests, in turns; figures are medians, ratios those of each turn.

    python benchmarks/int8_decoding.py [--bases nano large] [--texts 64] [--repeats 5] [--threads N] [--output FILE]

The texts are paragraphs of this project's own documentation.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from serve import BASES, Bench, answer, in_turns, make_bench, make_engine, ratios, sequence
from train_worker import num_cores

if TYPE_CHECKING:
    import torch

    from tailor.models.base import Base

# torch is imported inside functions: the number of its threads is set first

DOCS = Path(__file__).parents[1] / "docs"
LENGTH = 48
PROMPT, ANSWER = 64, 32


def paragraphs(base: Base, num: int) -> list[list[int]]:
    """Beginnings of paragraphs of the documentation, LENGTH tokens each."""
    found = []
    for path in sorted(DOCS.glob("*.md")):
        for text in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
            ids = base.tokenizer.encode(text)
            if text[:1].isalpha() and len(ids) >= LENGTH:
                found.append(list(ids[:LENGTH]))
    random.Random(0).shuffle(found)
    if len(found) < num:
        raise SystemExit(f"there are {len(found)} paragraphs of {LENGTH} tokens, not {num}")
    return found[:num]


def forced(base: Base, texts: Sequence[Sequence[int]]) -> torch.Tensor:
    """(texts, LENGTH - 2, V) logprobs behind all words but the first and the last, one step at a time."""
    import torch

    from tailor.data.packing import Segment
    from tailor.models.kv_cache import KVPool, RowCache
    from tailor.models.plan import Plan

    layers, heads, size = base.host.kv_shape
    pool = KVPool(2 * layers * heads * size * base.dtype.itemsize)
    caches = [RowCache(pool) for _ in texts]
    for cache in caches:
        pool.ensure(cache, LENGTH)
    steps = []
    with torch.no_grad():
        for at in range(LENGTH - 1):
            plan = Plan.of([Segment(k, k + 1, position0=at) for k in range(len(texts))], caches=caches)
            with base.host.run(plan):
                ids = torch.tensor([ids[at] for ids in texts])
                hidden = base.hidden(plan, ids, torch.full_like(ids, at))
                steps.append(base.logits_at(plan, hidden, torch.arange(len(texts))).log_softmax(dim=1))
            for cache in caches:
                cache.advance(1)
    return torch.stack(steps[1:], dim=1)


def quality(dtype: str, num: int) -> dict[str, Any]:
    """tailor-nano in a precision, and in 8 bits."""
    import torch

    from tailor.models.base import load_base

    base = load_base("tailor-nano", "cpu", dtype)
    texts = paragraphs(base, num)
    targets = torch.tensor([ids[2:] for ids in texts])[..., None]
    found = {}
    for name, int8 in (("own", False), ("int8", True)):
        base.stepper.use_int8(int8)
        forced(base, texts[:1])  # the first step is the modules' own
        found[name] = forced(base, texts)
    own, int8_ = (-found[name].gather(2, targets)[..., 0].mean(dim=1) for name in ("own", "int8"))
    more = (int8_ - own).double()
    spread = 1.96 * float(more.std()) / len(more) ** 0.5
    return {
        "texts": num,
        "own_loss": float(own.mean()),
        "int8_loss": float(int8_.mean()),
        "more_loss": float(more.mean()),
        "more_loss_interval": [float(more.mean()) - spread, float(more.mean()) + spread],
        "same_best": float((found["own"].argmax(2) == found["int8"].argmax(2)).double().mean()),
    }


def speed(bench: Bench, num: int, repeats: int) -> dict[str, Any]:
    """Seconds a step of `num` requests."""
    prompts = [bench.ids(PROMPT) for _ in range(num)]

    def side(int8: bool) -> float:
        engine = make_engine(bench.base, int8=int8)
        answer(engine, [sequence(None, prompts[0], 3)])  # packs
        return answer(engine, [sequence(None, p, ANSWER) for p in prompts])[1] / (ANSWER - 1)

    found = in_turns({"int8": lambda: side(True), "own": lambda: side(False)}, repeats)
    return {**{f"{name}_seconds": median(times) for name, times in found.items()}, "ratio": ratios(*found.values())}


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="*", default=["nano", "large"], choices=list(BASES))
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    import torch

    torch.set_num_threads(arguments.threads)
    kept: dict[str, Any] = {"threads": arguments.threads, "repeats": arguments.repeats, "torch": torch.__version__}
    kept["quality"] = {dtype: quality(dtype, arguments.texts) for dtype in ("float32", "bfloat16")}
    print("quality", json.dumps(kept["quality"], indent=1))
    for name in arguments.bases:
        bench = make_bench(BASES[name], ())
        kept[name] = {f"batch_{num}": speed(bench, num, arguments.repeats) for num in (1, 16)}
        print(name, json.dumps(kept[name]))
    if arguments.output:
        arguments.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
