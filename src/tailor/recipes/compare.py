"""Compare: which technique is best for these rows. One split, every technique, every column of the table measured."""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from tailor.artifacts import artifact as artifacts
from tailor.config import dump_yaml, load_recipe
from tailor.data.records import completion_of
from tailor.errors import ConfigError, ConflictError, DataError, NotFoundError, TailorError, nearest
from tailor.evaluation.comparison import build_report
from tailor.evaluation.drawing.html import render_html
from tailor.evaluation.drawing.markdown import render_markdown
from tailor.evaluation.evaluate import EvalSettings, Progress
from tailor.evaluation.scores import METRICS, metric_named
from tailor.evaluation.task import Task, answers_of, find_task, known_answers
from tailor.machine import describe_machine
from tailor.objectives import find_objective
from tailor.recipes.compare_bases import LOADED, check_unchanged, machine_facts, renderings
from tailor.recipes.compare_cells import Cell, Comparison
from tailor.recipes.compare_groups import GROUPS, split_off
from tailor.recipes.compare_measure import measure
from tailor.recipes.compare_probes import MERGED, passages, probe
from tailor.recipes.compare_rows import Rows, read_rows, sizes_of, that_fit, write_sides
from tailor.recipes.compare_settings import CompareRecipe
from tailor.runs import check_run_name, hold, home, versions
from tailor.store import write_json, write_text

FEW_LABELS = 20
"""Up to here every label is also scored for every row (`label_accuracy`): what a model knows, whatever it writes."""


@dataclass(frozen=True)
class CompareResult:
    """A finished comparison: its report as a dict, and the folder with report.json, report.html and report.md."""

    report: dict[str, Any]
    folder: Path

    def check(self) -> None:
        """Raise TailorError when every technique failed at every size: there is a report, but nothing to choose."""
        techniques = [row for row in self.report["rows"] if row["kind"] == "technique"]
        scored = {curve["id"] for curve in self.report["curves"] if curve["points"]}
        if techniques and all(row["status"] == "failed" and row["id"] not in scored for row in techniques):
            raise TailorError(
                f"all {len(techniques)} techniques failed" if len(techniques) > 1 else "the only technique failed",
                hint=f"the report says why: {self.folder / 'report.html'}; --retry measures them again",
            )


def compare(
    recipe: CompareRecipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    command: str = "",
    force: bool = False,
    retry: bool = False,
    progress: Progress = lambda stage, done, total: None,
    say: Callable[[str], None] = lambda text: None,
) -> CompareResult:
    """Measure every entry on the same rows. The same recipe again goes on where it stopped; `force` starts anew.

    A technique that fails takes its row; `retry` measures failed rows again. Raises ConfigError, DataError, and
    ConflictError when another comparison, or an artifact of somebody else, has the name.
    """
    if not isinstance(recipe, CompareRecipe):
        recipe = load_recipe(recipe, CompareRecipe, overrides).recipe
    elif overrides:
        raise ConfigError("overrides go with the path of a recipe; change a CompareRecipe with model_copy(update=…)")
    recipe = _absolute(recipe)
    folder = folder_of(recipe.name)
    with hold(folder, f"comparison {recipe.name}"):
        manifest = _open(recipe, folder, command, force)
        torch.set_num_threads(int(manifest["machine"]["num_threads"]))  # sums are rounded by how they are cut up
        comparison, manifest = _prepare(recipe, folder, manifest, progress, say)
        if retry:
            _forget_failures(comparison)
        try:
            measure(comparison)
            probes = probe(comparison)
            manifest = {**manifest, "status": "finished"}
            result = _report(manifest, comparison.cells(), probes, folder)
        except BaseException:
            write_json(folder / "comparison.json", {**manifest, "status": "interrupted"})
            raise
        write_json(folder / "comparison.json", manifest)  # last: whoever is finished has a report
        return result


def folder_of(name: str) -> Path:
    """Where a comparison lives. Raises ConfigError for what cannot be a folder's name."""
    return home() / "comparisons" / check_run_name(name)


def resume_comparison(name: str, **options: Any) -> CompareResult:
    """Go on with an interrupted comparison. Raises NotFoundError."""
    folder = folder_of(name)
    if not (folder / "recipe.yaml").is_file():
        raise NotFoundError(f"there is no comparison {name!r}", hint=nearest(name, known()))
    return compare(load_recipe(folder / "recipe.yaml", CompareRecipe).recipe, **options)


def known() -> list[str]:
    """The names of all comparisons."""
    return sorted(path.parent.name for path in (home() / "comparisons").glob("*/comparison.json"))


