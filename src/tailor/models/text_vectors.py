"""Vectors of texts: the mean of a base's last hidden states over a text's tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tailor.data.examples import Example
from tailor.data.packing import Placed, pack
from tailor.errors import DataError
from tailor.models.host import SlotHost
from tailor.models.plan import Plan
from tailor.models.slots import BASE_SLOT
from tailor.text.messages import user
from tailor.text.render import Renderer

TOKENS_PER_PASS = 2048


def text_vectors(
    host: SlotHost, renderer: Renderer, texts: Sequence[str], tokens_per_pass: int = TOKENS_PER_PASS
) -> Tensor:
    """(num_texts, H) unit vectors of texts as the plain base reads them in a user's turn; passes of their own.

    H is the width of the decoder's output (OPT's is not the embedding's). Raises DataError for a text without tokens
    (an empty one, on a base that adds nothing to it).
    """
    return prompt_vectors(host, [renderer.prompt([user(text)]) for text in texts], tokens_per_pass)


@torch.no_grad()
def prompt_vectors(host: SlotHost, prompts: Sequence[Sequence[int]], tokens_per_pass: int = TOKENS_PER_PASS) -> Tensor:
    """As `text_vectors`, of token ids."""
    if not all(prompts):
        raise DataError(f"text {prompts.index([])} has no tokens, so it has no embedding")
    if not prompts:
        return torch.empty(0, int(host.model.get_output_embeddings().weight.shape[1]))  # type: ignore[operator]
    vectors: dict[int, Tensor] = {}
    decoder: nn.Module = host.model.base_model  # type: ignore[assignment]
    placed = [Placed(Example(ids, [0] * len(ids)), BASE_SLOT, k) for k, ids in enumerate(prompts)]
    for batch in pack(placed, tokens_per_pass):
        ids, positions = batch.input_ids.to(host.device), batch.position_ids.to(host.device)
        with host.run(Plan.of_batch(batch)):
            output = decoder(input_ids=ids[None], position_ids=positions[None], use_cache=False)
        hidden = output.last_hidden_state[0].float().cpu()
        vectors |= {segment.index: hidden[segment.start : segment.end].mean(dim=0) for segment in batch.segments}
    return nn.functional.normalize(torch.stack([vectors[k] for k in range(len(prompts))]), dim=1)
