"""Serving: mixed batches against plain ones, and tailor's engine against transformers and PEFT, in one process.

Requests have random token ids and answers of fixed lengths; nobody stops early. All sides answer the same requests, are
warmed up, and take turns; figures are medians over the repeats, ratios those of each turn.

    mixed     16 requests (2 plain, 2 prompting, 2 prompt tuning, 2 prefix tuning, 2 IA3, 2 adapter, 4 LoRA rank 8 on q
              and v) over 16 plain ones: tokens a second in prefill and in decoding
    loras     16 requests of 8 LoRAs (rank 8, q and v) against PEFT's mixed batch (`adapter_names`)
    lengths   16 requests with answers of 8 to 64 tokens against `generate` on the padded batch, and against
              transformers' continuous batching where it runs
    single    one request at a time: seconds per token over the time that reading the weights takes (the floor, measured
              by summing a tensor of that size)
    shots     seconds to the first token of a request behind 512 tokens of shots, after another with the same shots,
              over those of a request without shots

    python benchmarks/serve.py [--bases nano large] [--cases mixed ...] [--repeats 5] [--threads N] [--output FILE]

`nano` is tailor-nano in fp32, `large` a random 135M Llama shape in bf16, `billion` a random 1.1B one (2.2 GB).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from train_worker import TINY, WORKLOADS, Workload, llama, make_model, num_cores

if TYPE_CHECKING:
    from tailor.inference.engine import Engine
    from tailor.inference.scheduler import Running
    from tailor.models.base import Base
    from tailor.models.slots import Slot

# torch is imported inside functions: the number of its threads is set first

BASES = {
    "tiny": TINY["b"],
    "nano": WORKLOADS["c"],
    "large": WORKLOADS["a"],
    "billion": Workload("1B", "1.1B Llama shape, random", "bfloat16", 1, 1, llama(2048, 22, 32, 4, 5632, 32000)),
}
PROMPT, ANSWER = 128, 32
NUM = 16
SHOTS, QUESTION = 512, 32

PATIENCE = 5.0
"""Seconds from which a peer is measured once only, and without a warm-up."""


@dataclass
class Bench:
    """A base with its customizations, and the transformers model under it."""

    model: Any
    base: Base
    mixed: list[Slot | None]
    loras: list[Slot]
    draw: random.Random = field(default_factory=lambda: random.Random(0))

    @cached_property
    def engine(self) -> Engine:
        """One for all cases, as in a server: its memory for keys and values is taken once."""
        return make_engine(self.base)

    def ids(self, num: int) -> list[int]:
        """So many random tokens."""
        return [self.draw.randrange(3, self.base.host.embedding_shape()[0]) for _ in range(num)]


def make_bench(workload: Workload, kinds: Sequence[str]) -> Bench:
    """Load the base and attach what the cases need, away from where attaching leaves it."""
    import torch

    from tailor.models.base import wrap_model
    from tailor.models.files import resolve
    from tailor.techniques.adapter import Adapter
    from tailor.techniques.ia3 import IA3
    from tailor.techniques.lora import LoRA
    from tailor.techniques.prefix_tuning import PrefixTuning
    from tailor.techniques.prompt_tuning import PromptTuning
    from tailor.techniques.prompting import Prompting
    from tailor.text.tokenizer import load_tokenizer

    model = make_model(workload)
    base = wrap_model(model, load_tokenizer(resolve("tailor-nano")), torch.device("cpu"))
    lora = LoRA(rank=8, target_modules="query-value")
    pairs = [
        Prompting(system="Be short.", shots=0),
        PromptTuning(num_virtual_tokens=20, init="random"),
        PrefixTuning(num_virtual_tokens=20, init="random"),
        IA3(),
        Adapter(),
    ]
    techniques = [t for pair in pairs for t in (pair, pair)] + [lora] * 4

    def attach(technique: Any, seed: int) -> Slot:
        slot = base.host.attach([technique], seed=seed)
        slot.bake()
        with torch.no_grad():
            for parameter in slot.parameters.values():
                parameter.add_(0.01 * torch.randn_like(parameter))
        return slot

    mixed: list[Slot | None] = [None, None]
    if "mixed" in kinds:
        mixed += [attach(technique, k) for k, technique in enumerate(techniques)]
    loras = [attach(lora, 100 + k) for k in range(8)] if "loras" in kinds else []
    return Bench(model, base, mixed, loras)


def sequence(slot: Slot | None, ids: Sequence[int], num_new: int) -> Running:
    """A request for a slot."""
    from tailor.inference.backend import SamplingParams
    from tailor.inference.scheduler import Running

    lead = slot.virtual_ids if slot else ()
    return Running([*lead, *ids], slot.number if slot else 0, SamplingParams(max_new_tokens=num_new, ignore_stop=True))


def make_engine(base: Base, *, int8: bool = False) -> Engine:
    """An engine that computes every prompt, each in one pass."""
    from tailor.inference.engine import Engine, EngineSettings

    return Engine(base, (), EngineSettings(tokens_per_pass=1 << 14, max_prefix_bytes=0, int8=int8))


def answer(engine: Engine, batch: Sequence[Running]) -> tuple[float, float]:
    """Seconds until every request has its first token, and from then on until the last has ended."""
    for request in batch:
        engine.add(request)
    start = time.perf_counter()
    while not all(request.token_ids for request in batch):
        engine.step()
    first = time.perf_counter()
    while not engine.idle:
        engine.step()
    return first - start, time.perf_counter() - first


def in_turns(sides: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[Any]]:
    """What each side returns, one after the other, after a warm-up of each; the order changes from turn to turn."""
    for side in sides.values():
        side()
    found: dict[str, list[Any]] = {name: [] for name in sides}
    for turn in range(repeats):
        names = list(sides) if turn % 2 == 0 else list(sides)[::-1]
        for name in names:
            found[name].append(sides[name]())
    return found


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of theirs over ours, turn by turn: above 1, ours is quicker."""
    return median(b / a for a, b in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------------ cases


def mixed(bench: Bench, repeats: int) -> dict[str, Any]:
    """A mixed batch over a plain one."""
    prompts = [bench.ids(PROMPT) for _ in range(NUM)]

    def side(slots: Sequence[Slot | None]) -> Callable[[], tuple[float, float]]:
        def run() -> tuple[float, float]:
            pairs = zip(slots, prompts, strict=True)
            return answer(bench.engine, [sequence(slot, ids, ANSWER) for slot, ids in pairs])

        return run

    found = in_turns({"plain": side([None] * NUM), "mixed": side(bench.mixed)}, repeats)
    virtual = sum(len(slot.virtual_ids) for slot in bench.mixed if slot)
    share = 1 + virtual / (NUM * PROMPT)  # virtual tokens pass through the model too
    return {
        "plain_prefill_tokens_per_second": NUM * PROMPT / median(first for first, _ in found["plain"]),
        "plain_decode_tokens_per_second": NUM * (ANSWER - 1) / median(rest for _, rest in found["plain"]),
        "prefill_ratio": share * ratios(*([first for first, _ in found[name]] for name in ("mixed", "plain"))),
        "decode_ratio": ratios(*([rest for _, rest in found[name]] for name in ("mixed", "plain"))),
    }


def loras(bench: Bench, repeats: int) -> dict[str, Any]:
    """Eight LoRAs in one batch: tailor's engine and PEFT's generate."""
    import torch
    from peft import LoraConfig, get_peft_model

    prompts = torch.tensor([bench.ids(PROMPT) for _ in range(NUM)])
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = get_peft_model(make_model_like(bench), config, adapter_name="0")
    for k in range(1, 8):
        theirs.add_adapter(str(k), config)
    theirs.eval()
    names = [str(k % 8) for k in range(NUM)]

    def peft() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            mask = torch.ones_like(prompts)
            length = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER}
            theirs.generate(input_ids=prompts, attention_mask=mask, adapter_names=names, do_sample=False, **length)
        return time.perf_counter() - start

    def tailor() -> float:
        batch = [sequence(bench.loras[k % 8], ids, ANSWER) for k, ids in enumerate(prompts.tolist())]
        return sum(answer(bench.engine, batch))

    found = in_turns({"tailor": tailor, "peft": peft}, repeats)
    return {**{f"{name}_seconds": median(times) for name, times in found.items()}, "ratio": ratios(*found.values())}