def unfinished() -> list[str]:
    """The names of comparisons that were interrupted or killed."""
    folders = [home() / "comparisons" / name for name in known()]
    return [f.name for f in folders if json.loads((f / "comparison.json").read_text("utf-8"))["status"] != "finished"]


def redraw(name_or_path: str | Path) -> CompareResult:
    """Draw report.html and report.md again from report.json alone. Raises NotFoundError, DataError."""
    path = Path(name_or_path).expanduser()
    if not path.is_file():
        path = folder_of(str(name_or_path)) / "report.json"
    if not path.is_file():
        raise NotFoundError(f"there is no report {str(name_or_path)!r}", hint=nearest(str(name_or_path), known()))
    try:
        report = json.loads(path.read_text("utf-8"))
        if report["schema_version"] != 1:
            raise DataError(f"{path}: schema {report['schema_version']} is not known to this version of tailor")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: not the report of a comparison: {error}") from None
    _draw(report, path.parent)
    return CompareResult(report, path.parent)


def _absolute(recipe: CompareRecipe) -> CompareRecipe:
    """The recipe with absolute paths, so that it can be gone on with from any folder."""
    paths = {key: getattr(recipe.data, key) for key in ("train", "validation", "test")}
    found = {key: str(Path(path).expanduser().absolute()) for key, path in paths.items() if path is not None}
    data = recipe.data.model_copy(update=found)
    text = recipe.general_text
    general = str(Path(text).expanduser().absolute()) if text is not None else None
    bases = tuple(base.absolute() for base in recipe.base)
    return recipe.model_copy(update={"base": bases, "data": data, "general_text": general})


def _open(recipe: CompareRecipe, folder: Path, command: str, force: bool) -> dict[str, Any]:
    """The manifest of a new comparison, or of the one that is gone on with."""
    text = dump_yaml(recipe.resolved())
    path = folder / "comparison.json"
    if path.is_file() and not force:
        if (folder / "recipe.yaml").read_text("utf-8") != text:
            raise ConflictError(
                f"there is a comparison {recipe.name!r} with other settings ({folder})",
                hint="choose another --name, or use --force to replace it",
            )
        manifest: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return {**manifest, "status": "running"}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    machine = {**describe_machine(), **machine_facts(recipe), "num_threads": torch.get_num_threads()}
    command = command or f"tailor compare {folder / 'recipe.yaml'}"
    own = {"name": recipe.name, "created": now, "status": "running", "command": command, "force": force}
    return {**own, "versions": versions(), "machine": machine, "recipe": recipe.resolved()}


def _clear(folder: Path) -> None:
    """Remove what an earlier comparison left; its manifest first: without one, the next start begins anew as well."""
    for name in ("comparison.json", GROUPS, LOADED, "report.json", "report.html", "report.md"):
        (folder / name).unlink(missing_ok=True)
    for name in ("cells", "probes", "passes", "data", MERGED):
        if (folder / name).exists():
            shutil.rmtree(folder / name)


def _forget_failures(comparison: Comparison) -> None:
    """Let what failed be measured again, and each of its bases probed again: the probes have not seen it, or failed."""
    failures = [Cell.of_facts(facts) for facts in comparison.cells() if facts["status"] == "failed"]
    for path in (comparison.folder / "probes").glob("*.json"):
        found = json.loads(path.read_text("utf-8"))
        if found["errors"] or any(cell.base == found["base"] for cell in failures):
            path.unlink()
    for place in {cell.of("") for cell in failures}:
        split_off(comparison.folder, place.key, [cell.name for cell in failures if cell.of("") == place])
    for cell in failures:
        cell.path(comparison.folder).unlink()


