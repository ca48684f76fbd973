"""Full fine-tuning: every weight of the base, or a named subset. The result is a base of its own and runs alone."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from tailor.models.slots import Slot
from tailor.techniques.technique import Defaults, Technique, Traits


class Full(Technique):
    """Every weight of the base, or those whose names match."""

    type: Literal["full"] = "full"
    parameters: tuple[str, ...] | None = Field(
        None,
        description="name patterns of the weights to train, e.g. ['layers.[67].*', 'norm.weight']; all when not given",
    )

    traits: ClassVar[Traits] = Traits(
        trains="every weight (or a named subset)",
        where="everywhere",
        formula="W − learning rate · AdamW(∇W)",
        source="Howard & Ruder 2018, arXiv:1801.06146; blended instruction data: Wei et al. 2021, arXiv:2109.01652",
        frozen_base=False,
        merges=False,
        mixes=False,
        peft=False,
        rows=(200, 2000),
        defaults=Defaults(learning_rate=5e-4, num_epochs=4, min_steps=80, max_steps=2000),
    )

    def attach(self, slot: Slot) -> None:
        """Take the base's weights over. Raises ConflictError beside other slots, ConfigError when nothing matches."""
        slot.own(self.parameters)
