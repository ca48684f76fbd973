"""Many clients at once on `tailor serve`: is every answer whole, its own, and counted?

Makes customizations of tailor-nano in a temporary TAILOR_HOME (prompting, prompt tuning, prefix tuning, IA3, adapter,
LoRA: seeded, moved away from their start, not trained). A first server is asked every prompt of every one of them by a
single client: that is what they answer alone. A second server, in whose memory none of them is yet, then meets all
clients together: streams and whole answers, greedy and sampled, with pauses, departures in the middle of an answer, and
malformed requests. Every greedy answer must be that given alone; after a token whose two best are nearer than 1e-4 it
may go another way (counted as a near-tie). An answer is lost without its end, mixed up when it is another's, truncated
when it is only the beginning of its own. At the end the server's counts must be the sums of what the clients saw, and
nothing may be left in its memory for keys and values.

    python benchmarks/load_test.py [--seconds 120] [--clients 200] [--customizations 20] [--output results.json]

The exit status is 1 when an answer was lost, mixed up, truncated or wrong, when the counts differ, or when the server's
memory grew by more than a twentieth in the second half. Two cores take about four minutes. The clients are on the same
machine: what they compute slows the server down.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load_client import HOST, ask, get
from load_tally import PROMPTS, Key, Known, Tally, doubtful_from, summary

MODEL = "tailor-nano"
CHAT = "/v1/chat/completions"
MOST_REQUESTS = 200_000
# ------------------------------------------------------------------------------------------------ customizations


def make_customizations(home: str, num: int) -> None:
    """Save `num` artifacts, `c0-<kind>` and so on; in a process of its own, so that the clients stay without torch."""
    os.environ["TAILOR_HOME"] = home
    import torch

    from tailor.artifacts.artifact import save
    from tailor.models.base import load_base
    from tailor.techniques.adapter import Adapter
    from tailor.techniques.ia3 import IA3
    from tailor.techniques.lora import LoRA
    from tailor.techniques.prefix_tuning import PrefixTuning
    from tailor.techniques.prompt_tuning import PromptTuning
    from tailor.techniques.prompting import Prompting

    base = load_base(MODEL, dtype="float32")
    kinds = [
        lambda k: Prompting(system=f"You are clerk {k}.", template=f"{chr(65 + k) * 3}: {{prompt}}", shots=0),
        lambda k: PromptTuning(num_virtual_tokens=4 + k, init="random"),
        lambda k: PrefixTuning(num_virtual_tokens=4 + k, init="random"),
        lambda k: IA3(),
        lambda k: Adapter(bottleneck_size=8),
        lambda k: LoRA(rank=4),
    ]
    for k in range(num):
        technique = kinds[k % len(kinds)](k)
        slot = base.host.attach([technique], seed=k)
        state = slot.bake()
        generator = torch.Generator().manual_seed(k)
        with torch.no_grad():
            for parameter in slot.parameters.values():
                spread = parameter.std().item() if parameter.numel() > 1 else 0.0
                parameter.add_(max(spread, 0.1) * torch.randn(parameter.shape, generator=generator))
        save(f"c{k}-{technique.type.replace('_', '-')}", base, slot, [technique], {}, training_state=state)
        base.host.detach(slot)


# ------------------------------------------------------------------------------------------------ the server


@dataclass
class Server:
    """A running `tailor serve`."""

    process: subprocess.Popen[str]
    port: int
    models: list[str]

    def memory(self) -> int:
        """Bytes of its resident memory."""
        told = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        return int(re.findall(r"VmRSS:\s+(\d+) kB", told)[0]) * 1024

    async def metrics(self) -> dict[str, float]:
        """What it counts."""
        lines = (await get(self.port, "/metrics")).decode().splitlines()
        return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


@contextmanager
def serving(home: Path, log: Path, *more: str) -> Iterator[Server]:
    """`tailor serve` on a free port while the block runs, with `more` options; what it says goes to `log`."""
    start = "from tailor.cli.main import main; main()"
    options = ["--port", "0", "--json", "--base", MODEL, "--dtype", "float32", *more]
    with (
        log.open("w", encoding="utf-8") as errors,
        subprocess.Popen(
            [sys.executable, "-c", start, "serve", *options],
            env={**os.environ, "TAILOR_HOME": str(home)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        assert process.stdout is not None
        try:
            if not (line := process.stdout.readline()):
                raise RuntimeError(f"the server did not start: {log.read_text('utf-8')[-2000:]}")
            told = json.loads(line)
            yield Server(process, int(re.findall(r":(\d+)/", told["url"])[0]), told["models"])
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()


# ------------------------------------------------------------------------------------------------ what is known


def body_of(key: Key, **more: Any) -> bytes:
    """A request, greedy if nothing else is said."""
    text, most = PROMPTS[key[1]]
    asked = {"model": key[0], "messages": [{"role": "user", "content": text}], "max_completion_tokens": most}
    return json.dumps({**asked, "temperature": 0, **more}).encode()


async def answers_alone(server: Server) -> dict[Key, Known]:
    """Every prompt of every model, one after the other."""
    known = {}
    for key in [(model, number) for model in server.models for number in range(len(PROMPTS))]:
        answer = await ask(server.port, CHAT, body_of(key, logprobs=True, top_logprobs=2))
        if answer.status != 200 or answer.usage is None or answer.finish_reason is None:
            raise RuntimeError(f"{key}: no answer: {answer}")
        used = answer.usage["prompt_tokens"], answer.usage["completion_tokens"]
        if used[1] != len(answer.tokens) + (answer.finish_reason == "stop"):
            raise RuntimeError(f"{key}: {used[1]} tokens are counted, {len(answer.tokens)} were told")
        known[key] = Known(answer.text, answer.finish_reason, *used, doubtful_from(answer.tokens))
    return known


# ------------------------------------------------------------------------------------------------ the load


def malformed(draw: random.Random) -> tuple[str, bytes, int]:
    """A request that cannot be answered, and the status that it must get."""
    right = json.loads(body_of((MODEL, 0)))
    kinds: list[tuple[str, bytes | dict[str, Any], int]] = [
        (CHAT, b'{"model": "tailor-nano", "messages": [', 400),
        (CHAT, b"", 400),
        (CHAT, {**right, "model": "nobody"}, 404),
        (CHAT, {**right, "temperature": "hot"}, 400),
        (CHAT, {**right, "messages": [{"role": "user", "content": "Hello " * 3000}]}, 400),
        (CHAT, {**right, "messages": []}, 400),
        (CHAT, {**right, "frobnicate": 1}, 400),
        ("/v1/completions", {"model": MODEL, "prompt": [1 << 30]}, 400),
        ("/v1/nothing", {}, 404),
    ]
    path, body, status = draw.choice(kinds)
    return path, body if isinstance(body, bytes) else json.dumps(body).encode(), status


async def act(server: Server, draw: random.Random, tally: Tally) -> None:
    """One request of a client."""
    key = draw.choice(list(tally.known))
    what = draw.random()
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    if what < 0.05:
        path, body, status = malformed(draw)
        answer = await ask(server.port, path, body)
        told = answer.status == status and set(answer.body["error"]) == {"message", "type", "param", "code"}
        tally.asked["malformed"] += 1
        tally.statuses[str(answer.status)] += 1
        tally.outcomes["refused" if told else "wrongly_refused"] += 1
        if not told:
            tally.failures.append(f"{path} {body[:80]!r}: {answer.status} {answer.body}")
    elif what < 0.10:
        tally.count("whole", key, await ask(server.port, CHAT, body_of(key)))
    elif what < 0.20:
        body = body_of(key, **usage, temperature=1, seed=draw.randrange(1 << 30))
        tally.count("sampled", key, await ask(server.port, CHAT, body))
    elif what < 0.30:
        tally.count("departing", key, await ask(server.port, CHAT, body_of(key, **usage), draw.randrange(12)))
    else:
        tally.count("greedy", key, await ask(server.port, CHAT, body_of(key, **usage)))


async def load(server: Server, tally: Tally, seconds: float, num_clients: int, pause: float) -> float:
    """All clients until the time is over and their last answers are there. Returns the seconds that it took."""
    start = time.perf_counter()

    async def client(number: int) -> None:
        draw = random.Random(f"client {number}")
        while time.perf_counter() - start < seconds and tally.asked.total() < MOST_REQUESTS:
            await act(server, draw, tally)
            await asyncio.sleep(min(draw.expovariate(1 / pause), 10 * pause))

    async def watch() -> None:
        while True:
            tally.memory.append((time.perf_counter() - start, server.memory()))
            await asyncio.sleep(1)

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(client(number) for number in range(num_clients)))
    watching.cancel()
    return time.perf_counter() - start


# ------------------------------------------------------------------------------------------------ the sums


async def at_rest(server: Server) -> dict[str, float]:
    """The server's counts when nothing runs any more, or after half a minute."""
    for _ in range(60):
        metrics = await server.metrics()
        ended = sum(metrics[f"tailor_{name}"] for name in ("finished", "cancelled", "failed"))
        if metrics["tailor_requests"] == ended and not metrics["tailor_running"] and not metrics["tailor_waiting"]:
            break
        await asyncio.sleep(0.5)
    return metrics