def make_model_like(bench: Bench) -> Any:
    """The stock transformers model with the same weights, its own attention and no hooks of ours."""
    import copy

    import transformers

    config = copy.deepcopy(bench.model.config)
    config._attn_implementation = "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=bench.base.dtype)
    plain = {name.replace(".base.", "."): value for name, value in bench.model.state_dict().items()}
    model.load_state_dict(plain, strict=False)
    return model.eval()


def lengths(bench: Bench, repeats: int) -> dict[str, Any]:
    """Unequal prompts and answers: continuous batching against a static batch, which runs until the longest ends."""
    import torch

    model = make_model_like(bench)
    prompts = [bench.ids(32 + 96 * k // (NUM - 1)) for k in range(NUM)]
    answers = [8 + 56 * (7 * k % NUM) // (NUM - 1) for k in range(NUM)]
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])

    def static() -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            most = max(answers)
            model.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=most, min_new_tokens=most
            )
        return time.perf_counter() - start

    def tailor() -> float:
        return sum(answer(bench.engine, [sequence(None, p, n) for p, n in zip(prompts, answers, strict=True)]))

    sides: dict[str, Callable[[], float]] = {"tailor": tailor, "generate": static}
    told: dict[str, Any] = {}
    try:
        once = continuous(model, prompts, answers)
        if once < PATIENCE:
            sides["continuous"] = lambda: continuous(model, prompts, answers)
        else:
            told["continuous_seconds_of_one_run"] = once
    except Exception as error:  # what it needs differs from version to version
        told["continuous"] = f"does not run here: {type(error).__name__}: {str(error)[:120]}"
    found = in_turns(sides, repeats)
    told |= {f"{name}_seconds": median(times) for name, times in found.items()}
    return told | {f"ratio_{name}": ratios(found["tailor"], found[name]) for name in list(sides)[1:]}


