"""The word embedding, extended past the vocabulary by each slot's own virtual tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tailor.text.tokenizer import VIRTUAL

if TYPE_CHECKING:
    from tailor.models.host import SlotHost


@dataclass(frozen=True, eq=False)
class VirtualTokens:
    """`num` rows of one slot; `rows()` gives them as (num, hidden): a table, or a prompt encoder's output."""

    num: int
    rows: Callable[[], Tensor]


class SlotEmbedding(nn.Module):
    """Wraps the input embedding: ids below VIRTUAL are words, VIRTUAL + k is row k of the running slot's table.

    Packing, positions, masks and caches need to know nothing of virtual tokens.
    """

    def __init__(self, base: nn.Module, host: SlotHost) -> None:
        super().__init__()
        self.base = base
        self.tables: dict[int, VirtualTokens] = {}
        self.slot_host = host
        self.num_embeddings = int(base.num_embeddings)  # type: ignore[arg-type]
        self.embedding_dim = int(base.embedding_dim)  # type: ignore[arg-type]
        self.padding_idx = getattr(base, "padding_idx", None)

    @property
    def weight(self) -> Tensor:
        """The wrapped embedding's weight (tied heads ask for it)."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, input_ids: Tensor) -> Tensor:
        """(1, T) ids → (1, T, hidden). Raises IndexError for a virtual id that its slot does not have."""
        virtual = input_ids >= VIRTUAL
        if not bool(virtual.any()):
            return self.base(input_ids)  # type: ignore[no-any-return]
        words: Tensor = self.base(input_ids.masked_fill(virtual, 0))
        places, rows = [], []
        for span in self.slot_host.running().spans:
            inside = virtual[0, span.start : span.end].nonzero()[:, 0]
            if inside.numel():
                wanted = input_ids[0, span.start : span.end][inside] - VIRTUAL
                table = self.tables.get(span.slot)
                if table is None or int(wanted.max()) >= table.num:
                    raise IndexError(f"slot {span.slot} has no virtual token {int(wanted.max())}")
                places.append(inside + span.start)
                rows.append(table.rows()[wanted].to(words.dtype))
        flat = words[0].index_put((torch.cat(places),), torch.cat(rows))
        return flat[None]