async def measure(home: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What every model answers alone; then the load."""
    with serving(home, home / "alone.log", "--jobs", "0") as server:
        print(f"{len(server.models)} models at http://{HOST}:{server.port}: asking each alone", flush=True)
        tally = Tally(await answers_alone(server))
    with serving(home, home / "load.log", "--jobs", "0") as server:
        print(f"{options.clients} clients for {options.seconds:g} seconds", flush=True)
        seconds = await load(server, tally, options.seconds, options.clients, options.pause)
        metrics = await at_rest(server)
    tracebacks = (home / "load.log").read_text("utf-8").count("Traceback")
    return summary(tally, seconds, metrics, tracebacks)


def main() -> None:
    """Make the customizations, measure, print and keep what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--customizations", type=int, default=20)
    parser.add_argument("--pause", type=float, default=1.0, help="mean seconds between an answer and the next request")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    loads = {"before": os.getloadavg()}
    with tempfile.TemporaryDirectory(prefix="tailor-load-") as folder:
        making = multiprocessing.get_context("spawn").Process(
            target=make_customizations, args=(folder, options.customizations)
        )
        making.start()
        making.join()
        if making.exitcode:
            sys.exit("the customizations could not be made")
        found = asyncio.run(measure(Path(folder), options))
    loads["after"] = os.getloadavg()
    asked = {name: value for name, value in vars(options).items() if name != "output"}
    print(json.dumps(found, indent=1, ensure_ascii=False))
    if options.output:
        from tailor.machine import describe_machine

        facts = {"machine": {**describe_machine(), "load": loads}, "settings": asked, **found}
        options.output.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")
    sys.exit(1 if found["failed"] else 0)


if __name__ == "__main__":
    main()
