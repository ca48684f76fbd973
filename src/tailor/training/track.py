"""TensorBoard events beside `metrics.jsonl`, for those who watch runs there (extra: track)."""

from __future__ import annotations

from pathlib import Path

from tailor.errors import require
from tailor.training.trainer import Listener, StepReport


def tensorboard_writer(folder: Path) -> Listener:
    """A listener that writes events into `folder/tensorboard`. Raises MissingDependencyError."""
    require("tensorboard", "track")
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(folder / "tensorboard"))

    def listener(report: StepReport) -> None:
        for name in ("loss", "grad_norm", "learning_rate", "tokens_per_second", "validation_loss"):
            value = getattr(report, name)
            if value is not None:
                writer.add_scalar(name, value, report.step)
        writer.flush()

    return listener
