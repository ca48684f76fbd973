"""Strict recipes: YAML 1.2 files with `extends`, overrides and environment values, checked against a schema.

A recipe is read with the line of every key, so that all that is wrong with it is said at once and in place:

    recipe.yaml:7: technique.rnak: unknown setting (did you mean 'rank'? choices: type, rank, alpha)
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from tailor.errors import ConfigError, NotFoundError, nearest
from tailor.explain import KeyPath, explain, show
from tailor.store import write_text


class _Friendly(type(BaseModel)):  # type: ignore[misc]
    """Makes `LoRA(rnak=8)` in Python raise the same ConfigError as the same mistake in a recipe."""

    def __call__(cls, *args: Any, **values: Any) -> Any:
        try:
            return super().__call__(*args, **values)
        except ValidationError as error:
            found = explain(error, cls, values)
            lines = [f"{'.'.join((cls.__name__, *path))}: {message}" for path, message in found]
            raise ConfigError("\n".join(lines)) from None


if TYPE_CHECKING:
    _Model = BaseModel  # the type checker keeps the fields' own signature
else:

    class _Model(BaseModel, metaclass=_Friendly):
        """BaseModel whose constructor speaks to people."""


class Strict(_Model):
    """The base of all settings classes: frozen, keyword-only, unknown keys and NaN refused with ConfigError."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True)

    @classmethod
    def translate(cls, data: dict[str, Any]) -> Translated:
        """A recipe's values before they are checked: a schema that reads another project's words makes them its own."""
        return Translated(data)


@dataclass(frozen=True)
class Translated:
    """A recipe in its schema's words, what is wrong with the others, and where those `written` stand in the file."""

    data: dict[str, Any]
    written: Mapping[KeyPath, KeyPath] = field(default_factory=dict)
    problems: tuple[tuple[KeyPath, str], ...] = ()

    def as_written(self, path: KeyPath) -> KeyPath:
        """The key in the file that a key of ours came from."""
        known = [path[:end] for end in range(len(path), 0, -1) if path[:end] in self.written]
        return self.written[known[0]] if known else path


def _compiles(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"not a regular expression: {error}") from None
    return pattern


Pattern = Annotated[str, AfterValidator(_compiles)]
"""A setting that is a regular expression."""

Recipe = TypeVar("Recipe", bound=Strict)


@dataclass(frozen=True)
class Loaded(Generic[Recipe]):
    """A recipe that passed its schema, and the files it was read from: itself first, then what it extends."""

    recipe: Recipe
    files: tuple[Path, ...]


def load_recipe(
    path: str | Path | None,
    schema: type[Recipe],
    overrides: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> Loaded[Recipe]:
    """Read a recipe; later wins: `defaults`, then the extended file, then the file, then `overrides`.

    Overrides are `a.b=c` (c read as YAML; what is no list, mapping, number, boolean or null is text as typed) and
    `~a.b` (delete). `${env:VAR}` inside text is replaced. A mapping whose `type` differs from the one below it
    replaces it; otherwise mappings merge and all else is replaced. Raises ConfigError with one line per problem, and
    NotFoundError when there is no such file.
    """
    draft = _Draft(root=str(path) if path is not None else "settings")
    draft.lay(_plain(dict(defaults or {})), {})
    if path is not None:
        _read(Path(path), draft, ())
    for override in overrides:
        _override(draft, override)
    ours = schema.translate(_fill_environment(draft.data, (), draft))
    for where, message in ours.problems:
        draft.problem(where, message)
    try:
        recipe = schema.model_validate(ours.data)
    except ValidationError as error:
        told = {where for where, _, _ in draft.problems}
        for where, message in explain(error, schema, ours.data):
            if (written := ours.as_written(where)) not in told:
                draft.problem(written, message)
                told.add(written)
    if draft.problems:
        raise ConfigError(draft.report())
    return Loaded(recipe, tuple(draft.files))


def dump_yaml(data: Mapping[str, Any]) -> str:
    """YAML 1.2 in the given key order; `load_recipe` reads it back to the same values. Long texts become blocks."""
    from ruamel.yaml import YAML

    yaml = YAML(typ="rt", pure=True)
    yaml.default_flow_style = False
    yaml.width = 1 << 16  # never fold a line: folding is hard to read and to compare
    stream = io.StringIO()
    yaml.dump(_styled(_plain(data)), stream)
    return stream.getvalue()


def write_resolved(recipe: Strict, path: str | Path) -> None:
    """Write every setting of a recipe, defaults included: enough to repeat the run."""
    write_text(path, dump_yaml(recipe.model_dump(mode="json")))


@dataclass(frozen=True, order=True)
class _Place:
    """Where a value was written: a file and 1-based line, or an override (line 0)."""

    name: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


@dataclass
class _Draft:
    """A recipe in the making: values, where each was written, and what is wrong so far."""

    root: str
    data: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, _Place] = field(default_factory=dict)
    problems: list[tuple[KeyPath, _Place, str]] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)

    def lay(self, data: dict[str, Any], places: Mapping[KeyPath, _Place]) -> None:
        """Put a file's values over what is there."""
        self.data = _merge(self.data, data)
        self.places.update(places)

    def place(self, path: KeyPath) -> _Place:
        """Of the value, or of the nearest thing around it that was written down."""
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, _Place(self.root))

    def problem(self, path: KeyPath, message: str, place: _Place | None = None) -> None:
        self.problems.append((path, place or self.place(path), message))

    def report(self) -> str:
        lines = []
        for path, place, message in sorted(self.problems, key=lambda problem: problem[1]):
            lines.append(": ".join(part for part in (str(place), ".".join(path), message) if part))
        return "\n".join(dict.fromkeys(lines))


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path, draft: _Draft, chain: tuple[Path, ...]) -> None:
    data, places = _parse(_read_text(path), str(path), draft)
    draft.files.append(path)
    base = data.pop("extends", None)
    place = places.pop(("extends",), None)
    if isinstance(base, str):
        target = path.parent / Path(base).expanduser()
        if target.resolve() in (*chain, path.resolve()):
            draft.problem(("extends",), f"{base} extends this file in turn", place)
        else:
            try:
                _read(target, draft, (*chain, path.resolve()))
            except NotFoundError as error:
                draft.problem(("extends",), error.message, place)
    elif base is not None:
        draft.problem(("extends",), f"wants the path of one recipe, got {show(base)}", place)
    draft.lay(data, places)


