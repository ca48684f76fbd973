"""The files of a hand-over to vLLM: adapters, soft prompts, models, the command lines, and what people read."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tailor.artifacts.files import TRAINING_STATE, merged_weights, write_model, write_peft, write_state
from tailor.inference.load import Customized
from tailor.models.base import Base
from tailor.models.slots import Slot
from tailor.recipes.hand_over_routes import Refused, Route, max_lora_rank
from tailor.store import write_text
from tailor.techniques.lora import LoRA
from tailor.techniques.prompting import STEP_BY_STEP, Prompting
from tailor.techniques.soft_prompt import TABLE
from tailor.techniques.technique import PEFT_PREFIX, PeftFiles

MAX_LORAS = 8
"""LoRAs in one batch at most: each takes memory beside the base."""


@dataclass(frozen=True)
class Server:
    """One vLLM process: the model it loads, under which name and port, and what it serves.

    `model` is a hub id, an absolute path, or a folder of the hand-over; `ranks` are those of its LoRAs.
    """

    name: str
    model: str
    port: int
    dtype: str
    routes: tuple[Route, ...]
    shared: bool
    """Whether it serves the base (with LoRAs, and prompts from ask.py), rather than one customization's own weights."""
    ranks: tuple[int, ...] = ()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def options(self) -> list[str]:
        """What follows the model on the command line of `vllm serve`."""
        words = ["--served-model-name", self.name, "--host", "127.0.0.1", "--port", str(self.port)]
        words += ["--dtype", self.dtype, "--generation-config", "vllm"]
        if loras := [route.name for route in self.routes if route.weights == "lora"]:
            words += ["--enable-lora", "--max-lora-rank", str(max_lora_rank(self.ranks))]
            words += ["--max-loras", str(min(len(loras), MAX_LORAS)), "--max-cpu-loras", str(len(loras))]
            words += ["--lora-modules", *(f"{name}=lora/{name}" for name in loras)]
        if any(route.soft is not None for route in self.routes):
            words += ["--enable-prompt-embeds"]
        return words


def write_lora(folder: Path, lora: LoRA, slot: Slot, base: Base) -> int:
    """Write the adapter as PEFT's files and return its rank.

    vLLM before v0.32 may read neither rank_pattern nor alpha_pattern: with them, every matrix is brought to the largest
    rank by rows and columns of zeros, and its scale is put into B.
    """
    config, tensors = lora.to_peft(slot)
    if config["rank_pattern"] or config["alpha_pattern"]:
        config, tensors = _uniform(config, tensors, slot)
    folder.mkdir(parents=True)
    write_peft(folder, (config, tensors), base)
    return int(config["r"])


