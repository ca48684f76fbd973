"""check.py of a hand-over to vLLM: whether every customization answers there as it did where it was made.

    python check.py [--server NAME] [--url URL] [--wait SECONDS] [--tolerance 0.1]

It needs Python alone. Each model is asked the probes of expected.json, greedily, and must give the logprobs that tailor
computed; a LoRA whose names fit no module is served as the base without a word, so it must also differ from the base.
Exit code 0: all as expected; 1: something is not; 2: a server cannot be reached.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

Json = dict[str, Any]

SAME = 1e-3
"""Logprobs that differ by less come from the same weights."""


class Unreachable(Exception):
    """Nobody answers, or not as a server of this protocol does."""


class Refusal(Exception):
    """The server says no; the text is its own."""


def ask(url: str, body: Json | None, key: str | None, timeout: float = 300.0) -> Json:
    """One request: POST with a body, GET without."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=timeout) as response:
            found = json.load(response)
    except urllib.error.HTTPError as error:
        raise Refusal(f"{error.code}: {error.read(2000).decode('utf-8', 'replace')}") from error
    except (OSError, ValueError) as error:
        raise Unreachable(f"{url}: {error}") from error
    if not isinstance(found, dict):
        raise Unreachable(f"{url}: no JSON object")
    return found


def served(url: str, key: str | None, wait: float) -> set[str]:
    """The models of a server, waiting for it to come up."""
    until = time.monotonic() + wait
    while True:
        try:
            return {str(model["id"]) for model in ask(f"{url}/models", None, key, 10.0)["data"]}
        except Unreachable:
            if time.monotonic() >= until:
                raise
            time.sleep(min(2.0, max(until - time.monotonic(), 0.0)))


def answer(url: str, model: str, probe: Json, key: str | None, plain: bool = False) -> Json:
    """What `model` says to a probe: tokens and logprobs. `plain` leaves its virtual tokens away."""
    body: Json = {"model": model, "max_tokens": len(probe["logprobs"]), "temperature": 0, "logprobs": 1}
    if probe.get("prompt_embeds") and not plain:
        body["prompt_embeds"] = probe["prompt_embeds"]  # no "prompt" beside it: an empty one is a 400
    else:
        body["prompt"] = probe["prompt"]
    try:
        found = ask(f"{url}/completions", {**body, "return_tokens_as_token_ids": True}, key)
    except Refusal:  # a server that knows OpenAI's fields only
        found = ask(f"{url}/completions", body, key)
    logprobs = found["choices"][0]["logprobs"]
    return {"tokens": logprobs["tokens"], "logprobs": logprobs["token_logprobs"]}


def same_token(token: str, expected: Json, place: int) -> bool:
    """Whether a token is the expected one, by its id; a server that tells texts alone is judged by its logprobs."""
    name = "token_id:"
    return not token.startswith(name) or token[len(name) :] == str(expected["token_ids"][place])


def difference(found: Json, expected: Json, tie: float) -> float:
    """Mean |difference| of logprobs up to the first other token; infinite when that was no near-tie.

    In a near-tie the other token is the next likeliest, and its logprob is known by the gap.
    """
    total, count = 0.0, 0
    for place, (token, logprob) in enumerate(zip(found["tokens"], found["logprobs"], strict=False)):
        if place >= len(expected["logprobs"]):
            break
        same = same_token(token, expected, place)
        gap = 0.0 if same else expected["gaps"][place]
        if gap > tie:
            return math.inf
        total, count = total + abs(logprob - (expected["logprobs"][place] - gap)), count + 1
        if not same:
            break
    return total / count if count else 0.0


