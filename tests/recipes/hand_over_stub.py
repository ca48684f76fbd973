"""vLLM's protocol over stock transformers, for tests: what v0.32 does with LoRA files and prompt embeddings.

The rules are those of its sources and were met by the real server: which LoRA files it refuses and which it passes over
without a word, and which requests are a 400. A LoRA is read as v0.27 reads it: r, lora_alpha and use_rslora, and no
patterns.
"""

from __future__ import annotations

import base64
import importlib.util
import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tailor.recipes.hand_over import HandOver
from tailor.recipes.hand_over_files import Server

PREFIX = "base_model.model."
PACKED_WHOLE = ("phi3",)
"""Architectures whose packed layers take a LoRA as they are; elsewhere vLLM knows their parts by name only."""
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Refused(Exception):
    """What vLLM would say no to: at the start of the server, or with a 400."""


@dataclass
class VLLM:
    """One server: models by name, the tokenizer, and how it goes wrong."""

    models: dict[str, Any]
    tokenizer: Any
    url: str = ""
    openai_only: bool = False
    takes_embeddings: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)


def loaded(folder: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager").eval()


def known_targets(model: Any) -> set[str]:
    """Last names of the layers that a LoRA may be for."""
    names = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if model.config.model_type not in PACKED_WHOLE:
        names = {part for name in names for part in PARTS.get(name, (name,))}
    return names - {"lm_head"}


def check_lora(config: dict[str, Any], names: set[str], known: set[str], max_rank: int) -> None:
    """Raise Refused as vLLM does for an adapter's configuration and the names of its tensors."""
    start = config.get("init_lora_weights", True)
    odd = {
        "modules_to_save": config.get("modules_to_save"),
        "use_dora": config.get("use_dora"),
        "lora_bias": config.get("lora_bias"),
        "bias": config.get("bias", "none") != "none",
        "init_lora_weights": isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"),
        "rank": max([config["r"], *config.get("rank_pattern", {}).values()]) > max_rank,
        "target": {name.rpartition(".lora_")[0].rpartition(".")[2] for name in names} - known,
    }
    if any(odd.values()):
        raise Refused(f"{[name for name, found in odd.items() if found]} of {config}")


def with_lora(base: str | Path, adapter: Path, max_rank: int) -> Any:
    """The base with an adapter folded in; tensors of known last names that fit no module change nothing."""
    model = loaded(base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    check_lora(config, set(load_file(adapter / "adapter_model.safetensors")), known_targets(model), max_rank)
    scale = config["lora_alpha"] / (config["r"] ** 0.5 if config["use_rslora"] else config["r"])
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, module in model.named_modules():
            a, b = (tensors.get(f"{PREFIX}{name}.lora_{part}.weight") for part in "AB")
            if a is not None and b is not None:
                assert a.shape[0] == b.shape[1] <= config["r"]
                module.weight += scale * (b @ a)
    return model


@contextmanager
def vllm(folder: Path, server: Server) -> Iterator[VLLM]:
    """A server of a hand-over, started as its command line says."""
    place = server.model if Path(server.model).is_absolute() else folder / server.model
    words = server.options()
    models = {server.name: loaded(place)}
    for word in words:
        name, equals, path = word.partition("=")
        if equals:
            models[name] = with_lora(place, folder / path, int(words[words.index("--max-lora-rank") + 1]))
    stub = VLLM(models, AutoTokenizer.from_pretrained(str(place)), takes_embeddings="--enable-prompt-embeds" in words)
    listening = ThreadingHTTPServer(("127.0.0.1", 0), _handler(stub))
    stub.url = f"http://127.0.0.1:{listening.server_address[1]}/v1"
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield stub
    finally:
        listening.shutdown()
        listening.server_close()
        thread.join()


def embedded(stub: VLLM, model: Any, body: dict[str, Any]) -> torch.Tensor:
    """The prompt's rows, (T, hidden). Embeddings do not stand in for the prompt: an empty one is a prompt too many."""
    prompt = body.get("prompt")
    if prompt is not None and not len(prompt):
        raise Refused("The decoder prompt cannot be empty")
    if not body.get("prompt_embeds"):
        ids = prompt if isinstance(prompt, list) else stub.tokenizer(prompt)["input_ids"]
        return model.get_input_embeddings()(torch.tensor(ids))  # type: ignore[no-any-return]
    if not stub.takes_embeddings:
        raise Refused("You must set `--enable-prompt-embeds`")
    content = base64.b64decode(body["prompt_embeds"], validate=True)
    rows: torch.Tensor = torch.load(io.BytesIO(content), weights_only=True)
    if rows.dim() != 2 or rows.shape[1] != model.config.hidden_size or not rows.is_floating_point():
        raise Refused(f"prompt_embeds of shape {tuple(rows.shape)} and type {rows.dtype}")
    return rows.to(model.dtype)


def program(done: HandOver, name: str) -> Any:
    """check.py or ask.py, from where it was written."""
    spec = importlib.util.spec_from_file_location(f"handed_{name}", done.folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def checked(done: HandOver, server: Server, url: str, *more: str) -> int:
    return int(program(done, "check").main(["--server", server.name, "--url", url, *more]))


def generate(stub: VLLM, body: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Greedy tokens, each with its logprob, by full recompute."""
    model = stub.models[body["model"]]
    rows = embedded(stub, model, body)
    tokens, logprobs = [], []
    stops = {stub.tokenizer.eos_token_id, *body.get("stop_token_ids", ())}
    with torch.no_grad():
        for _ in range(body["max_tokens"]):
            scores = model(inputs_embeds=rows[None]).logits[0, -1].log_softmax(-1)
            token = int(scores.argmax())
            tokens.append(token)
            logprobs.append(float(scores[token]))
            if token in stops:
                break
            rows = torch.cat([rows, model.get_input_embeddings()(torch.tensor([token]))])
    return tokens, logprobs


def reply(stub: VLLM, path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    if path == "/v1/models":
        return 200, {"data": [{"id": name} for name in stub.models]}
    stub.bodies.append(body)
    if body["model"] not in stub.models:
        return 404, {"error": {"message": "no such model"}}
    if path == "/tokenize":
        if "prompt" in body:
            return 200, {"tokens": stub.tokenizer(body["prompt"])["input_ids"]}
        return 200, {"tokens": templated(stub, body)}
    if path == "/v1/chat/completions":
        tokens, _ = generate(stub, {**body, "prompt": templated(stub, body)})
        return 200, {"choices": [{"message": {"content": stub.tokenizer.decode(tokens)}}]}
    if stub.openai_only and "return_tokens_as_token_ids" in body:
        return 400, {"error": {"message": "unknown field"}}
    tokens, logprobs = generate(stub, body)
    shown = [stub.tokenizer.decode([token]) for token in tokens]
    if body.get("return_tokens_as_token_ids"):
        shown = [f"token_id:{token}" for token in tokens]
    told = {"tokens": shown, "token_logprobs": logprobs}
    return 200, {"choices": [{"text": stub.tokenizer.decode(tokens), "logprobs": told}]}


def templated(stub: VLLM, body: dict[str, Any]) -> list[int]:
    text = stub.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
    ids: list[int] = stub.tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _handler(stub: VLLM) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            """Tests want no log."""

        def do_GET(self) -> None:
            self._send(*reply(stub, self.path, {}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            try:
                self._send(*reply(stub, self.path, body))
            except Refused as error:
                self._send(400, {"error": {"message": str(error)}})

        def _send(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