def _read_text(path: Path) -> str:
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not a text file in UTF-8 (byte {error.start})") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder, not a recipe") from None
    except (FileNotFoundError, NotADirectoryError):
        near = sorted(p.name for p in path.parent.glob("*.y*ml")) if path.parent.is_dir() else []
        where = f"recipes in {path.parent}: " if near else ""
        raise NotFoundError(f"no such recipe: {path} ({where}{nearest(path.name, near)})") from None


def _parse(text: str, name: str, draft: _Draft) -> tuple[dict[str, Any], dict[KeyPath, _Place]]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    places: dict[KeyPath, _Place] = {(): _Place(name)}
    try:
        node = YAML(typ="rt", pure=True).load(text)
        for path, line, problem in _entries(node, (), 1):
            places[path] = _Place(name, line)
            if problem:
                draft.problem(path, problem, places[path])
        data = _plain(node if node is not None else {})
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = _Place(name, mark.line + 1 if mark else 0)
        raise ConfigError(f"{place}: {_yaml_problem(error.problem or '')}") from None
    except YAMLError as error:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        raise ConfigError(f"{name}:{line}: not YAML: {getattr(error, 'reason', error)}") from None
    except RecursionError:
        raise ConfigError(f"{name}: nested too deeply, or an alias that contains itself") from None
    if not isinstance(data, dict):
        raise ConfigError(f"{name}:1: a recipe is a mapping (key: value), this file holds {show(data)}")
    return data, places


def _yaml_problem(problem: str) -> str:
    if "'\\t'" in problem:
        return "a tab cannot indent YAML: use spaces"
    if duplicate := re.match(r'found duplicate key "(.*?)" with value', problem, re.DOTALL):
        return f"{duplicate[1]}: this key stands twice in one mapping"
    if problem.startswith("mapping values are not allowed"):
        return "not YAML: a ':' where none can stand (wrong indentation, or text that needs quotes)"
    return f"not YAML: {problem}"


def _entries(node: Any, path: KeyPath, line: int) -> Iterator[tuple[KeyPath, int, str]]:
    """Every key and list item of a parsed file: its path, its 1-based line, and what is wrong with it itself, or ""."""
    if not isinstance(node, (Mapping, list)):
        return
    lines = node.lc.data or {}  # type: ignore[union-attr]
    for key, value in node.items() if isinstance(node, Mapping) else enumerate(node):
        inner = (*path, str(key))
        here = lines[key][0] + 1 if key in lines else line  # a key merged in by `<<` has no line of its own
        problem = ""
        if isinstance(node, Mapping) and not isinstance(key, str):
            problem = f"a key must be text: write '{key}' in quotes"
        elif type(value).__name__ == "TaggedScalar":
            problem = f"YAML tags have no meaning here: remove {value.tag.value}"
        yield inner, here, problem
        yield from _entries(value, inner, here)