def _uniform(config: dict[str, Any], tensors: dict[str, Tensor], slot: Slot) -> PeftFiles:
    found = {}
    terms = {name: delta.terms() for name, (delta,) in slot.deltas.items()}
    rank = max(term.a.shape[0] for term in terms.values() if term.a is not None)
    for name, term in terms.items():
        a, b = (tensors[f"{PEFT_PREFIX}{name}.lora_{part}.weight"] for part in "AB")
        missing = rank - a.shape[0]
        found[f"{PEFT_PREFIX}{name}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing))
        found[f"{PEFT_PREFIX}{name}.lora_B.weight"] = torch.nn.functional.pad(b * term.scale, (0, missing))
    plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    return {**config, **plain}, found


def write_weights(folder: Path, route: Route, customized: Customized) -> None:
    """Write the model folder of a customization whose weights are its own."""
    if route.weights == "model":
        ignored = shutil.ignore_patterns("tailor.json", TRAINING_STATE)
        shutil.copytree(route.artifact.folder, folder, ignore=ignored)
        return
    assert customized.slot is not None
    folder.mkdir(parents=True)
    write_model(folder, customized.base, merged_weights(customized.base, customized.slot))


def write_soft(folder: Path, route: Route, customized: Customized) -> dict[str, str]:
    """Write a soft prompt's rows, and once per base its word embeddings as the model sees them; returns where."""
    assert customized.slot is not None
    base = customized.base
    (virtual,) = customized.slot.virtual_tokens.values()
    rows, words = f"soft/{route.name}.safetensors", f"soft/words-{base.fingerprint}.safetensors"
    (folder / "soft").mkdir(exist_ok=True)
    write_state(folder / rows, {TABLE: virtual.rows().detach().to(base.dtype).cpu()})
    if not (folder / words).exists():
        num_words, _ = base.host.embedding_shape()
        write_state(folder / words, {"weight": base.host.embed(range(num_words)).to(base.dtype).cpu()})
    return {"rows": rows, "words": words}


def as_client_settings(prompting: Prompting | None) -> dict[str, Any] | None:
    """What ask.py needs to make the messages; a chain of thought is written out in template and examples."""
    if prompting is None:
        return None
    reasoning = prompting.reasoning
    examples = [
        {"prompt": s.prompt, "answer": s.reasoned(prompting.answer_pattern) if reasoning else s.completion}
        for s in prompting.examples
    ]
    return {
        "system": prompting.system,
        "template": prompting.template + (f"\n{STEP_BY_STEP}" if reasoning else ""),
        "shots": prompting.shots,
        "examples": examples,
    }


def write_programs(folder: Path) -> None:
    """Write check.py and ask.py: standalone, so that they go where the folder goes."""
    for name in ("check", "ask"):
        source = Path(__file__).with_name(f"hand_over_{name}.py")
        write_text(folder / f"{name}.py", source.read_text("utf-8"))


def write_serve(folder: Path, servers: Sequence[Server]) -> None:
    """Write serve.sh: one command per server, chosen by name; further words go to vLLM as they are."""
    names = ", ".join(server.name for server in servers)
    lines = ["#!/bin/sh", "# ./serve.sh NAME [VLLM OPTION]...   starts one vLLM server and stays with it.", "set -eu"]
    lines += [
        'cd "$(dirname "$0")"',
        f"name=${{1-{shlex.quote(servers[0].name)}}}" if len(servers) == 1 else "name=${1-}",
    ]
    lines += ["[ $# -eq 0 ] || shift", 'case "$name" in']
    for server in servers:
        lines += [f"  {shlex.quote(server.name)})"]
        model = shlex.quote(server.model)
        if server.shared:
            lines += [f"    model={model}", '    set -- "${BASE_MODEL:-$model}" \\']
        else:
            lines += [f"    set -- {model} \\"]
        lines += [f'      {shlex.join(server.options())} "$@"', "    ;;"]
    lines += ["  *)", f"    printf '%s\\n' {shlex.quote(f'usage: ./serve.sh NAME; names: {names}')} >&2", "    exit 2"]
    lines += ["    ;;", "esac", 'exec vllm serve "$@"', ""]
    write_text(folder / "serve.sh", "\n".join(lines))
    (folder / "serve.sh").chmod(0o755)


def write_readme(folder: Path, servers: Sequence[Server], refused: Sequence[Refused], notes: Sequence[str]) -> None:
    """Write README.md: what is here, how it is started, asked and checked."""
    lines = [
        "# Customizations for vLLM",
        "",
        "Written by `tailor serve --engine vllm`, for vLLM as of v0.32. It was not run in writing: `check.py` says",
        "whether what is served is what was made.",
        "",
    ]
    lines += ["| name | server | how |", "|---|---|---|"]
    for server in servers:
        lines += [f"| {route.name} | {server.name}, {server.url} | {route.told} |" for route in server.routes]
    lines += ["", "## Start", "", "Each server is a process of its own and takes most of a GPU's memory unless told"]
    lines += ["otherwise (`--gpu-memory-utilization`); options after the name go to vLLM.", "", "```sh"]
    lines += [f"./serve.sh {shlex.quote(server.name)}" for server in servers] + ["```", ""]
    if shared := [server for server in servers if server.shared]:
        bases = ", ".join(f"`{server.model}`" for server in shared)
        lines += [f"The base is loaded from {bases}; `BASE_MODEL=PATH` before the command names another place.", ""]
    lines += ["## Check, then ask", "", "```sh", "python check.py --wait 600"]
    first = servers[0].routes[0].name
    lines += [f"python ask.py {shlex.quote(first)} 'Where is my parcel?'", "```", ""]
    lines += [
        "`check.py` asks every model, and the base beside it, the probes in `expected.json` and compares with what"
    ]
    lines += ["tailor computed: a LoRA whose module names fit nothing is served as the base without any error. Put"]
    lines += ["nothing into production that fails it. `ask.py` asks anything by name; LoRAs and model folders can be"]
    lines += [
        "asked by any OpenAI client too, prompting and soft prompts only through `ask.py` (or as it does it).",
        "",
    ]
    if any(route.soft is not None for server in servers for route in server.routes):
        lines += ["`--enable-prompt-embeds` is for trusted clients only: vLLM warns that tensors of a wrong shape may"]
        lines += ["crash it. `ask.py` needs torch and safetensors for soft prompts.", ""]
    told = [f"{route.name}: {note}" for server in servers for route in server.routes for note in route.notes]
    for title, found in (("Notes", [*told, *notes]), ("Not here", [f"{one.name}: {one.reason}" for one in refused])):
        if found:
            lines += [f"## {title}", "", *(f"- {text}" for text in found), ""]
    write_text(folder / "README.md", "\n".join(lines))
