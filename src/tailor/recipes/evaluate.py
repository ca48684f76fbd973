"""Evaluate: an artifact or a base on rows it has not seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from tailor.data.dataset import ReadSettings, read
from tailor.errors import ConfigError, QualityError, nearest
from tailor.evaluation.evaluate import EvalSettings, Evaluation, Progress
from tailor.evaluation.evaluate import evaluate as score
from tailor.inference.load import load


def evaluate(
    name: str | Path,
    data: str | Path,
    *,
    settings: EvalSettings | None = None,
    reading: ReadSettings | None = None,
    progress: Progress | None = None,
    device: str = "auto",
    dtype: str = "auto",
) -> Evaluation:
    """Generate and score the rows of `data` with an artifact or base.

    The label set of a classification is that of the rows themselves united with the artifact's training labels.
    Raises NotFoundError, DataError, ConfigError.
    """
    customized = load(name, device=device, dtype=dtype)
    records = read(str(data), reading or ReadSettings()).records
    labels = customized.artifact.manifest.get("labels") if customized.artifact is not None else None
    settings = settings or EvalSettings()
    return score(customized.backend, customized.name, records, settings=settings, labels=labels, progress=progress)


def check_gates(evaluation: Evaluation, gates: Mapping[str, float]) -> None:
    """Raise QualityError when a metric is below its gate, ConfigError for a metric that was not measured."""
    for metric, least in gates.items():
        if metric not in evaluation.metrics:
            raise ConfigError(f"metric {metric!r} was not measured", hint=nearest(metric, evaluation.metrics))
        value = evaluation.metrics[metric].mean
        if value < least:
            raise QualityError(f"{metric} is {value:.4f}, below the gate of {least:g}")


__all__ = ["check_gates", "evaluate"]
