"""Which way a customization goes to vLLM: as a LoRA, a model folder, prompt embeddings, messages; or not at all.

What vLLM takes, as of v0.32: `vllm/config/lora.py` (ranks), `vllm/lora/peft_helper.py` (no DoRA, no modules_to_save, no
bias; `rank_pattern` and `alpha_pattern` are read, which v0.27 did not), `vllm/lora/lora_model.py` (a target whose last
name is no linear layer's is an error, one that fits no module otherwise is left out without a word), the
`packed_modules_mapping` of its models, `vllm/renderers/embed_utils.py` (prompt embeddings). Its prompt adapters were
removed in 2025 (#20588).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tailor.artifacts.artifact import Artifact
from tailor.errors import ConfigError, TailorError
from tailor.techniques import Technique
from tailor.techniques.lora import LoRA
from tailor.techniques.prompting import Prompting
from tailor.techniques.soft_prompt import SoftPrompt

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What `--max-lora-rank` may be."""

LORA_ARCHITECTURES = frozenset(
    {
        *("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "gemma2", "gemma3_text"),
        *("phi3", "olmo2", "granite", "smollm3", "opt", "glm4"),
    }
)
"""Our architectures that take LoRA in vLLM; on the others a LoRA goes as a merged model."""

LORA_TARGETS = frozenset(
    {
        *("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
        *("gate_proj", "up_proj", "down_proj", "fc1", "fc2"),
    }
)
"""Ends of the names of linear layers that vLLM has LoRA for on those architectures."""

PACKED_TARGETS: dict[str, frozenset[str]] = {"phi3": frozenset({"qkv_proj", "gate_up_proj"})}
"""Ends of the names of packed layers that vLLM takes whole; glm4's gate_up_proj it takes in its two parts only."""

ONE_WINDOW = frozenset({"qwen2", "qwen3"})
"""Architectures that vLLM does not load when their layers differ in their window."""

Weights = Literal["base", "lora", "merged", "model"]
"""Which weights answer: the base's, the base's with a LoRA, the base's with changes folded in, or the artifact's."""


@dataclass(frozen=True)
class Route:
    """How one customization is served: which weights, with what around the prompt, and what is to be said of it."""

    name: str
    artifact: Artifact
    weights: Weights
    prompting: Prompting | None = None
    soft: SoftPrompt | None = None
    notes: tuple[str, ...] = ()

    @property
    def needs_client(self) -> bool:
        """Whether the server alone does not make the customization: `ask.py` does the rest."""
        return self.prompting is not None or self.soft is not None

    @property
    def owns_server(self) -> bool:
        """Whether it needs a server of its own, because its weights are its own."""
        return self.weights in ("merged", "model")

    @property
    def told(self) -> str:
        """How it is served, in words."""
        weights = {"base": "the base", "lora": "a LoRA", "merged": "a merged model", "model": "a model of its own"}
        parts = [weights[self.weights]]
        if self.soft is not None:
            parts.append(f"{self.soft.num_virtual_tokens} prompt embeddings in front, from ask.py")
        if self.prompting is not None:
            parts.append("messages put around the prompt by ask.py")
        return ", ".join(parts)


@dataclass(frozen=True)
class Refused:
    """A customization that vLLM cannot serve, and why."""

    name: str
    reason: str


def expand(artifact: Artifact) -> list[tuple[str, Artifact]]:
    """An artifact as what is served under one name each: itself, or every task of a prompt table."""
    if len(artifact.tasks) <= 1:
        return [(artifact.name, artifact.of_task(None))]
    spelled = {task: re.sub(r"[^A-Za-z0-9._-]+", "-", task) for task in artifact.tasks}
    return [(f"{artifact.name}.{spelled[task]}", artifact.of_task(task)) for task in artifact.tasks]


def route(name: str, artifact: Artifact, model_type: str) -> Route | Refused:
    """Which way `artifact` goes, on a base of this architecture."""
    if artifact.kind == "hosted":
        return Refused(name, f"its weights are at {artifact.base_name}")
    if artifact.is_base:
        return Route(name, artifact, "model")
    techniques = artifact.techniques
    if reason := _why_not(techniques):
        return Refused(name, reason)
    prompting = next((t for t in techniques if isinstance(t, Prompting)), None)
    soft = next((t for t in techniques if isinstance(t, SoftPrompt)), None)
    changes = [t for t in techniques if t.traits.merges]
    weights, notes = _weights(changes, model_type, soft is not None)
    return Route(name, artifact, weights, prompting, soft, notes)


def why_not_on(found: Route, config: Any) -> str | None:
    """Why vLLM cannot serve this route on a base of this configuration (transformers'); None when it can."""
    model_type = str(config.model_type)
    if model_type in ONE_WINDOW and len(set(getattr(config, "layer_types", None) or ())) > 1:
        return f"its base has a sliding window in some layers only, and vLLM's {model_type} has none for that"
    width = getattr(config, "word_embed_proj_dim", config.hidden_size)
    if found.soft is not None and width != config.hidden_size:
        return (
            f"{found.soft.type}: its base's embeddings have {width} numbers, and vLLM takes prompt embeddings of the "
            f"hidden size, {config.hidden_size}, only"
        )
    return None


def _why_not(techniques: Sequence[Technique]) -> str | None:
    """Why vLLM cannot serve these techniques; None when it can."""
    for technique in techniques:
        if isinstance(technique, Prompting):
            reason = _why_not_messages(technique)
        elif isinstance(technique, SoftPrompt):
            reason = _why_not_embeddings(technique)
        elif not technique.traits.merges:
            reason = f"{technique.type}: vLLM has no place for {technique.traits.trains} ({technique.traits.where})"
        else:
            continue
        if reason:
            return reason
    if sum(isinstance(technique, SoftPrompt) for technique in techniques) > 1:
        return "several soft prompts in one customization"
    return None


def _why_not_messages(technique: Prompting) -> str | None:
    if technique.shots and technique.selection in ("nearest", "mmr"):
        return (
            f"prompting: shots are chosen for every prompt anew (selection: {technique.selection}); "
            "tailor does that in front of a vLLM with --base openai:MODEL@URL"
        )
    if technique.votes > 1:
        return (
            f"prompting: {technique.votes} answers are voted on; "
            "tailor does that in front of a vLLM with --base openai:MODEL@URL"
        )
    return None


def _why_not_embeddings(technique: SoftPrompt) -> str | None:
    if technique.template is None:
        return None
    return f"{technique.type}: its virtual tokens stand at the markers of a template, and vLLM knows no templates"


def _weights(changes: Sequence[Technique], model_type: str, embedded: bool) -> tuple[Weights, tuple[str, ...]]:
    if not changes:
        return "base", ()
    if reason := _why_merged(changes, model_type, embedded):
        return "merged", (f"merged, because {reason}",)
    return "lora", ()


def _why_merged(changes: Sequence[Technique], model_type: str, embedded: bool) -> str | None:
    """Why these are folded into the base's weights rather than served beside it."""
    kinds = " and ".join(technique.type for technique in changes)
    lora = changes[0]
    if len(changes) > 1 or not isinstance(lora, LoRA):
        return f"vLLM serves LoRA only beside a base, and this is {kinds}"
    if lora.dora:
        return "vLLM takes no DoRA"
    if embedded:
        return "a LoRA is not relied upon together with prompt embeddings"
    if model_type not in LORA_ARCHITECTURES:
        return f"vLLM takes no LoRA on bases of type {model_type}"
    if (rank := largest_rank(lora)) > LORA_RANKS[-1]:
        return f"its rank {rank} is above vLLM's largest, {LORA_RANKS[-1]}"
    return None


def largest_rank(lora: LoRA) -> int:
    """The largest rank of its matrices as they are saved; PiSSA's have twice the rank."""
    return max([lora.rank, *lora.rank_pattern.values()]) * (2 if lora.init == "pissa" else 1)


def strange_targets(names: Sequence[str], model_type: str) -> list[str]:
    """Of the names of linear layers, the ends that vLLM has no LoRA for on this architecture."""
    taken = LORA_TARGETS | PACKED_TARGETS.get(model_type, frozenset())
    return sorted({name.rpartition(".")[2] for name in names} - taken)


def max_lora_rank(ranks: Sequence[int]) -> int:
    """The smallest `--max-lora-rank` that takes them all. Raises ConfigError beyond 512."""
    try:
        return next(allowed for allowed in LORA_RANKS if allowed >= max(ranks))
    except StopIteration:
        raise ConfigError(f"rank {max(ranks)} is above vLLM's largest, {LORA_RANKS[-1]}") from None


def refuse(refused: Sequence[Refused]) -> TailorError:
    """The error that names them all, each with its reason."""
    listed = "; ".join(f"{one.name}: {one.reason}" for one in refused)
    return ConfigError(
        f"vLLM cannot serve {listed}", hint="leave them out, or serve everything in one process with `tailor serve`"
    )
