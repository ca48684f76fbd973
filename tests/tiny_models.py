"""Tiny random models of every supported architecture, on disk and in memory; a tokenizer trained in the process."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tailor.models.base import Base, wrap_model
from tailor.text.tokenizer import Tokenizer

SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

# model_type → (config class, changes to SMALL); windows are shorter than the test rows, caps tight: they must matter
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 7}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}),
    "gemma": ("GemmaConfig", {"head_dim": 8}),
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8}
        | {"attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
    ),
    "gemma3_text": ("Gemma3TextConfig", {"head_dim": 8, "sliding_window": 7, "query_pre_attn_scalar": 8}),
    "phi3": ("Phi3Config", {"sliding_window": 7}),
    "olmo2": ("Olmo2Config", {}),
    "granite": ("GraniteConfig", {"logits_scaling": 4.0, "attention_multiplier": 0.3, "embedding_multiplier": 3.0}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}),
    "gpt_neox": ("GPTNeoXConfig", {}),
    "opt": ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 24, "do_layer_norm_before": False}),
    "mixtral": ("MixtralConfig", {"sliding_window": 7, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8},
    ),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 7}),
    "stablelm": ("StableLmConfig", {}),
    "glm4": ("Glm4Config", {"head_dim": 8}),
}


def tiny_model(model_type: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """A random model of the architecture, with weights large enough that differences show."""
    config_class, own = ARCHITECTURES[model_type]
    config = getattr(transformers, config_class)(**{**SMALL, **own, **changes})
    torch.manual_seed(seed)
    # torch's grouped matrix product has no float64
    experts = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager", **experts)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).eval()


@cache
def tiny_tokenizer(
    chat: bool = True, *, specials: tuple[str, ...] = ROLES, template: str = CHAT_TEMPLATE, leading_bos: bool = False
) -> Tokenizer:
    """A byte-level BPE of 320 ids; with `chat`, `specials` for the roles and a template like tailor-nano's.

    With `leading_bos` the tokenizer puts its bos before every text by itself, as Llama's does.
    """
    special = ["<|pad|>", "<|bos|>", "<|eos|>"]
    roles = list(specials) if chat else []
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=special + roles,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 3, "hello there, how are you?"], trainer)
    if leading_bos:
        fast.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    hf = PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<|pad|>",
        bos_token="<|bos|>",
        eos_token="<|eos|>",
        extra_special_tokens=roles,
        clean_up_tokenization_spaces=False,
    )
    if chat:
        hf.chat_template = template
    return Tokenizer(hf)


def tiny_base(
    model_type: str = "llama", dtype: torch.dtype = torch.float32, *, chat: bool = True, **changes: Any
) -> Base:
    """A Base over a tiny random model."""
    return wrap_model(tiny_model(model_type, dtype, **changes), tiny_tokenizer(chat), torch.device("cpu"))
