"""Prompt search: instructions and shots tried on rows of their own, the best told on rows that nobody has seen."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor.artifacts import artifact as artifacts
from tailor.artifacts.compatibility import describe_base
from tailor.config import dump_yaml, load_recipe
from tailor.data.dataset import Dataset, DataSettings, load_dataset
from tailor.data.prepare import split
from tailor.data.progress import Progress, silent
from tailor.data.records import Record
from tailor.errors import ConfigError, ConflictError, NotFoundError, nearest
from tailor.evaluation.task import Task
from tailor.inference.backend import Backend
from tailor.inference.hosted import HostedBackend
from tailor.inference.load import load
from tailor.inference.local import LocalBackend
from tailor.models.files import is_hosted
from tailor.recipes.prompt_candidates import Proposer, draw_shots
from tailor.recipes.prompt_journal import Journal
from tailor.recipes.prompt_reasoning import changed
from tailor.recipes.prompt_report import build_report, held_out
from tailor.recipes.prompt_score import Candidate, Room, Row, Scorer, find_metric, longest_answer, rows_of, task_of
from tailor.recipes.prompt_search import Search
from tailor.recipes.prompt_settings import PromptRecipe
from tailor.recipes.tune_save import labels_of
from tailor.recipes.tune_settings import OutputSettings, TuneRecipe
from tailor.runs import check_run_name, hold, home, versions
from tailor.store import write_json, write_text
from tailor.techniques.prompting import Prompting
from tailor.training.settings import TrainSettings

JOURNAL = "journal.jsonl"
REPORT = "report.json"
MANIFEST = "search.json"
BEST = "best.yaml"
DRAWN = 4
"""Shots of the prompt that is drawn without a search, as many as `prompting` has by default."""


@dataclass(frozen=True)
class PromptResult:
    """A finished search: its report, its folder (report.json, best.yaml), and the artifact that holds the best prompt.

    `artifact` is None when nothing was found that is worth saving.
    """

    report: dict[str, Any]
    folder: Path
    artifact: str | None


@dataclass(frozen=True)
class _Splits:
    """The rows: those that can become shots, those by which prompts are chosen, and those of the last report."""

    pool: list[Row]
    selection: list[Row]
    held_out: list[Row]
    task: Task
    labels: list[str] | None


def optimize_prompt(
    recipe: PromptRecipe | str | Path,
    overrides: Sequence[str] = (),
    *,
    backend: Backend | None = None,
    force: bool = False,
    progress: Progress = silent,
    say: Callable[[str], None] = lambda text: None,
) -> PromptResult:
    """Search a better prompt for a base and save it as an artifact. The same recipe again goes on where it stopped.

    `backend` is a base that is loaded already (or anything that answers); else the recipe's is loaded. Raises
    ConfigError for a budget that is too small, DataError for rows that cannot be used, and ConflictError when another
    search or an artifact of somebody else has the name, or the rows or the base have changed since it began.
    """
    if not isinstance(recipe, PromptRecipe):
        recipe = load_recipe(recipe, PromptRecipe, overrides).recipe
    elif overrides:
        raise ConfigError("overrides go with the path of a recipe; change a PromptRecipe with model_copy(update=…)")
    recipe = recipe.absolute()
    folder = _folder(recipe)
    with hold(folder, f"prompt search {recipe.name}"):
        if (done := _open(recipe, folder, force)) is not None:
            return done
        dataset = load_dataset(recipe.data, recipe.seed, progress)
        splits = _splits(recipe, dataset)
        backend = backend or _backend(recipe)
        force = _begun(folder, recipe, dataset, backend, force)
        journal = Journal(folder / JOURNAL, backend, recipe.budget)
        report, best = _search(recipe, splits, backend, journal, dataset, progress, say)
        saved = report["verdict"] in ("better", "no improvement beyond noise") and best is not None
        report["artifact"] = recipe.name if saved else None
        if saved and best is not None:
            _save(recipe, best, splits, dataset, backend, report, force)
        write_json(folder / REPORT, report)
        return PromptResult(report, folder, report["artifact"])


def _folder(recipe: PromptRecipe) -> Path:
    return home() / "prompts" / check_run_name(recipe.name)


def known() -> list[str]:
    """The names of all prompt searches."""
    return sorted(path.parent.name for path in (home() / "prompts").glob(f"*/{MANIFEST}"))


def resume_prompt(name: str, **options: Any) -> PromptResult:
    """Go on with an interrupted search, or show a finished one. Raises NotFoundError."""
    path = home() / "prompts" / check_run_name(name) / "recipe.yaml"
    if not path.is_file():
        raise NotFoundError(f"there is no prompt search {name!r}", hint=nearest(name, known()))
    return optimize_prompt(load_recipe(path, PromptRecipe).recipe, **options)


def _open(recipe: PromptRecipe, folder: Path, force: bool) -> PromptResult | None:
    """The result of a search that is finished; None for a new one, or one to go on with."""
    told, written = dump_yaml(recipe.model_dump(mode="json")), folder / "recipe.yaml"
    if (folder / MANIFEST).is_file() and not force:
        before = load_recipe(written, PromptRecipe).recipe.model_dump(mode="json")
        if others := [key for key, value in recipe.model_dump(mode="json").items() if value != before[key]]:
            raise ConflictError(
                f"there is a prompt search {recipe.name!r} with other settings: {', '.join(others)} ({folder})",
                hint="choose another --name, or use --force to replace it",
            )
        if (folder / REPORT).is_file():
            report: dict[str, Any] = json.loads((folder / REPORT).read_text("utf-8"))
            return PromptResult(report, folder, report["artifact"])
        return None
    if not artifacts.made_by(recipe.name, _maker(recipe)):
        artifacts.check_free(recipe.name, force)
    for name in (MANIFEST, JOURNAL, REPORT, BEST):
        (folder / name).unlink(missing_ok=True)
    write_text(written, told)
    return None


def _maker(recipe: PromptRecipe) -> str:
    """What an artifact says of the search that made it."""
    return f"prompt search {recipe.name}"


def _backend(recipe: PromptRecipe) -> Backend:
    base = recipe.base
    if not is_hosted(base.name) and base.name in {artifact.name for artifact in artifacts.every()}:
        raise ConfigError(f"{base.name} is an artifact, and prompts are searched for a base", hint="see --start")
    return load(base.name, device=base.device, dtype=base.dtype, quantize=base.quantize).backend


def _splits(recipe: PromptRecipe, dataset: Dataset) -> _Splits:
    """Three sides; no prompt stands on two of them. Raises DataError when there are too few rows."""
    data = recipe.data
    pool, selection = split(list(dataset.train), validation_fraction=data.selection_fraction, seed=recipe.seed + 1)
    sides = ((pool, data.max_pool), (selection, data.max_selection), (dataset.validation, data.max_held_out))
    drawn = [_drawn(records, most, recipe.seed) for records, most in sides]
    rows = [rows_of(records, recipe.answer_pattern) for records in drawn]
    task = task_of([row for side in rows for row in side], recipe.answer_pattern)
    return _Splits(rows[0], rows[1], rows[2], task, labels_of(dataset.train))


def _drawn(records: Sequence[Record], most: int, seed: int) -> list[Record]:
    """At most so many of the records, in their order."""
    chosen = range(len(records))
    if len(records) > most:
        chosen = sorted(random.Random(seed).sample(chosen, most))  # type: ignore[assignment]
    return [records[k] for k in chosen]


def _begun(folder: Path, recipe: PromptRecipe, dataset: Dataset, backend: Backend, force: bool) -> bool:
    """Write down what the journal's answers depend on; whether the artifact may replace another.

    Raises ConflictError when what was written down has changed since.
    """
    facts = {"data_hash": dataset.content_hash, **_described(recipe, backend)}
    path = folder / MANIFEST
    if path.is_file():
        before = json.loads(path.read_text("utf-8"))
        if changes := [f"{key} was {before[key]}, is {value}" for key, value in facts.items() if before[key] != value]:
            raise ConflictError(
                f"prompt search {recipe.name!r} cannot go on: {'; '.join(changes)}",
                hint="restore it, or start anew with --force",
            )
        return bool(before["force"]) or force
    write_json(path, {"search": recipe.name, "versions": versions(), "force": force, **facts})
    return force


def _described(recipe: PromptRecipe, backend: Backend) -> dict[str, str]:
    if isinstance(backend, LocalBackend):
        return describe_base(backend.base)
    return {"name": recipe.base.name, "fingerprint": ""}


def _search(
    recipe: PromptRecipe,
    splits: _Splits,
    backend: Backend,
    journal: Journal,
    dataset: Dataset,
    progress: Progress,
    say: Callable[[str], None],
) -> tuple[dict[str, Any], Prompting | None]:
    """The report, and the best prompt."""
    start = Candidate(_started(recipe, splits), "start")
    metric = find_metric(recipe, splits.task)
    every = [*splits.pool, *splits.selection, *splits.held_out]
    tokens = recipe.max_new_tokens or longest_answer(every, backend)
    room, pattern = Room.of(backend), recipe.answer_pattern
    scorer = Scorer(journal, metric, splits.task, pattern, tokens, _embed(backend), room, progress)
    journal.reserved = _reserve(recipe, splits, start)
    proposer = Proposer(recipe, splits.task, splits.pool, scorer)

    def fits(candidate: Candidate) -> bool:
        return all(room.fits(scorer.request(candidate, row)) for row in (*splits.selection, *splits.held_out))

    search = Search(proposer, scorer, splits.selection, start, recipe.rounds, fits, say)
    best = search.run()
    num_search_calls, journal.reserved = journal.num_calls, 0
    found = held_out(recipe, scorer, splits.held_out, start, best, _unsearched(recipe, splits, start, fits))
    sides = {"pool": len(splits.pool), "selection": len(splits.selection), "held_out": len(splits.held_out)}
    notes = [*dataset.notes, *(backend.notes if isinstance(backend, HostedBackend) else ())]
    facts = {"task": splits.task.reason, "rows": sides, "notes": notes}
    return build_report(recipe, search, best, found, facts, num_search_calls), best.technique


def _started(recipe: PromptRecipe, splits: _Splits) -> Prompting | None:
    """The prompt to begin with, with shots of the pool where it wants some and brings none."""
    if recipe.start is None:
        return None
    return recipe.start.prepare([row.record for row in splits.pool], recipe.seed)


def _unsearched(
    recipe: PromptRecipe, splits: _Splits, start: Candidate, fits: Callable[[Candidate], bool]
) -> Candidate | None:
    """What stands beside the best: shots that were drawn, not searched."""
    num = min(DRAWN, recipe.max_shots, len(splits.pool))
    if not num:
        return None
    shots = draw_shots(splits.pool, num, splits.task, f"{recipe.seed}/unsearched")
    drawn = Candidate(
        changed(start.technique, shots=num, examples=shots, selection="fixed"), f"{num} shots drawn without a search"
    )
    return drawn if fits(drawn) else None


def _reserve(recipe: PromptRecipe, splits: _Splits, start: Candidate) -> int:
    """Calls that the last report takes at most. Raises ConfigError when the budget has no room for a search as well."""
    own, most = start.calls_per_row, max(start.calls_per_row, recipe.votes)
    reserve = len(splits.held_out) * (own + most + (own if recipe.max_shots else 0))
    least = reserve + len(splits.selection) * 2 * most
    if recipe.budget < least:
        raise ConfigError(
            f"a budget of {recipe.budget} calls is too small: the report on {len(splits.held_out)} held-out rows takes "
            f"{reserve}, and trying one prompt beside the start on {len(splits.selection)} rows {least - reserve} more",
            hint=f"budget={least} or more, or fewer rows (data.max_held_out, data.max_selection)",
        )
    return reserve


def _embed(backend: Backend) -> Callable[[Sequence[str]], Any]:
    """Vectors of texts by the backend, each text once: candidates ask for the same ones again and again."""
    import torch

    kept: dict[str, Any] = {}

    def embed(texts: Sequence[str]) -> Any:
        if missing := [text for text in dict.fromkeys(texts) if text not in kept]:
            kept.update(zip(missing, backend.embed(missing), strict=True))
        return torch.stack([kept[text] for text in texts])

    return embed


def _save(
    recipe: PromptRecipe,
    best: Prompting,
    splits: _Splits,
    dataset: Dataset,
    backend: Backend,
    report: dict[str, Any],
    force: bool,
) -> None:
    """The artifact, and the recipe that makes it again without a search."""
    data = DataSettings(**recipe.data.model_dump(include=set(DataSettings.model_fields)))
    tuned = TuneRecipe(
        base=recipe.base,
        data=data,
        technique=(best,),
        train=TrainSettings(seed=recipe.seed),
        output=OutputSettings(name=recipe.name),
    ).model_dump(mode="json")
    write_text(_folder(recipe) / BEST, dump_yaml(tuned))
    facts = {
        "recipe": tuned,
        "objective": "sft",
        "data": {
            "content_hash": dataset.content_hash,
            "num_train": len(dataset.train),
            "num_validation": len(dataset.validation),
        },
        "labels": splits.labels,
        "notes": report["notes"],
        "run": _maker(recipe),
        "search": {key: report[key] for key in ("metric", "rows", "calls", "selection", "held_out", "verdict")},
    }
    force = force or artifacts.made_by(recipe.name, _maker(recipe))
    if isinstance(backend, LocalBackend):
        slot = backend.base.host.attach((best,))
        try:
            artifacts.save(recipe.name, backend.base, slot, (best,), facts, force=force)
        finally:
            backend.base.host.detach(slot)
    else:
        techniques = [best.model_dump(mode="json")]
        artifacts.save_hosted(recipe.name, recipe.base.name, {**facts, "techniques": techniques}, force=force)


__all__ = ["PromptResult", "known", "optimize_prompt", "resume_prompt"]
