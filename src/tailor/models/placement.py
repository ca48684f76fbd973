"""Where things are in each supported architecture, and which architectures are refused and why.

One row per transformers `model_type`. Adding an architecture is adding a row; loading compares the packed attention
with the stock one on a probe, so a wrong row is an error and never a wrong answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from tailor.errors import ConfigError, nearest

Block = Literal["attention", "mlp"]
Part = Literal["all", "query|key|value", "(query,key,value) per head"]
"""How a projection's output is laid out: keys (or values) alone, fused one after the other, or fused head by head."""


@dataclass(frozen=True)
class Placement:
    """`lora_targets`: the query and value projections (LoRA, arXiv:2106.09685 section 4.2), by the ends of their names.

    On fused projections the whole fused layer is the target, as PEFT does. `attention` and `mlp` are the blocks inside
    a decoder layer (of `mlp` where it is entered and left); `ia3_targets` the projections to keys and values and where
    in their output those stand; `feedforward` the projections out of the MLP, () where they belong to experts.
    """

    model_type: str
    lora_targets: tuple[str, ...] = ("q_proj", "v_proj")
    attention: str = "self_attn"
    mlp: tuple[str, str] = ("mlp", "mlp")
    ia3_targets: tuple[tuple[str, Part], ...] = (("k_proj", "all"), ("v_proj", "all"))
    feedforward: tuple[str, ...] = ("down_proj",)

    def block(self, model: nn.Module, block: Block, layer: int) -> tuple[str, str]:
        """Names of the modules through which a block of a decoder layer is entered and left."""
        stem = f"{self.layers(model)}.{layer}"
        entry, leave = (self.attention, self.attention) if block == "attention" else self.mlp
        return f"{stem}.{entry}", f"{stem}.{leave}"

    def embedding(self, model: nn.Module) -> str:
        """Name of the input embedding."""
        wanted: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        return str(next(name for name, module in model.named_modules() if module is wanted))

    def layers(self, model: nn.Module) -> str:
        """Name of the list of decoder layers: the longest ModuleList."""
        lists = {n: len(m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and ".layers." not in n}
        return str(max(lists, key=lambda n: lists[n]))


SUPPORTED: dict[str, Placement] = {
    row.model_type: row
    for row in (
        Placement("llama"),
        Placement("mistral"),
        Placement("qwen2"),
        Placement("qwen3"),
        Placement("gemma"),
        Placement("gemma2"),
        Placement("gemma3_text"),
        Placement("phi3", lora_targets=("qkv_proj",), ia3_targets=(("qkv_proj", "query|key|value"),)),
        Placement("olmo2"),
        Placement("granite"),
        Placement("smollm3"),
        Placement(
            "gpt2",
            lora_targets=("c_attn",),
            attention="attn",
            ia3_targets=(("c_attn", "query|key|value"),),
            feedforward=("mlp.c_proj",),
        ),
        Placement(
            "gpt_neox",
            lora_targets=("query_key_value",),
            attention="attention",
            ia3_targets=(("query_key_value", "(query,key,value) per head"),),
            feedforward=("dense_4h_to_h",),
        ),
        Placement("opt", mlp=("fc1", "fc2"), feedforward=("fc2",)),
        Placement("mixtral", feedforward=()),
        Placement("qwen3_moe", feedforward=()),
        Placement("starcoder2", feedforward=("c_proj",)),
        Placement("stablelm"),
        Placement("glm4"),
    )
}

REFUSED: dict[str, str] = {
    "falcon": "it may use ALiBi biases, which the packed attention does not add",
    "bloom": "it uses ALiBi biases, which the packed attention does not add",
    "mpt": "it uses ALiBi biases, which the packed attention does not add",
    "gpt_oss": "its attention sinks are not in the packed attention",
    "gemma3n_text": "its per-layer id look-ups would miss virtual tokens",
    "gemma3n": "its per-layer id look-ups would miss virtual tokens",
    "mamba": "its recurrent state would leak between packed rows",
    "jamba": "its recurrent state would leak between packed rows",
}


def read_config(folder: Path) -> Any:
    """config.json of a base, refused here when its architecture is. Raises ConfigError."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / 'config.json'} cannot be used: {str(error).strip().splitlines()[0]}") from error
    placement_of(config)
    return config


def placement_of(config: Any) -> Placement:
    """The row of this architecture. Raises ConfigError for refused and unknown ones, by name."""
    model_type = str(config.model_type)
    if reason := REFUSED.get(model_type):
        raise ConfigError(f"bases of type {model_type!r} are not supported: {reason}")
    if model_type not in SUPPORTED:
        raise ConfigError(f"bases of type {model_type!r} are not supported", hint=nearest(model_type, SUPPORTED))
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        raise ConfigError(
            "dynamic RoPE scaling depends on the longest row of a pass, so packed rows would change each other",
            hint="use a base with fixed RoPE scaling (linear, yarn, llama3)",
        )
    return SUPPORTED[model_type]
