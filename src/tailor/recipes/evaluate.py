"""Evaluate: an artifact or a base on rows it has not seen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from tailor.data.dataset import ReadSettings, read, skipped_notes
from tailor.data.readers import Reading
from tailor.errors import ConfigError, QualityError, nearest
from tailor.evaluation.evaluate import EvalSettings, Evaluation, Progress
from tailor.evaluation.evaluate import evaluate as score
from tailor.evaluation.scores import metric_named
from tailor.inference.load import Customized, HostedCustomized, load
from tailor.techniques.soft_prompt import templates_of


def evaluate(
    name: str | Path | Customized | HostedCustomized,
    data: str | Path,
    *,
    settings: EvalSettings | None = None,
    reading: ReadSettings | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Generate and score the rows of `data` with an artifact or base, by name or loaded already (`tailor.load`).

    Rows for a prompt table of several tasks name theirs in a column `taskname`.

    The label set of a classification is that of the rows themselves united with the artifact's training labels.
    Raises NotFoundError, DataError, ConfigError.
    """
    customized = name if isinstance(name, Customized | HostedCustomized) else load(name)
    techniques = customized.artifact.techniques if customized.artifact is not None else ()
    rows = read(str(data), reading or ReadSettings(), templates=templates_of(techniques))
    labels = customized.artifact.manifest.get("labels") if customized.artifact is not None else None
    settings = settings or EvalSettings()
    evaluation = score(
        customized.backend, customized.name, rows.records, settings=settings, labels=labels, progress=progress
    )
    return replace(evaluation, notes=[*_seen_note(customized, rows), *skipped_notes(rows), *evaluation.notes])


def _seen_note(customized: Customized | HostedCustomized, rows: Reading) -> list[str]:
    """A warning when the file is the one that the artifact was tuned on."""
    artifact = customized.artifact
    if artifact is None:
        return []
    runs = (artifact.manifest, *artifact.manifest.get("tasks", {}).values())
    hashes = [str(run.get("data", {}).get("content_hash", "")) for run in runs]  # training file + validation file
    if rows.content_hash not in [each.split("+")[0] for each in hashes]:
        return []
    return [f"{artifact.name} was tuned on this very file: these scores show memory, not skill"]


@dataclass(frozen=True)
class Gates:
    """What the scores must reach: `least` for metrics where higher is better, `most` where lower is."""

    least: Mapping[str, float] = field(default_factory=dict)
    most: Mapping[str, float] = field(default_factory=dict)

    def check_names(self, metrics: Literal["auto"] | Sequence[str]) -> None:
        """Before the evaluation: raise ConfigError for a metric that is unknown, not measured, or gated on the wrong
        side."""
        for name in (*self.least, *self.most):
            higher = metric_named(name).higher_is_better
            if metrics != "auto" and name not in metrics:
                raise ConfigError(f"metric {name!r} has a gate but is not measured", hint=f"add --metric {name}")
            if name in (self.most if higher else self.least):
                better, flag, limit = ("higher", "--min", self.most) if higher else ("lower", "--max", self.least)
                raise ConfigError(f"{name}: {better} is better", hint=f"gate it with {flag} {name}={limit[name]:g}")

    def check(self, evaluation: Evaluation) -> None:
        """After it: raise QualityError for a score on the wrong side of its gate, ConfigError when there is none."""
        for name, limit in (*self.least.items(), *self.most.items()):
            if name not in evaluation.metrics:
                raise ConfigError(
                    f"metric {name!r} was not measured on these rows", hint=nearest(name, evaluation.metrics)
                )
            value = evaluation.metrics[name].mean
            if name in self.least and not value >= limit:
                raise QualityError(f"{name} is {value:.4f}, below the gate of {limit:g}")
            if name in self.most and not value <= limit:
                raise QualityError(f"{name} is {value:.4f}, above the gate of {limit:g}")


__all__ = ["Gates", "evaluate"]
