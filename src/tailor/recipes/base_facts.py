"""What a base is, as far as it can be known without loading its weights: tokenizer, renderer, context, size."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor.models.base import context_length
from tailor.models.files import resolve, weight_files
from tailor.models.placement import placement_of
from tailor.text.render import Renderer, make_renderer
from tailor.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class BaseFacts:
    """`max_seq_len` is the context in tokens; `num_parameters` counts what the weight files hold (tied ones once)."""

    name: str
    folder: Path
    config: Any
    tokenizer: Tokenizer
    renderer: Renderer
    max_seq_len: int
    num_parameters: int

    @property
    def end_of_turn(self) -> str:
        """The text of the token at which generation stops and which training must count."""
        return self.tokenizer.token_text(self.renderer.stop[0])


def base_facts(name_or_path: str | Path) -> BaseFacts:
    """The facts of a base that `load_base` would load.

    Raises NotFoundError, AuthError, and ConfigError for architectures and templates that are refused.
    """
    from transformers import AutoConfig

    folder = resolve(name_or_path)
    config = AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    placement_of(config)
    tokenizer = load_tokenizer(folder)
    return BaseFacts(
        str(name_or_path),
        folder,
        config,
        tokenizer,
        make_renderer(tokenizer),
        context_length(config),
        sum(map(_num_parameters, weight_files(folder))),
    )


def _num_parameters(path: Path) -> int:
    """Sum of the tensor sizes in a safetensors header: 8 bytes with its length, then JSON."""
    with path.open("rb") as file:
        header: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
