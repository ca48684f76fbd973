"""A multiplier scales the rate that there would be without it, whoever decided on that."""

from __future__ import annotations

import pytest

from tailor.techniques.technique import Defaults
from tailor.training.settings import TrainSettings, resolve_settings


@pytest.mark.parametrize(("given", "relative", "rate"), [(None, False, 0.01), (None, True, 0.02), (0.3, True, 0.15)])
def test_the_rate_is_scaled(given: float | None, relative: bool, rate: float) -> None:
    defaults = Defaults(learning_rate=0.02, num_epochs=1, min_steps=1, max_steps=9, per_embedding_rms=relative)
    settings = TrainSettings(learning_rate=given, learning_rate_multiplier=0.5)
    resolved = resolve_settings(settings, defaults, num_rows=8, embedding_rms=2.0)
    assert resolved.learning_rate == pytest.approx(rate)
