"""What a sweep searches: paths of settings, the values each may take, and which of them go with which technique.

A path is `train.batch_size` (all trials), `technique.rank` (every technique that has a rank), or begins with a
technique's type: `lora.rank`, `lora.train.learning_rate` (trials of that technique alone; it wins over the others).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Self, Union, get_args, get_origin

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from tailor.config import Strict
from tailor.errors import nearest
from tailor.explain import explain, show
from tailor.techniques import TECHNIQUES, Technique, TechniqueList
from tailor.training.settings import TrainSettings

TECHNIQUE = "technique"
"""The path that chooses among techniques, and the first part of those that belong to whichever is chosen."""

FIXED = {
    "seed": "it decides the split, and all trials must see the same rows",
    "tensorboard": "a sweep writes no TensorBoard events",
    "tokens_per_batch": "it is about memory and changes no result",
    "checkpoint_every": "it changes no result",
}
"""Settings of `train` that are not searched, and why."""

Problem = tuple[tuple[str | int, ...], str]
"""Where in the recipe, and what is wrong there."""


class Range(Strict):
    """Every number from `low` to `high`, whole ones where the setting is a whole number."""

    low: int | float = Field(description="the smallest value")
    high: int | float = Field(description="the largest value")
    log: bool = Field(False, description="draw evenly by order of magnitude")
    relative: bool = Field(False, description="low and high are multiples of the technique's own learning rate")

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.low >= self.high:
            raise ValueError(f"low must be less than high, got low {self.low:g} and high {self.high:g}")
        if (self.log or self.relative) and self.low <= 0:
            raise ValueError(f"low must be greater than 0 with log or relative, got {self.low:g}")
        return self


def _several(value: Any) -> Any:
    if isinstance(value, Range | Mapping):
        return value
    if not isinstance(value, list | tuple):
        raise ValueError(f"wants a list of values or {{low, high}}, got {show(value)}; what is fixed stands outside")
    if len({_coded(one) for one in value}) < 2:
        raise ValueError("one value is no search: give at least two different ones, or set it outside of `search`")
    return value


Space = Annotated[Range | tuple[Any, ...], BeforeValidator(_several)]
"""The values that a setting may take: a list, or `{low, high}`."""

OWN_RATE = Range(low=0.3, high=3.0, log=True, relative=True)
"""Where a learning rate is looked for unless the recipe says otherwise: around the technique's measured default."""


@dataclass(frozen=True)
class Place:
    """Where a value goes: into a part of the technique list (None: into `train`), at a path of settings."""

    part: int | None
    path: tuple[str, ...]


@dataclass(frozen=True)
class Alternative:
    """A technique (or several on one slot) that trials may use, and what is searched for it, by path."""

    title: str
    techniques: tuple[Technique, ...]
    places: Mapping[str, Place]

    def settings(self, values: Mapping[str, Any], train: TrainSettings) -> tuple[tuple[Technique, ...], TrainSettings]:
        """Techniques and training settings with these values, by path. Raises ValidationError for what cannot be."""
        parts: list[dict[str, Any]] = [technique.model_dump() for technique in self.techniques]
        how = train.model_dump()
        for key, value in values.items():
            place = self.places[key]
            if place.part is not None:
                parts[place.part] = _put(parts[place.part], place.path, value)
            else:
                if place.path[0] in ("num_epochs", "num_steps"):  # two ways to say one thing: either replaces both
                    how |= {"num_epochs": None, "num_steps": None}
                how = _put(how, place.path, value)
        made = [type(one).model_validate(part) for one, part in zip(self.techniques, parts, strict=True)]
        return tuple(made), TrainSettings.model_validate(how)

    def now(self, key: str, train: TrainSettings) -> Any:
        """What a path's setting is without a search; None where that follows from the rows."""
        place = self.places[key]
        node: Any = (train if place.part is None else self.techniques[place.part]).model_dump()
        for name in place.path:
            node = node.get(name) if isinstance(node, Mapping) else None
        return node

    def is_whole(self, key: str) -> bool:
        """Whether a path's setting is a whole number."""
        place = self.places[key]
        model = TrainSettings if place.part is None else type(self.techniques[place.part])
        kinds = list(_kinds(model.model_fields[place.path[0]].annotation))
        return len(place.path) == 1 and int in kinds and float not in kinds