def _plain(node: Any) -> Any:
    """Dicts, lists and Python's scalars instead of ruamel's classes; dates stay the text they were."""
    if isinstance(node, Mapping):
        return {str(key): _plain(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return [_plain(value) for value in node]
    if isinstance(node, bool) or type(node).__name__ == "ScalarBoolean":
        return bool(node)
    for scalar in (int, float):
        if isinstance(node, scalar):
            return scalar(node)
    return node if node is None else str(node)


def _styled(node: Any) -> Any:
    """Texts of several lines as YAML blocks, where a block can hold them exactly; odd characters in escapes."""
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString, LiteralScalarString

    if isinstance(node, dict):
        return {_styled(key): _styled(value) for key, value in node.items()}
    if isinstance(node, list):
        return [_styled(value) for value in node]
    if not isinstance(node, str) or (node.isprintable() and "\n" not in node):
        return node
    lines = node.split("\n")
    if lines[0][:1] not in ("", " ") and all(line == line.rstrip() and line.isprintable() for line in lines):
        return LiteralScalarString(node)
    return DoubleQuotedScalarString(node)


# --- layers ----------------------------------------------------------------------------------------------------------


def _merge(below: Any, above: Any) -> Any:
    if isinstance(below, str) and isinstance(above, dict) and "type" not in above:
        below = {"type": below}  # `technique: lora` is short for `technique: {type: lora}`
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    if "type" in below and "type" in above and below["type"] != above["type"]:
        return above
    return {**below, **{key: _merge(below[key], value) if key in below else value for key, value in above.items()}}


def _override(draft: _Draft, text: str) -> None:
    place = _Place(f"override {text!r}")
    delete = text.startswith("~")
    key, equals, raw = text.removeprefix("~").partition("=")
    path = tuple(key.strip().split("."))
    if not all(path) or delete == bool(equals):
        draft.problem((), "wants key=value, or ~key to delete (keys with dots: technique.rank=8)", place)
        return
    try:
        draft.data = _drop(draft.data, path) if delete else _put(draft.data, path, _value(raw))
    except LookupError as error:
        draft.problem(path, error.args[0], place)
        return
    draft.places = {other: old for other, old in draft.places.items() if other[: len(path)] != path}
    for end in range(len(path) if not delete else 0):  # the mappings made on the way were written here too
        draft.places.setdefault(path[: end + 1], place)


def _value(raw: str) -> Any:
    """An override's value: YAML when it is written as YAML, else the text as typed ('Answer: yes' is no mapping)."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    written = raw.strip()[:1] in ("[", "{", '"', "'") and bool(raw.strip())
    try:
        value = _plain(YAML(typ="rt", pure=True).load(raw))
    except YAMLError as error:
        if written:
            raise LookupError(_yaml_problem(str(getattr(error, "problem", error)))) from None
        return raw
    return value if written or value is None or isinstance(value, (bool, int, float)) else raw


def _put(node: Any, path: KeyPath, value: Any) -> Any:
    """`node` with the value at `path`, mappings made on the way. Raises LookupError saying why it cannot be."""
    if not path:
        return value
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        index = _index(node, head)
        return [*node[:index], _put(node[index], rest, value), *node[index + 1 :]]
    if isinstance(node, str):
        node = {"type": node}
    if node is not None and not isinstance(node, dict):
        raise LookupError(f"there is {show(node)} above {head!r}, which has no settings")
    node = node or {}
    return {**node, head: _put(node.get(head), rest, value)}


def _drop(node: Any, path: KeyPath) -> Any:
    head, rest = path[0], path[1:]
    if isinstance(node, list):
        index = _index(node, head)
        return [*node[:index], *([_drop(node[index], rest)] if rest else []), *node[index + 1 :]]
    if not isinstance(node, dict) or head not in node:
        raise LookupError(f"nothing to delete ({nearest(head, node if isinstance(node, dict) else ())})")
    kept = {key: value for key, value in node.items() if key != head}
    return {**node, head: _drop(node[head], rest)} if rest else kept


def _index(node: list[Any], head: str) -> int:
    if not head.isdecimal() or int(head) >= len(node):
        raise LookupError(f"{head!r} is no position in a list of {len(node)} (the first is 0)")
    return int(head)


def _fill_environment(node: Any, path: KeyPath, draft: _Draft) -> Any:
    if isinstance(node, dict):
        return {key: _fill_environment(value, (*path, key), draft) for key, value in node.items()}
    if isinstance(node, list):
        return [_fill_environment(value, (*path, str(index)), draft) for index, value in enumerate(node)]
    if not isinstance(node, str):
        return node

    def fill(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            draft.problem(path, f"the environment variable {match[1]!r} is not set")
        return os.environ.get(match[1], "")

    return re.sub(r"\$\{env:([^}]*)\}", fill, node)
