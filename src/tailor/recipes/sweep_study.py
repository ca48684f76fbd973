"""A sweep's study: what Optuna proposes, what it is told, and what it gives up. Kept in `study.jsonl` in the folder.

Each draw's random numbers come from (seed, number of the trial) alone, so that a sweep that was killed draws after its
resumption what it would have drawn.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tailor.errors import DataError, require
from tailor.models.dropout import stable_seed
from tailor.recipes.sweep_settings import HalvingPruning, MedianPruning, Pruning, SweepRecipe
from tailor.recipes.sweep_space import TECHNIQUE, Range, SearchSpace, coded
from tailor.store import write_bytes

JOURNAL = "study.jsonl"
TENTHS = 10
"""Losses are reported by the tenth of a trial's steps: trials of different lengths are compared at the same share."""

MIN_IMPORTANCE_TRIALS = 10
GOOD_TRIALS = 5
"""From so many finished trials on importances are estimated; so many at least count as good ones, up to a half."""


class _Alone:
    """The lock of a journal that nobody else writes: the folder is held by this process."""

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


class TrialStudy:
    """The trials of a sweep by number. Raises MissingDependencyError without Optuna, DataError for a damaged file."""

    def __init__(self, folder: Path, recipe: SweepRecipe) -> None:
        self._optuna: Any = require("optuna", "hpo")
        self._optuna.logging.set_verbosity(self._optuna.logging.WARNING)
        self._recipe = recipe
        path = folder / JOURNAL
        _drop_torn_line(path)
        try:
            from optuna.storages.journal import JournalFileBackend, JournalStorage

            storage = JournalStorage(JournalFileBackend(str(path), lock_obj=_Alone()))  # type: ignore[arg-type]
            self._study = self._optuna.create_study(
                storage=storage,
                study_name=recipe.name,
                direction="minimize",
                load_if_exists=True,
                pruner=self._pruner(recipe.pruner),
            )
        except (ValueError, KeyError) as error:
            raise DataError(f"{path}: the trials cannot be read: {error}", hint="start anew with --force") from None
        self._handles: dict[int, Any] = {}

    def all(self) -> list[Any]:
        """Optuna's frozen trials, in the order of their numbers. Not to be changed."""
        return list(self._study.get_trials(deepcopy=False))

    def unfinished(self) -> list[int]:
        """Numbers of trials that were begun."""
        return [trial.number for trial in self.all() if not trial.state.is_finished()]

    def draw(self) -> int:
        """Begin another trial with values drawn for it, in one line of the journal; its number."""
        known, space = self.all(), self._recipe.space
        number = len(known)
        with _quiet():
            scratch = self._optuna.create_study(direction="minimize", sampler=self._sampler(number))
            scratch.add_trials(known)
            trial = scratch.ask()
            titles = [one.title for one in space.alternatives]
            chosen = space.named(trial.suggest_categorical(TECHNIQUE, titles) if len(titles) > 1 else None)
            for key in chosen.places:
                _suggest(trial, key, space, whole=chosen.is_whole(key))
            running = self._optuna.trial.TrialState.RUNNING
            drawn = {"params": trial.params, "distributions": trial.distributions}
            self._study.add_trial(self._optuna.trial.create_trial(state=running, **drawn))
        return number

    def values(self, number: int) -> tuple[str, dict[str, Any]]:
        """What a trial has drawn: the alternative's title, and the value of each path."""
        space = self._recipe.space
        drawn = dict(self.all()[number].params)
        title = space.named(drawn.pop(TECHNIQUE, None)).title
        return title, {key: space.decoded(key, value) for key, value in drawn.items()}

    def report(self, number: int, share: float, loss: float) -> None:
        """Say the validation loss at a share of a trial's steps; the first within each tenth counts."""
        tenth = max(1, round(share * TENTHS))
        if math.isfinite(loss) and tenth not in self.all()[number].intermediate_values:
            self._handle(number).report(loss, tenth)

    def gives_up(self, number: int) -> bool:
        """Whether the pruner sees no hope for a trial, given what was reported."""
        with _quiet():
            return bool(self._handle(number).should_prune())

    def note(self, number: int, **facts: Any) -> None:
        """Keep facts about a trial that is not finished."""
        for key, value in facts.items():
            self._handle(number).set_user_attr(key, value)

    def finish(self, number: int, loss: float) -> None:
        """A trial came to its end with this validation loss."""
        self._study.tell(number, loss)

    def prune(self, number: int) -> None:
        """A trial was given up."""
        self._study.tell(number, state=self._optuna.trial.TrialState.PRUNED)

    def fail(self, number: int, error: Mapping[str, Any]) -> None:
        """A trial could not be trained."""
        self.note(number, error=dict(error))
        self._study.tell(number, state=self._optuna.trial.TrialState.FAIL)

    def state(self, number: int) -> str:
        """`running`, `complete`, `pruned` or `fail`."""
        return str(self.all()[number].state.name).lower()

    def best(self) -> Any | None:
        """The finished trial with the lowest validation loss, the first of equals; None when there is none."""
        complete = [trial for trial in self.all() if trial.state.name == "COMPLETE"]
        return min(complete, key=lambda trial: (trial.value, trial.number), default=None)

    def importance(self) -> dict[str, float]:
        """Each path's share of what decided between good trials and others; empty with too few trials.

        PED-ANOVA: Watanabe et al. 2023, arXiv:2304.10255, for paths of single techniques as well.
        """
        complete = [trial for trial in self.all() if trial.state.name == "COMPLETE"]
        if len(complete) < MIN_IMPORTANCE_TRIALS or len({trial.value for trial in complete}) < 2:
            return {}
        importance = self._optuna.importance
        good = max(0.1, min(0.5, GOOD_TRIALS / len(complete)))
        with _quiet():
            evaluator = importance.PedAnovaImportanceEvaluator(target_quantile=good)
            found = importance.get_param_importances(self._study, evaluator=evaluator)
        return {str(key): float(value) for key, value in found.items()}

    def _handle(self, number: int) -> Any:
        if number not in self._handles:
            self._handles[number] = self._optuna.trial.Trial(self._study, self.all()[number]._trial_id)
        return self._handles[number]

    def _sampler(self, number: int) -> Any:
        """TPE (Bergstra et al. 2011) seeded for one trial; the first trial of each technique starts at its defaults."""
        seed = stable_seed(f"sweep/{self._recipe.seed}/{number}") % 2**32
        space, samplers = self._recipe.space, self._optuna.samplers
        with _quiet():
            sampler = samplers.TPESampler(seed=seed, constant_liar=True)
            if number < len(space.alternatives):
                start = space.start(space.alternatives[number], self._recipe.train)
                sampler = samplers.PartialFixedSampler(start, sampler)
        return sampler

    def _pruner(self, settings: Pruning) -> Any:
        pruners = self._optuna.pruners
        if isinstance(settings, MedianPruning):
            return pruners.MedianPruner(n_startup_trials=settings.startup_trials, n_warmup_steps=settings.warmup)
        if isinstance(settings, HalvingPruning):
            return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=settings.reduction)
        return pruners.NopPruner()


def _suggest(trial: Any, key: str, space: SearchSpace, *, whole: bool) -> None:
    values = space.spaces[key]
    if not isinstance(values, Range):
        trial.suggest_categorical(key, [coded(value) for value in values])
    elif whole:
        trial.suggest_int(key, int(values.low), int(values.high), log=values.log)
    else:
        trial.suggest_float(key, values.low, values.high, log=values.log)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's remarks on which of its parts may still change."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="optuna")
        warnings.filterwarnings("ignore", message=".*is experimental")
        yield


def _drop_torn_line(path: Path) -> None:
    """Cut what a kill left after the last newline: Optuna takes no more lines behind it."""
    if path.is_file() and (content := path.read_bytes()) and not content.endswith(b"\n"):
        write_bytes(path, content[: content.rfind(b"\n") + 1])