@dataclass(frozen=True)
class SearchSpace:
    """All that may be drawn: one of the alternatives, and a value for each of its paths."""

    alternatives: tuple[Alternative, ...]
    spaces: Mapping[str, Range | tuple[Any, ...]]

    def named(self, title: str | None) -> Alternative:
        """The alternative that a trial has drawn; the only one where there was nothing to draw."""
        return next((one for one in self.alternatives if one.title == title), self.alternatives[0])

    def decoded(self, key: str, drawn: Any) -> Any:
        """The value of a drawn one: lists and mappings are drawn by their JSON."""
        space = self.spaces[key]
        return drawn if isinstance(space, Range) else next(one for one in space if coded(one) == drawn)

    def start(self, alternative: Alternative, train: TrainSettings) -> dict[str, Any]:
        """What of the alternative's own settings can be drawn: the first trial of each begins there."""
        found: dict[str, Any] = {TECHNIQUE: alternative.title} if len(self.alternatives) > 1 else {}
        for key in alternative.places:
            space, value = self.spaces[key], alternative.now(key, train)
            if isinstance(space, Range) and space.relative:
                value = 1.0
            if isinstance(space, Range):
                if isinstance(value, int | float) and space.low <= value <= space.high:
                    found[key] = value
            elif value is not None and _coded(value) in {_coded(one) for one in space}:
                found[key] = coded(next(one for one in space if _coded(one) == _coded(value)))
        return found


def coded(value: Any) -> Any:
    """A value as it is drawn: plain ones as they are, others as JSON."""
    return value if value is None or isinstance(value, bool | int | float | str) else _coded(value)


def flattened(search: Any, before: str = "") -> Any:
    """Nested mappings as dotted paths: `{train: {batch_size: [4, 8]}}` is `{train.batch_size: [4, 8]}`."""
    if not isinstance(search, Mapping):
        return search
    found: dict[str, Any] = {}
    for key, value in search.items():
        nests = isinstance(value, Mapping) and any(isinstance(one, Mapping | list | tuple) for one in value.values())
        found |= flattened(value, f"{before}{key}.") if nests else {f"{before}{key}": value}
    return found


def space_of(
    technique: Sequence[Technique] | None, search: Mapping[str, Range | tuple[Any, ...]], train: TrainSettings
) -> tuple[SearchSpace, list[Problem]]:
    """The space of a recipe, and all that is wrong with it. Without paths every technique's own space is searched."""
    lists, problems = _lists(technique, search)
    spaces = {key: space for key, space in search.items() if key != TECHNIQUE}
    if not spaces:
        spaces = _own_spaces(lists, train)
        if lists and not spaces and len(lists) == 1:
            told = "nothing is left to search: the recipe fixes all that the technique has a space of its own for"
            problems.append((("search",), told))
    found: dict[str, dict[str, Place]] = {title: {} for title in lists}
    for key in spaces:
        try:
            for title, place in _places(key, lists).items():
                found[title][key] = place
        except ValueError as error:
            problems.append((("search", key), str(error)))
    alternatives = tuple(Alternative(title, lists[title], _winning(places)) for title, places in found.items())
    space = SearchSpace(alternatives, spaces)
    for one in alternatives:
        lengths = [
            key for key, place in one.places.items() if place in (_train_place("num_epochs"), _train_place("num_steps"))
        ]
        if len(lengths) > 1:
            problems.append((("search", lengths[0]), f"{lengths[1]} is searched too: one would have no effect"))
    for key in spaces:
        users = [one for one in alternatives if key in one.places]
        if not users and not any(where == ("search", key) for where, _ in problems):
            problems.append((("search", key), "has no effect: every technique has a space of its own for it"))
        problems += [(("search", key), told) for told in dict.fromkeys(_wrong_values(space, key, users, train))]
    return space, problems