def _prepare(
    recipe: CompareRecipe, folder: Path, manifest: dict[str, Any], progress: Progress, say: Callable[[str], None]
) -> tuple[Comparison, dict[str, Any]]:
    """Rows, sizes, metrics; refuses what cannot work before anything is trained."""
    objective = find_objective(recipe.objective)
    passages(recipe.general_text)
    rows = read_rows(recipe.data, objective)
    if manifest.get("data", {}).get("content_hash", rows.content_hash) != rows.content_hash:
        raise ConflictError(
            f"the rows of comparison {recipe.name!r} have changed since it began",
            hint="restore them, or start anew with --force",
        )
    rows = that_fit(rows, renderings(recipe), recipe.data)
    sizes, notes = sizes_of(recipe.sizes, len(rows.train))
    if not recipe.save:
        notes.append("nothing is kept (save: false), so costs in use, mixed batches and forgetting are not measured")
    rows = dataclasses.replace(rows, notes=(*rows.notes, *notes))
    labels = tuple(sorted({completion_of(record) for record in (*rows.train, *rows.validation)}))
    task = _task(rows, labels, recipe.evaluation)
    settings = _settings(recipe, task)
    metric = _metric(recipe, task, settings)
    is_new = "data" not in manifest
    if recipe.save:
        missing = [cell for cell in _kept(recipe, sizes[-1]) if is_new or not cell.path(folder).is_file()]
        _check_artifacts(recipe, missing, force=bool(manifest.get("force")))
    if is_new:
        _clear(folder)
    else:
        check_unchanged(recipe, folder)
    dataset = write_sides(rows, rows.draw(sizes[-1], 0), folder / "data")
    comparison = Comparison(
        recipe, folder, rows, tuple(sizes), settings, task.kind, labels, objective, dataset, progress, say
    )
    write_text(folder / "recipe.yaml", dump_yaml(recipe.resolved()))
    manifest |= {"data": rows.describe(recipe.data), "metric": metric, "sizes": sizes}
    write_json(folder / "comparison.json", manifest)
    return comparison, manifest


def _task(rows: Rows, labels: Sequence[str], settings: EvalSettings) -> Task:
    references = [completion_of(record) for record in rows.test]
    answers = answers_of(rows.test, references, settings.answer_pattern)
    return find_task(references, answers, known_answers(labels, settings.answer_pattern)[0], settings.answer_pattern)


def _settings(recipe: CompareRecipe, task: Task) -> EvalSettings:
    """With `auto` the metrics that a comparison needs: fewer than an evaluation's, since there are many cells."""
    settings = recipe.evaluation
    if settings.metrics != "auto":
        return settings
    few = len(task.labels) <= FEW_LABELS and task.frame is not None
    names = {
        "labels": ["accuracy", "macro_f1", *(["label_accuracy"] if few else []), "perplexity"],
        "labels and text": ["accuracy", *(["label_accuracy"] if few else []), "rougeL", "perplexity"],
        "answers and text": ["accuracy", "rougeL", "perplexity"],
        "text": ["rougeL", "token_f1", "exact_match", "perplexity"],
    }[task.kind]
    return settings.model_copy(update={"metrics": tuple(names)})


def _metric(recipe: CompareRecipe, task: Task, settings: EvalSettings) -> str:
    """What decides. Raises ConfigError for a metric that has no score per row: ties could not be told."""
    if recipe.metric is None:
        usual = "rougeL" if task.kind == "text" else "accuracy"
        of_rows = [name for name in settings.metrics if METRICS[name].row is not None]
        return usual if usual in settings.metrics else [*of_rows, *settings.metrics][0]
    if metric_named(recipe.metric).row is None:
        rows = [name for name, metric in METRICS.items() if metric.row is not None]
        raise ConfigError(f"{recipe.metric} has no score per row: it cannot decide", hint=f"one of {', '.join(rows)}")
    if recipe.metric not in settings.metrics:
        raise ConfigError(
            f"metric {recipe.metric!r} is not among those measured: {', '.join(settings.metrics)}",
            hint=f"evaluation.metrics=[{', '.join([*settings.metrics, recipe.metric])}]",
        )
    return recipe.metric


def _kept(recipe: CompareRecipe, size: int) -> list[Cell]:
    """The cells whose customizations become artifacts."""
    return [Cell(base.name, entry.title, size, 0, True) for base in recipe.base for entry in recipe.techniques]


def _check_artifacts(recipe: CompareRecipe, cells: Sequence[Cell], *, force: bool) -> None:
    """Before anything is trained: the names that these will get must be possible, and free, or ours already."""
    for cell in cells:
        name = artifacts.check_name(recipe.artifact_name(str(cell.base), cell.name))
        if not artifacts.made_by(name, f"comparison {recipe.name}"):
            artifacts.check_free(name, force)


def _report(
    manifest: dict[str, Any], cells: Sequence[dict[str, Any]], probes: Sequence[dict[str, Any]], folder: Path
) -> CompareResult:
    report = build_report(manifest, cells, probes)
    write_json(folder / "report.json", report)
    _draw(report, folder)
    return CompareResult(report, folder)


def _draw(report: dict[str, Any], folder: Path) -> None:
    write_text(folder / "report.html", render_html(report))
    write_text(folder / "report.md", render_markdown(report))
