"""The word embedding, extended past the vocabulary by each slot's own virtual tokens and words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from tailor.models.new_tokens import NewRows
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

    In the tokens of a slot with `words`, their ids are its own rows. Packing, positions, masks and caches need to know
    nothing of either.
    """

    def __init__(self, base: nn.Module, host: SlotHost) -> None:
        super().__init__()
        self.base = base
        self.tables: dict[int, list[VirtualTokens]] = {}
        self.words: dict[int, NewRows] = {}
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
        own = input_ids >= VIRTUAL
        for span in self.slot_host.running().spans if self.words else ():
            if (new := self.words.get(span.slot)) is not None:
                ids = input_ids[:, span.start : span.end]
                own[:, span.start : span.end] |= (ids >= new.first) & (ids < new.end)
        if not bool(own.any()):
            return self.base(input_ids)  # type: ignore[no-any-return]
        vectors: Tensor = self.base(input_ids.masked_fill(own, 0))
        places, rows = [], []
        for span in self.slot_host.running().spans:
            inside = own[0, span.start : span.end].nonzero()[:, 0] + span.start
            virtual = input_ids[0, inside] >= VIRTUAL
            for chosen, find in ((inside[virtual], self._rows), (inside[~virtual], self._new_rows)):
                if chosen.numel():
                    places.append(chosen)
                    rows.append(find(span.slot, input_ids[0, chosen]).to(vectors.dtype))
        flat = vectors[0].index_put((torch.cat(places),), torch.cat(rows))
        return flat[None]

    def _new_rows(self, slot: int, ids: Tensor) -> Tensor:
        """(n, hidden) of a slot's words; some embeddings (Gemma 3's) scale what they look up."""
        new = self.words[slot]
        return new.embedding[ids - new.first] * getattr(self.base, "embed_scale", 1.0)

    def _rows(self, slot: int, ids: Tensor) -> Tensor:
        """(n, hidden) of virtual ids, counted over all the slot's tasks; tables that nobody wants are not looked at."""
        tables, wanted = self.tables.get(slot, []), ids - VIRTUAL
        if int(wanted.max()) >= sum(table.num for table in tables):
            raise IndexError(f"slot {slot} has no virtual token {int(wanted.max())}")
        parts: list[Tensor] = []
        places = wanted.clone()
        first = kept = 0
        for table in tables:
            inside = (wanted >= first) & (wanted < first + table.num)
            if bool(inside.any()):
                places[inside] += kept - first
                parts.append(table.rows())
                kept += table.num
            first += table.num
        return (parts[0] if len(parts) == 1 else torch.cat(parts))[places]
