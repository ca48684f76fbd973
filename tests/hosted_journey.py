"""Everything that is done with a hosted base, from the first question to its rows back home, at any endpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tailor.artifacts.artifact import Artifact
from tailor.evaluation.evaluate import EvalSettings, Evaluation
from tailor.inference.backend import SamplingParams
from tailor.inference.load import load
from tailor.recipes.evaluate import evaluate
from tailor.recipes.hosted_tune import HostedTuneRecipe, hosted_tune
from tailor.recipes.import_openai import Imported, import_openai

SHORT = SamplingParams(max_new_tokens=4)


@dataclass(frozen=True)
class Journey:
    """What it came to: scores of the plain model and the tuned one, its artifact, the rows at home, what was said."""

    before: Evaluation
    after: Evaluation
    artifact: Artifact
    imported: Imported
    said: list[str]


def hosted_journey(url: str, model: str, rows: Path, folder: Path, *, n_epochs: int = 1, poll: float = 0.05) -> Journey:
    """Ask `model` at `url` (a server on this machine needs no key), let it be tuned there, ask the result."""
    base = f"openai:{model}@{url}"
    settings = EvalSettings(metrics=("accuracy",), sampling=SHORT)
    assert isinstance(load(base).generate("hello", max_new_tokens=4), str)
    before = evaluate(base, rows, settings=settings)
    said: list[str] = []
    recipe = HostedTuneRecipe.model_validate(
        {"base": base, "data": {"train": str(rows)}, "name": "journey", "n_epochs": n_epochs, "suffix": "trip"}
    )
    artifact = hosted_tune(recipe, say=said.append, poll=poll)
    after = evaluate("journey", rows, settings=settings)
    imported = import_openai(str(artifact.manifest["run"]), folder / "home-again", place=base)
    return Journey(before, after, artifact, imported, said)