def apart(one: Json, other: Json) -> float:
    """Largest |difference| of logprobs between two answers of one server; infinite when a token differs."""
    if one["tokens"] != other["tokens"]:
        return math.inf
    return max((abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"], strict=True)), default=0.0)


def stored_apart(probe: Json) -> float:
    """How far the customization was from its base where it was made, at most 1."""
    base = probe["base"]
    if base["token_ids"] != probe["token_ids"]:
        return 1.0
    distances = [abs(float(a - b)) for a, b in zip(base["logprobs"], probe["logprobs"], strict=True)]
    return min(1.0, max(distances))


def as_base(url: str, server: Json, model: Json, answers: list[Json], key: str | None) -> bool:
    """Whether the answers are the base's own: asked beside it, or (a merged model) as tailor computed them."""
    for probe, found in zip(model["probes"], answers, strict=True):
        wanted = stored_apart(probe)
        if wanted <= SAME:
            continue
        if server["base"] is not None:
            base = answer(url, server["base"], probe, key, plain=True)
            distance = apart(found, base)
        else:
            distance = difference(found, probe["base"], tie=0.0)
        if distance > max(SAME, 0.1 * wanted):
            return False
    return True


def other_prompt(url: str, model: Json, key: str | None) -> str | None:
    """What is wrong with the server's chat template; None when it makes the tokens that were trained on."""
    for probe in model["probes"]:
        asked = {"prompt": probe["text"]} if probe["text"] is not None else {"messages": probe["messages"]}
        try:
            found = ask(f"{url.removesuffix('/v1')}/tokenize", {"model": model["model"], **asked}, key)["tokens"]
        except Refusal:
            return None  # a server without that route
        if found != probe["prompt"]:
            return f"its chat template makes other tokens of a prompt ({len(found)}, tailor's {len(probe['prompt'])})"
    return None


def check(url: str, server: Json, model: Json, key: str | None, tolerance: float) -> list[str]:
    """What is wrong with one customization; nothing when it answers as it should."""
    try:
        answers = [answer(url, model["model"], probe, key) for probe in model["probes"]]
    except Refusal as error:
        return [f"it does not answer: {error}"]
    wrong = []
    if model["differs"] and as_base(url, server, model, answers, key):
        wrong.append("it answers as the base does: its weights are not in use (do the module names fit?)")
    worst = max(difference(a, p, tie=3 * tolerance) for a, p in zip(answers, model["probes"], strict=True))
    if worst > tolerance:
        told = "other tokens" if math.isinf(worst) else f"logprobs that are {worst:.3f} away"
        wrong.append(f"it gives {told} (tolerance {tolerance})")
    if template := other_prompt(url, model, key):
        wrong.append(template)
    return wrong


def check_server(server: Json, options: argparse.Namespace, tolerance: float) -> int:
    """Print a line for each model of one server; returns how many are not as expected."""
    url = (options.url or server["url"]).rstrip("/")
    models = served(url, options.api_key, options.wait)
    failed = 0
    for model in server["models"]:
        missing = model["model"] not in models
        wrong = ["the server does not list it"] if missing else check(url, server, model, options.api_key, tolerance)
        failed += bool(wrong)
        near = model["differs"] is False
        told = "; ".join(wrong) or ("ok (too near its base to be told from it)" if near else "ok")
        print(f"{'FAIL' if wrong else 'ok  '} {model['name']} at {url}: {told}")
    return failed


def main(arguments: list[str] | None = None) -> int:
    """Check the servers of expected.json; returns the exit code."""
    parser = argparse.ArgumentParser(description="Ask every model its probes and compare with expected.json.")
    parser.add_argument("--server", help="check this one alone")
    parser.add_argument("--url", help="where that server is, ending in /v1, when not where serve.sh puts it")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a server to come up")
    parser.add_argument("--tolerance", type=float, help="nats that mean logprobs may differ by")
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"))
    options = parser.parse_args(arguments)
    expected = json.loads(Path(__file__).with_name("expected.json").read_text("utf-8"))
    servers = [s for s in expected["servers"] if options.server in (None, s["name"])]
    if not servers or (options.url and len(servers) > 1):
        names = ", ".join(server["name"] for server in expected["servers"])
        print(f"name one of the servers with --server: {names}", file=sys.stderr)
        return 2
    tolerance = options.tolerance if options.tolerance is not None else expected["tolerance"]
    try:
        return int(sum([check_server(server, options, tolerance) for server in servers]) > 0)
    except (Unreachable, Refusal) as error:
        print(f"FAIL {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