class _Entry(Strict):
    technique: TechniqueList


def _lists(
    technique: Sequence[Technique] | None, search: Mapping[str, Any]
) -> tuple[dict[str, tuple[Technique, ...]], list[Problem]]:
    """The technique lists that trials choose from, by title."""
    problems: list[Problem] = []
    lists: dict[str, tuple[Technique, ...]] = {}
    if technique is not None and TECHNIQUE in search:
        return {}, [((TECHNIQUE,), "search.technique is given too: this one would have no effect")]
    if technique is None and isinstance(search.get(TECHNIQUE), Range):
        return {}, [(("search", TECHNIQUE), "wants a list of techniques, got a range")]
    alone: Any = technique or "lora"
    wanted = list(search[TECHNIQUE]) if TECHNIQUE in search else [alone]
    for number, entry in enumerate(wanted):
        where: tuple[str | int, ...] = ("search", TECHNIQUE, number) if TECHNIQUE in search else (TECHNIQUE,)
        try:
            parts = _Entry.model_validate({TECHNIQUE: entry}).technique
        except ValidationError as error:
            told = explain(error, _Entry, {TECHNIQUE: entry})
            problems += [(where, ": ".join((*path[1:], message))) for path, message in told]
            continue
        if refusal := _refusal(parts):
            problems.append((where, refusal))
        title = "+".join(part.type for part in parts)
        while title in lists:
            stem, _, last = title.rpartition(" ")
            title = f"{stem} {int(last) + 1}" if last.isdecimal() else f"{title} 2"
        lists[title] = parts
    return lists, problems


def _refusal(parts: Sequence[Technique]) -> str | None:
    for part in parts:
        if not part.traits.frozen_base:
            return (
                f"{part.type} changes the base itself and cannot share it with other trials: "
                "`tailor compare --tune` tries settings of it on copies of the base"
            )
    if all(part.traits.defaults is None for part in parts):
        return f"{parts[0].type} trains nothing, so there is nothing to search: `tailor compare` measures it"
    return None


def _own_spaces(lists: Mapping[str, Sequence[Technique]], train: TrainSettings) -> dict[str, Range | tuple[Any, ...]]:
    """What each technique says is worth searching, as far as it goes with its other settings; its learning rate.

    What the recipe sets to something else than the default is fixed.
    """
    found: dict[str, Range | tuple[Any, ...]] = {}
    for parts in lists.values():
        for part in parts:
            alone = len(lists) == 1 and len(parts) == 1
            for name, choices in part.search.items():
                fixed = getattr(part, name) != type(part).model_fields[name].get_default(call_default_factory=True)
                possible = [value for value in choices if _can_be(part, name, value)]
                if len(possible) > 1 and not fixed:
                    found[f"{TECHNIQUE if alone else part.type}.{name}"] = tuple(possible)
        if train.learning_rate is None:
            found["train.learning_rate" if len(lists) == 1 else f"{parts[-1].type}.train.learning_rate"] = OWN_RATE
    return found


def _can_be(part: Technique, name: str, value: Any) -> bool:
    """Whether a value goes with the rest of what the recipe says of a technique."""
    try:
        type(part).model_validate({**part.model_dump(), name: value})
    except ValidationError:
        return False
    return True


