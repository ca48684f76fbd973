"""vLLM's protocol over stock transformers, for tests: what its sources say of LoRA files and prompt embeddings.

A LoRA is read as vLLM's PEFTHelper reads it: r, lora_alpha and use_rslora, and no patterns.
"""

from __future__ import annotations

import base64
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

PREFIX = "base_model.model."


@dataclass
class VLLM:
    """One server: models by name, the tokenizer, and how it goes wrong."""

    models: dict[str, Any]
    tokenizer: Any
    url: str = ""
    openai_only: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)


def loaded(folder: str | Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, attn_implementation="eager").eval()


def with_lora(base: str | Path, adapter: Path) -> Any:
    """The base with an adapter folded in; tensors whose names fit no module change nothing."""
    model = loaded(base)
    config = json.loads((adapter / "adapter_config.json").read_text())
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
def vllm(folder: Path, server: Any) -> Iterator[VLLM]:
    """A server of a hand-over, started as its command line says."""
    place = server.model if Path(server.model).is_absolute() else folder / server.model
    words = server.options()
    models = {server.name: loaded(place)}
    for word in words:
        name, equals, path = word.partition("=")
        if equals:
            models[name] = with_lora(place, folder / path)
    stub = VLLM(models, AutoTokenizer.from_pretrained(str(place)))
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


def generate(stub: VLLM, body: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Greedy tokens, each with its logprob, by full recompute."""
    model = stub.models[body["model"]]
    if body.get("prompt_embeds"):
        content = base64.b64decode(body["prompt_embeds"], validate=True)
        rows = torch.load(io.BytesIO(content), weights_only=True).to_dense()
        assert rows.dim() == 2
    else:
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else stub.tokenizer(prompt)["input_ids"]
        rows = model.get_input_embeddings()(torch.tensor(ids))
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
            self._send(*reply(stub, self.path, body))

        def _send(self, status: int, content: dict[str, Any]) -> None:
            data = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler
