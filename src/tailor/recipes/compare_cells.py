"""The cells of a comparison, one file per result; and the trials that a cell is chosen from, attached to a base."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tailor.data.dataset import Dataset
from tailor.data.examples import Bundle, Rendering
from tailor.data.records import Record
from tailor.errors import ConfigError, DataError, InterruptedRunError, TailorError
from tailor.evaluation.evaluate import EvalSettings, Evaluation, Progress
from tailor.evaluation.task import Kind
from tailor.models.base import Base
from tailor.models.slots import Slot
from tailor.objectives.objective import Objective
from tailor.recipes.compare_rows import RESERVE, Draw, Rows, does_not_fit
from tailor.recipes.compare_settings import CompareRecipe, Entry
from tailor.recipes.prompt_reasoning import bootstrapped
from tailor.recipes.tune_prepare import bundles_of
from tailor.recipes.verify import rendering_for
from tailor.store import write_json
from tailor.techniques import Technique
from tailor.techniques.technique import training_defaults
from tailor.training.settings import Resolved, TrainSettings, resolve_settings
from tailor.training.trainer import SlotRun

RATE_FACTORS = (1.0, 3.0, 1 / 3)
"""Learning rates of a tuning budget, relative to the technique's own."""


NOTHING: Mapping[str, Any] = {
    "error": None,
    "settings": [],
    "traits": None,
    "num_parameters": 0,
    "base_parameters": None,
    "training": None,
    "trials": [],
    "evaluation": None,
    "outcomes": [],
    "artifact": None,
    "artifact_bytes": None,
    "notes": [],
}
"""What a cell says of which nothing is known."""


@dataclass(frozen=True)
class Comparison:
    """A comparison under way: what every step needs to know. `dataset` are the files of the largest draw of seed 0."""

    recipe: CompareRecipe
    folder: Path
    rows: Rows
    sizes: tuple[int, ...]
    settings: EvalSettings
    kind: Kind
    labels: tuple[str, ...]
    objective: Objective
    dataset: Dataset
    progress: Progress
    say: Callable[[str], None]

    def cell(self, base: str | None, name: str, size: int, seed: int) -> Cell:
        """The place of a measurement. The main one of a technique has the most rows and the first seed."""
        return Cell(base, name, size, seed, size == self.sizes[-1] and seed == 0)

    def is_missing(self, cell: Cell) -> bool:
        """Whether it has not been measured yet."""
        return not cell.path(self.folder).is_file()

    def cells(self) -> list[dict[str, Any]]:
        """All that has been measured so far."""
        return [json.loads(path.read_text("utf-8")) for path in sorted((self.folder / "cells").glob("*.json"))]


@dataclass(frozen=True)
class Cell:
    """One measurement: an entry on a base, learning from `size` rows, with one seed. Baselines have no base."""

    base: str | None
    name: str
    size: int
    seed: int
    main: bool

    @classmethod
    def of_facts(cls, facts: Mapping[str, Any]) -> Cell:
        """The place of a cell that was read from its file."""
        return cls(**{place.name: facts[place.name] for place in dataclasses.fields(cls)})

    def of(self, name: str) -> Cell:
        """The cell of another entry at the same place."""
        return dataclasses.replace(self, name=name)

    @property
    def key(self) -> str:
        """Its name in progress lines and checkpoints."""
        return f"{self.base or 'baseline'}/{self.name}/{self.size}/{self.seed}"

    def path(self, folder: Path) -> Path:
        """Its file; names of bases may be paths, so they are hashed where they are no file names."""
        digest = hashlib.sha256(self.key.encode()).hexdigest()[:8]
        readable = "".join(c if c.isalnum() or c in "-_." else "-" for c in f"{self.name}-{self.size}-{self.seed}")
        return folder / "cells" / f"{readable}-{digest}.json"

    def write(self, folder: Path, kind: str, facts: Mapping[str, Any]) -> None:
        """Keep what was found, atomically; what `facts` leaves out is null or empty."""
        own = {"status": "ok", "kind": kind, **dataclasses.asdict(self)}
        write_json(self.path(folder), {**NOTHING, **own, **facts})


def measured(evaluation: Evaluation) -> dict[str, Any]:
    """The part of a cell that an evaluation fills."""
    return {
        "evaluation": evaluation.to_dict(),
        "outcomes": [
            {k: v for k, v in dataclasses.asdict(row).items() if k != "finish_reason"} for row in evaluation.rows
        ],
    }


def failed(error: BaseException) -> dict[str, Any]:
    """The part of a cell that an error fills: the row says what happened, and the comparison goes on."""
    if isinstance(error, TailorError):
        told = {"code": error.code, "message": error.message, "hint": error.hint}
    else:
        told = {"code": "failure", "message": f"{type(error).__name__}: {error}"[:500], "hint": None}
    return {"status": "failed", "error": told}


def takes_its_row(error: BaseException) -> bool:
    """Whether an error belongs to one technique. Interruptions and a full disk end the run instead."""
    return isinstance(error, Exception) and not isinstance(error, InterruptedRunError | OSError)


@dataclass
class Trial:
    """One entry with one choice of settings, on a slot; `run` is None when nothing is trained, or all of it is done.

    `settings` are those of the `techniques` without what these took from the rows (shots).
    """

    entry: Entry
    label: str
    settings: tuple[Technique, ...]
    techniques: tuple[Technique, ...]
    slot: Slot
    rendering: Rendering
    validation: Sequence[Bundle]
    notes: list[str]
    run: SlotRun | None = None
    trained_with: TrainSettings | None = None
    validation_loss: float | None = None
    training: dict[str, Any] | None = None
    error: BaseException | None = None

    @property
    def rank(self) -> tuple[bool, float]:
        """Lower is better: what failed comes last, then by validation loss."""
        return self.error is not None, float("inf") if self.validation_loss is None else self.validation_loss

    def told(self) -> dict[str, Any]:
        """What the cell says of it, whether it was chosen or not."""
        return {
            "label": self.label,
            "validation_loss": self.validation_loss,
            "seconds": (self.training or {}).get("seconds"),
            "error": str(self.error) if self.error else None,
        }


@dataclass(frozen=True)
class Choice:
    """Settings to try: what changes in the (last) technique, in the rate, or in the initialisation."""

    label: str = "defaults"
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rate: float = 1.0
    seed: int = 0


def choices(entry: Entry, recipe: CompareRecipe) -> list[Choice]:
    """The entry's share of the tuning budget, the same number for all: rates, the technique's alternatives, seeds."""
    last = entry.technique[-1]
    found = [Choice()]
    if not recipe.tune:
        return found
    if last.traits.defaults is not None:
        found += [Choice(f"learning rate × {rate:.2g}", rate=rate) for rate in RATE_FACTORS[1:]]
    for changes in last.alternatives:
        if _can_change(last, changes):
            found.append(Choice(", ".join(f"{key} {value}" for key, value in changes.items()), changes))
    found += [Choice(f"initialisation {k}", seed=k) for k in range(1, recipe.trials)]
    return found[: recipe.trials]


def _can_change(technique: Technique, changes: Mapping[str, Any]) -> bool:
    """Whether the alternative is another one than the user's own choice, and goes with the rest of it."""
    if all(getattr(technique, key) == value for key, value in changes.items()):
        return False
    try:
        type(technique).model_validate({**technique.model_dump(), **changes})
    except ValueError:
        return False
    return True


def attach_trials(
    comparison: Comparison, base: Base, entry: Entry, chosen: Sequence[Choice], draw: Draw, seed: int
) -> list[Trial]:
    """The entry's trials, each attached to the base and ready to be trained; none of them when one cannot be."""
    trials: list[Trial] = []
    try:
        for choice in chosen:
            trials.append(_attach(comparison, base, entry, choice, draw, seed))
    except BaseException:
        for trial in trials:
            base.host.detach(trial.slot)
        raise
    return trials


def _attach(comparison: Comparison, base: Base, entry: Entry, choice: Choice, draw: Draw, seed: int) -> Trial:
    own_seed = comparison.recipe.train_of(entry).seed + seed + 1000 * choice.seed
    *others, last = entry.technique
    changed = type(last).model_validate({**last.model_dump(), **choice.changes})
    settings, techniques, slot, notes = _fitting(comparison, base, (*others, changed), own_seed, draw)
    try:
        rendering = rendering_for(comparison.recipe.data, base, slot)
        validation = bundles_of(draw.validation, comparison.objective, rendering)[0]
        trial = Trial(entry, choice.label, settings, techniques, slot, rendering, validation, notes)
        if slot.parameters:
            train = bundles_of(draw.train, comparison.objective, rendering)[0]
            how, resolved = _train_settings(comparison.recipe, entry, base, len(train), choice, own_seed)
            name = f"{entry.title}/{choice.label}"
            trial.run = SlotRun(name, slot, comparison.objective, train, validation, how, resolved)
        return trial
    except BaseException:
        base.host.detach(slot)
        raise


def _train_settings(
    recipe: CompareRecipe, entry: Entry, base: Base, num_rows: int, choice: Choice, seed: int
) -> tuple[TrainSettings, Resolved]:
    settings = recipe.train_of(entry).model_copy(update={"seed": seed})
    resolved = resolve_settings(settings, training_defaults(entry.technique), num_rows, base.host.embedding_rms())
    rate = resolved.learning_rate * choice.rate
    settings = settings.model_copy(update={"learning_rate": rate})
    return settings, dataclasses.replace(resolved, learning_rate=rate)


def _fitting(
    comparison: Comparison, base: Base, wanted: tuple[Technique, ...], seed: int, draw: Draw
) -> tuple[tuple[Technique, ...], tuple[Technique, ...], Slot, list[str]]:
    """Attach the largest form of the techniques that these rows suffice for and every row fits with (shots take room).

    Returns its settings, the techniques with what they took from the rows, the slot, and notes.
    """
    settings = wanted
    notes: list[str] = []
    while True:
        obstacle: TailorError
        try:
            techniques = bootstrapped(tuple(technique.prepare(draw.train, seed) for technique in settings), base)
        except ConfigError as error:
            obstacle, why = error, f" ({error.message})"
        else:
            slot = base.host.attach(techniques, seed=seed)
            long = _too_long(comparison, base, slot, draw)
            if long is None:
                return settings, techniques, slot, notes
            base.host.detach(slot)
            obstacle, why = _no_room(long, base), ", so that every row fits into the context"
        smaller = tuple(technique.smaller() or technique for technique in settings)
        if smaller == settings:
            raise obstacle
        settings, notes = smaller, [f"reduced to {_changes(wanted, smaller)}{why}"]


def _too_long(comparison: Comparison, base: Base, slot: Slot, draw: Draw) -> Record | None:
    """The first row that does not fit with what the slot adds: of those it answers, and of those it learns from."""
    if slot.compose is None and len(slot.virtual_ids) + slot.num_prefix <= RESERVE:
        return None  # every row that is looked at was chosen to fit with so many tokens in front of it
    rows = list(comparison.rows.test)
    if comparison.recipe.data.truncation != "prompt":
        rows += [*draw.validation, *(draw.train if slot.parameters else ())]
    try:
        return does_not_fit(rows, rendering_for(comparison.recipe.data, base, slot))
    except BaseException:
        base.host.detach(slot)
        raise


def _no_room(record: Record, base: Base) -> DataError:
    return DataError(
        f"{record.source}: with what this technique adds, the row does not fit into {base.max_seq_len} tokens",
        hint="shorter rows, fewer shots or virtual tokens, or a base with a longer context",
    )


def _changes(before: Sequence[Technique], after: Sequence[Technique]) -> str:
    pairs = [(one.model_dump(), other.model_dump()) for one, other in zip(before, after, strict=True)]
    return ", ".join(f"{key} {now[key]}" for was, now in pairs for key in now if was[key] != now[key])
