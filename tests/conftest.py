"""What every test gets: fixed seeds, no network, hypothesis without deadlines."""

from __future__ import annotations

import os
import sys

import pytest
from hypothesis import HealthCheck, settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

settings.register_profile(
    "tailor", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tailor")


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Tests draw the same numbers in every run and in any order; those that never use torch do not pay for it."""
    if "torch" in sys.modules:
        import torch

        torch.manual_seed(0)
