"""What the tests beside PEFT have in common: its files, its logits, parameters moved away from their start."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

MARKS = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]

IDS = [1, 4, 70, 71, 99, 6, 5, 200, 33]
CLOSE = {"atol": 1e-5, "rtol": 0.0}


def shake(parameters: Iterable[Tensor], by: float = 0.05) -> None:
    """Add noise in place."""
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(by * torch.randn_like(parameter))


def write(folder: Path, files: tuple[dict[str, Any], dict[str, Tensor]]) -> Path:
    """A folder as PEFT loads it."""
    config, tensors = files
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.torch.save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder


def read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors of a folder that PEFT saved."""
    config = json.loads((folder / "adapter_config.json").read_text())
    return config, safetensors.torch.load_file(folder / "adapter_model.safetensors")


@torch.no_grad()
def their_logits(model: Any) -> Tensor:
    """(T, V) of IDS by a PEFT model."""
    return model(input_ids=torch.tensor([IDS]), attention_mask=torch.ones(1, len(IDS))).logits[0]  # type: ignore[no-any-return]
