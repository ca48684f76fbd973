"""ask.py of a hand-over to vLLM: ask a customization by name, adding what the server does not have of it.

    python ask.py NAME "Where is my parcel?" [--system TEXT] [--max-tokens 256] [--temperature 0] [--url URL]

Prompting adds its messages here. A soft prompt sends embeddings instead of tokens: its own rows, then those of the
prompt's tokens, as vLLM's `prompt_embeds` takes them (a tensor saved by torch, in base64); that needs torch and
safetensors. The others need Python alone.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

Json = dict[str, Any]
FOLDER = Path(__file__).parent


def post(url: str, body: Json, key: str | None) -> Json:
    """The server's answer. Ends the program with what the server says of a bad request."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as response:
            found: Json = json.load(response)
            return found
    except urllib.error.HTTPError as error:
        sys.exit(f"{error.code}: {error.read(2000).decode('utf-8', 'replace')}")
    except OSError as error:
        sys.exit(f"{url}: {error}")


def composed(prompting: Json | None, question: str, system: str | None) -> list[dict[str, str]]:
    """The turns that the model is shown: system text, worked examples, then the question in its template."""
    prompting = prompting or {"system": None, "template": "{prompt}", "shots": 0, "examples": []}
    texts = [text for text in (prompting["system"], system) if text]
    turns = [{"role": "system", "content": "\n\n".join(texts)}] if texts else []
    shots = [shot for shot in prompting["examples"] if shot["prompt"] != question][: prompting["shots"]]
    for shot in shots:
        turns.append({"role": "user", "content": prompting["template"].replace("{prompt}", shot["prompt"])})
        turns.append({"role": "assistant", "content": shot["answer"]})
    return [*turns, {"role": "user", "content": prompting["template"].replace("{prompt}", question)}]


def plain_text(turns: list[dict[str, str]]) -> str:
    """The turns for a base without a chat template: all but the last user's are followed by a blank line."""
    ends = ["" if turn["role"] == "user" else "\n\n" for turn in turns[:-1]]
    return "".join(turn["content"] + end for turn, end in zip(turns, [*ends, ""], strict=True))


def embeddings(model: Json, token_ids: list[int]) -> str:
    """The soft prompt's rows and those of the tokens, (T, hidden), as `prompt_embeds`."""
    import torch
    from safetensors import safe_open

    soft = model["soft"]
    with safe_open(FOLDER / soft["rows"], "pt") as file:
        rows = file.get_tensor("prompt_embeddings")
    with safe_open(FOLDER / soft["words"], "pt") as file:
        words = file.get_slice("weight")
        found = [words[token : token + 1] for token in token_ids]
    buffer = io.BytesIO()
    torch.save(torch.cat([rows, *found]), buffer)
    return base64.b64encode(buffer.getvalue()).decode()


def said(model: Json, url: str, options: argparse.Namespace) -> str:
    """The answer's text."""
    turns = composed(model["prompting"], options.question, options.system)
    body: Json = {"model": model["model"], "max_tokens": options.max_tokens, "temperature": options.temperature}
    body["stop_token_ids"] = model["stop_token_ids"]
    asked: Json = {"prompt": plain_text(turns)} if model["plain"] else {"messages": turns}
    if model["soft"] is None:
        if "messages" in asked:
            answer = post(f"{url}/chat/completions", {**body, **asked}, options.api_key)
            return str(answer["choices"][0]["message"]["content"])
        return str(post(f"{url}/completions", {**body, **asked}, options.api_key)["choices"][0]["text"])
    tokens = post(f"{url.removesuffix('/v1')}/tokenize", {"model": model["model"], **asked}, options.api_key)["tokens"]
    body["prompt_embeds"] = embeddings(model, tokens)  # no "prompt" beside it: an empty one is a 400
    return str(post(f"{url}/completions", body, options.api_key)["choices"][0]["text"])


def main(arguments: list[str] | None = None) -> int:
    """Ask and print."""
    models = json.loads((FOLDER / "models.json").read_text("utf-8"))
    parser = argparse.ArgumentParser(description="Ask a customization that vLLM serves.")
    parser.add_argument("name", choices=sorted(models))
    parser.add_argument("question")
    parser.add_argument("--system", help="a system text of your own, after the customization's")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--url", help="where the server is, ending in /v1, when not where serve.sh puts it")
    parser.add_argument("--api-key", default=os.environ.get("VLLM_API_KEY"))
    options = parser.parse_args(arguments)
    model = models[options.name]
    print(said(model, (options.url or model["url"]).rstrip("/"), options))
    return 0


if __name__ == "__main__":
    sys.exit(main())
