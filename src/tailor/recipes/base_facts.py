"""What a base is, as far as it can be known without loading its weights: tokenizer, renderer, context, size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor.models.base import context_length, count_parameters
from tailor.models.files import resolve
from tailor.models.placement import read_config
from tailor.text.render import Renderer, make_renderer
from tailor.text.tokenizer import Tokenizer, load_tokenizer


@dataclass(frozen=True)
class BaseFacts:
    """`max_seq_len` is the context in tokens; `num_parameters` follows from the configuration (tied ones once)."""

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
    """The facts of a base that `load_base` would load; the weights of a hub base are not downloaded.

    Raises NotFoundError, AuthError, and ConfigError for architectures and templates that are refused.
    """
    folder = resolve(name_or_path, weights=False)
    config = read_config(folder)
    tokenizer = load_tokenizer(folder)
    return BaseFacts(
        str(name_or_path),
        folder,
        config,
        tokenizer,
        make_renderer(tokenizer),
        context_length(config),
        count_parameters(config),
    )