def _places(key: str, lists: Mapping[str, Sequence[Technique]]) -> dict[str, Place]:
    """Where a path leads, for each technique list that has it. Raises ValueError when none has."""
    head, _, rest = key.partition(".")
    types = sorted({part.type for parts in lists.values() for part in parts})
    if head == "train" and rest:
        return dict.fromkeys(lists, _train_place(rest))
    if head in types and rest.startswith("train."):
        place = _train_place(rest.removeprefix("train."))
        return {title: place for title, parts in lists.items() if any(part.type == head for part in parts)}
    if head in TECHNIQUES and head not in types:
        raise ValueError(f"{head} is not among the techniques of this sweep ({', '.join(types)})")
    if not rest or head not in (TECHNIQUE, *types):
        raise ValueError(f"not a path of settings to search ({nearest(head, [TECHNIQUE, 'train', *types])})")
    found = {}
    for title, parts in lists.items():
        if there := _part_place(rest, parts, None if head == TECHNIQUE else head):
            found[title] = there
    if not found:
        known = sorted({name for part in _parts(lists, head) for name in type(part).model_fields if name != "type"})
        name = rest.partition(".")[0]
        raise ValueError(f"{' and '.join(types)}: no setting {name!r} ({nearest(name, known)})")
    return found


def _parts(lists: Mapping[str, Sequence[Technique]], head: str) -> list[Technique]:
    return [part for parts in lists.values() for part in parts if head in (TECHNIQUE, part.type)]


def _train_place(rest: str) -> Place:
    name = rest.partition(".")[0]
    if name in FIXED:
        raise ValueError(f"train.{name} is not searched: {FIXED[name]}")
    if name not in TrainSettings.model_fields:
        known = [one for one in TrainSettings.model_fields if one not in FIXED]
        raise ValueError(f"train has no setting {name!r} ({nearest(name, known)})")
    return Place(None, tuple(rest.split(".")))


def _part_place(rest: str, parts: Sequence[Technique], kind: str | None) -> Place | None:
    """The part of a list that has the setting; a number in front says which, where several have."""
    first, _, after = rest.partition(".")
    numbers = [int(first)] if first.isdecimal() and int(first) < len(parts) else range(len(parts))
    path = tuple((after if first.isdecimal() else rest).split("."))
    having = [
        k
        for k in numbers
        if kind in (None, parts[k].type) and path[0] in type(parts[k]).model_fields and path[0] != "type"
    ]
    if len(having) > 1:
        choices = " or ".join(f"{kind or TECHNIQUE}.{k}.{rest}" for k in having)
        raise ValueError(f"several techniques of one list have {path[0]!r}: write {choices}")
    return Place(having[0], path) if having else None


def _winning(places: Mapping[str, Place]) -> dict[str, Place]:
    """Of paths that lead to the same place the one of the technique's own."""
    general = {place: key for key, place in places.items() if key.startswith((f"{TECHNIQUE}.", "train."))}
    own = {place: key for key, place in places.items() if key not in general.values()}
    chosen = {**general, **own}
    return {key: place for key, place in places.items() if chosen[place] == key}


def _wrong_values(space: SearchSpace, key: str, users: Sequence[Alternative], train: TrainSettings) -> Iterator[str]:
    values = space.spaces[key]
    if isinstance(values, Range) and values.relative:
        if any(one.places[key] != Place(None, ("learning_rate",)) for one in users):
            yield "relative: only train.learning_rate has a default that it can be relative to"
        return
    for one in users:
        if isinstance(values, Range) and one.is_whole(key) and any(type(v) is float for v in (values.low, values.high)):
            yield f"wants whole numbers, got low {values.low:g} and high {values.high:g}"
            continue
        for value in (values.low, values.high) if isinstance(values, Range) else values:
            try:
                one.settings({key: value}, train)
            except ValidationError as error:
                model = type(one.techniques[place.part]) if (place := one.places[key]).part is not None else None
                yield from (f"{show(value)}: {told}" for _, told in explain(error, model or TrainSettings, {}))


def _put(node: Mapping[str, Any], path: Sequence[str], value: Any) -> dict[str, Any]:
    head, *rest = path
    inner = node.get(head)
    return {**node, head: _put(inner if isinstance(inner, Mapping) else {}, rest, value) if rest else value}


def _coded(value: Any) -> str:
    dumped = value.model_dump(mode="json") if isinstance(value, Strict) else value
    return json.dumps(dumped, sort_keys=True, default=str)


def _kinds(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) in (Annotated, Union, UnionType):
        for one in get_args(annotation):
            yield from _kinds(one)
    else:
        yield annotation