def continuous(model: Any, prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> float:
    """Seconds of transformers' continuous batching; it takes one length of answers for all, the longest."""
    from transformers import GenerationConfig

    config = GenerationConfig(max_new_tokens=max(answers), do_sample=False, eos_token_id=-1, use_cuda_graph=False)
    start = time.perf_counter()
    results = model.generate_batch(inputs=[list(p) for p in prompts], generation_config=config)
    if len(results) != len(prompts):
        raise RuntimeError(f"{len(results)} of {len(prompts)} answers came back")
    return time.perf_counter() - start


def single(bench: Bench, repeats: int) -> dict[str, Any]:
    """One request: seconds per token, and the floor."""
    import torch

    weights = sum(p.nbytes for p in bench.base.model.parameters())
    read = torch.ones(weights // 4)

    def floor() -> float:
        start = time.perf_counter()
        read.sum()
        return time.perf_counter() - start

    def tailor() -> float:
        return answer(bench.engine, [sequence(None, bench.ids(PROMPT), ANSWER)])[1] / (ANSWER - 1)

    found = in_turns({"tailor": tailor, "floor": floor}, repeats)
    share = median(b / a for a, b in zip(found["tailor"], found["floor"], strict=True))
    return {
        "weight_bytes": weights,
        "seconds_per_token": median(found["tailor"]),
        "floor_seconds": median(found["floor"]),
        "floor_bytes_per_second": weights / median(found["floor"]),
        "share_of_floor": share,
    }


def shots(bench: Bench, repeats: int) -> dict[str, Any]:
    """The first token behind shots that are known, and without shots."""
    from tailor.inference.engine import Engine

    engine = Engine(bench.base, ())
    lead = bench.ids(SHOTS)

    def first(ids: Sequence[int]) -> float:
        request = sequence(None, ids, 1)
        start = time.perf_counter()
        engine.run([request])
        return time.perf_counter() - start

    cold = first([*lead, *bench.ids(QUESTION)])
    sides = {"shots": lambda: first([*lead, *bench.ids(QUESTION)]), "zero": lambda: first(bench.ids(QUESTION))}
    found = in_turns(sides, max(repeats, 9))
    return {
        "first_request_seconds": cold,
        **{f"{name}_seconds": median(times) for name, times in found.items()},
        "ratio": ratios(found["zero"], found["shots"]),
    }


CASES: dict[str, Callable[[Bench, int], dict[str, Any]]] = {
    "mixed": mixed,
    "loras": loras,
    "lengths": lengths,
    "single": single,
    "shots": shots,
}


def main() -> None:
    """Run the cases on the bases, print and keep what they give."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bases", nargs="+", default=["nano", "large"], choices=list(BASES))
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=num_cores())
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    import torch

    torch.set_num_threads(arguments.threads)
    kept: dict[str, Any] = {"threads": arguments.threads, "repeats": arguments.repeats, "torch": torch.__version__}
    for name in arguments.bases:
        bench = make_bench(BASES[name], arguments.cases)
        for case in arguments.cases:
            found = CASES[case](bench, arguments.repeats)
            kept.setdefault(name, {})[case] = found
            print(name, case, json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in found.items()}))
            if arguments.output:
                arguments.output.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
