"""The lines of a hosted base in a comparison: the base, and prompting; the others need its weights and say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tailor.artifacts.artifact import save_hosted
from tailor.errors import ConfigError
from tailor.evaluation.evaluate import EvalSettings, evaluate
from tailor.evaluation.hosted_passes import unscored
from tailor.inference.hosted import HostedBackend, HostedCustomization
from tailor.inference.hosted_endpoint import Endpoint, hosted_endpoint
from tailor.recipes.compare_cells import Cell, Comparison, failed, measured, takes_its_row
from tailor.recipes.compare_rows import Draw
from tailor.recipes.compare_settings import Entry
from tailor.techniques.prompting import Prompting


def measure_hosted(comparison: Comparison, base: str, draws: Sequence[tuple[int, int]]) -> None:
    """Fill in the missing cells of a hosted base. An error takes its row, as with a base that is here."""
    endpoint = hosted_endpoint(base)
    cell = comparison.cell(base, "base", comparison.sizes[-1], 0)
    if comparison.is_missing(cell):
        facts: dict[str, Any] = {"rows": {"train": 0, "validation": 0}}
        _measure(comparison, cell, "base", facts, lambda: _answers(comparison, endpoint, None, cell))
    for size, seed in draws:
        draw = comparison.rows.draw(size, seed)
        for entry in comparison.recipe.techniques:
            cell = comparison.cell(base, entry.title, size, seed)
            if comparison.is_missing(cell):
                _entry(comparison, endpoint, entry, draw, cell)


def _entry(comparison: Comparison, endpoint: Endpoint, entry: Entry, draw: Draw, cell: Cell) -> None:
    traits = [technique.traits for technique in entry.technique]
    facts: dict[str, Any] = {
        "settings": [technique.model_dump(mode="json") for technique in entry.technique],
        "traits": {
            "trains": ", ".join(t.trains for t in traits),
            "where": ", ".join(t.where for t in traits),
            **{name: all(getattr(t, name) for t in traits) for name in ("frozen_base", "merges", "mixes", "peft")},
        },
        "rows": {"train": len(draw.train), "validation": len(draw.validation)},
    }

    def found() -> dict[str, Any]:
        prompting, notes = prepared(prompting_of(entry.technique, endpoint), draw, cell.seed, comparison)
        own = {**facts, "settings": [prompting.model_dump(mode="json", exclude={"examples"})]}
        own |= _answers(comparison, endpoint, prompting, cell)
        if comparison.recipe.tune:
            notes.append("its settings are not tuned: that takes a loss on validation rows")
        own["notes"] = [*notes, *own["notes"]]
        if cell.main and comparison.recipe.save:
            own |= _keep(comparison, endpoint, prompting, cell)
        return own

    _measure(comparison, cell, "technique", facts, found)


def _measure(comparison: Comparison, cell: Cell, kind: str, facts: dict[str, Any], found: Any) -> None:
    try:
        facts = {**facts, **found()}
    except Exception as error:
        if not takes_its_row(error):
            raise
        comparison.say(f"{cell.key}: {error}")
        facts = {**facts, **failed(error)}
    cell.write(comparison.folder, kind, facts)


def prompting_of(techniques: Sequence[Any], endpoint: Endpoint) -> Prompting:
    """The prompting among an entry's techniques. Raises ConfigError naming those that need the base's weights."""
    if others := [technique.type for technique in techniques if not isinstance(technique, Prompting)]:
        raise ConfigError(
            f"{' and '.join(others)} needs the base's weights, and {endpoint.name} is hosted",
            hint="on a hosted base: prompting; or let its provider tune it: tailor hosted tune",
        )
    (prompting,) = techniques
    assert isinstance(prompting, Prompting)
    return prompting


def prepared(wanted: Prompting, draw: Draw, seed: int, comparison: Comparison) -> tuple[Prompting, list[str]]:
    """The prompting with its shots, as many as the rows suffice for, and a note when they are fewer."""
    seed += comparison.recipe.train.seed
    settings = wanted
    while True:
        try:
            found = settings.prepare(draw.train, seed)
            notes = [] if settings is wanted else [f"reduced to shots {settings.shots}"]
            return found, notes
        except ConfigError:
            smaller = settings.smaller()
            if smaller is None:
                raise
            settings = smaller


def _answers(comparison: Comparison, endpoint: Endpoint, prompting: Prompting | None, cell: Cell) -> dict[str, Any]:
    own = {} if prompting is None else {cell.name: HostedCustomization(prompting=prompting)}
    backend = HostedBackend(endpoint, own)
    settings, notes = _possible(comparison.settings, backend)

    def tell(stage: str, done: int, total: int) -> None:
        comparison.progress(f"{cell.key}: {stage}", done, total)

    evaluation = evaluate(
        backend,
        None if prompting is None else cell.name,
        comparison.rows.test,
        settings=settings,
        labels=comparison.labels,
        progress=tell,
    )
    return {"notes": notes, **measured(evaluation)}


def _possible(settings: EvalSettings, backend: HostedBackend) -> tuple[EvalSettings, list[str]]:
    """The metrics that can be had there; what is left out is noted."""
    reasons = {metric: reason for metric in settings.metrics if (reason := unscored(backend, metric))}
    kept = tuple(metric for metric in settings.metrics if metric not in reasons)
    if not kept:
        raise ConfigError(f"nothing can be measured: {next(iter(reasons.values()))}")
    return settings.model_copy(update={"metrics": kept}), [f"no {name}: {why}" for name, why in reasons.items()]


def _keep(comparison: Comparison, endpoint: Endpoint, prompting: Prompting, cell: Cell) -> dict[str, Any]:
    """Save the prompt under the comparison's name; what is loaded by it asks the endpoint."""
    recipe = comparison.recipe
    name = recipe.artifact_name(str(cell.base), cell.name)
    facts = {
        "techniques": [prompting.model_dump(mode="json")],
        "run": f"comparison {recipe.name}",
        "objective": recipe.objective,
        "data": {
            "content_hash": comparison.dataset.content_hash,
            "num_train": len(comparison.dataset.train),
            "num_validation": len(comparison.dataset.validation),
        },
        "labels": list(comparison.labels) if comparison.kind == "labels" else None,
    }
    artifact = save_hosted(name, endpoint.name, facts, force=True)
    size = sum(path.stat().st_size for path in artifact.folder.rglob("*") if path.is_file())
    return {"artifact": name, "artifact_bytes": size}
