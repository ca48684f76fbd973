"""Writes the parts of the documents that follow from the code; `--check` only says whether they are in step with it.

Made are: the map of folders in README.md, the public names in docs/road.md, docs/techniques.md and docs/cli.md.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import inspect
import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src" / "tailor"
# the order of the road, as in tests/test_layers.py
FOLDERS = (
    *("text", "metrics", "data", "models", "techniques", "objectives", "artifacts", "inference", "training"),
    *("evaluation", "rag", "feedback", "curation", "synthesis", "recipes", "jobs", "server", "cli"),
)
FILES = ("errors", "explain", "machine", "store", "config", "runs")
WIDTH = 100
GENERATED = "<!-- written by `make docs`; do not edit -->"


def folder_map() -> str:
    """One line per folder, and one per file to unfold, from the module docstrings."""
    folders = [name for name in FOLDERS if (SOURCE / name / "__init__.py").is_file()]
    lines = ["| src/tailor/ | |", "|---|---|"]
    lines += [f"| `{name}.py` | {_summary(SOURCE / f'{name}.py')} |" for name in FILES]
    lines += [f"| `{name}/` | {_summary(SOURCE / name / '__init__.py')} |" for name in folders]
    lines += ["", "<details><summary>Every file</summary>", ""]
    for name in folders:
        lines += [f"- `{name}/`"]
        own = SOURCE / name
        paths = [path for path in sorted(own.rglob("*.py")) if path != own / "__init__.py"]
        lines += [
            f"  - `{path.relative_to(own).as_posix().removesuffix('__init__.py')}` {_summary(path)}" for path in paths
        ]
    return "\n".join([*lines, "", "</details>"])


def names_table() -> str:
    """The public names of the package, each with the first line of its docstring."""
    import tailor

    lines = ["| name | what it is |", "|---|---|"]
    for name in sorted(tailor.__all__, key=str.lower):
        value = getattr(tailor, name)
        module = importlib.import_module(tailor._HOMES[name])
        text = inspect.getdoc(value if callable(value) else module) or ""
        lines.append(f"| `tailor.{name}` | {_cell(_first_line(text))} |")
    return "\n".join(lines)


def techniques_page() -> str:
    """docs/techniques.md: what each technique claims of itself, and its settings with their defaults."""
    from tailor.techniques import TECHNIQUES

    parts = [
        "# Techniques",
        GENERATED,
        "What each technique says of itself (`traits`; tests hold every claim). *Mixes*: rows of other customizations "
        "may share its passes. *Rows*: too few below the first number, comfortable from the second.",
        "\n".join(_traits_table(TECHNIQUES)),
        "Training defaults, found by measurement (docs/log.md). The steps are the passes over your rows, held between "
        "the smallest and the largest number; every one of them can be set in `train`.",
        "\n".join(_defaults_table(TECHNIQUES)),
    ]
    for name, technique in TECHNIQUES.items():
        formula = re.sub(r"; (?![^\[]*\])", "\n", technique.traits.formula)  # a line for each variant
        tables = ["\n".join(table(technique)) for table in (_facts_table, _settings_table)]
        parts += [f"## {name}", inspect.getdoc(technique) or "", f"```text\n{formula}\n```", *tables]
    parts += [
        "## Several at once",
        "A list is one customization: `technique: [adapter, p_tuning]` in a recipe, `-t adapter+p_tuning` on the "
        "command line, where settings are told apart by position: `technique.0.bottleneck_size=16`.",
        "## NeMo's `peft` block",
        "NeMo's YAML block runs as it stands, at a recipe's top or in `model`. Each key of the scheme that is selected "
        "becomes a setting of ours; one that is not given, or null, has NeMo's own value. Layers are counted from 1 "
        "there and from 0 here. `restore_from_path` names an artifact (`start`).",
        "\n".join(_nemo_table()),
    ]
    return "\n\n".join(parts) + "\n"


def _traits_table(techniques: Mapping[str, Any]) -> list[str]:
    lines = [
        "| technique | trains | where | base stays | merges | mixes | PEFT files | rows |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, technique in techniques.items():
        t = technique.traits
        flags = [_yes(flag) for flag in (t.frozen_base, t.merges, t.mixes, t.peft)]
        cells = [f"[{name}](#{name})", t.trains, t.where, *flags, f"{t.rows[0]} / {t.rows[1]}"]
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return lines


def _defaults_table(techniques: Mapping[str, Any]) -> list[str]:
    lines = [
        "| technique | learning rate | passes | smallest, largest number of steps | batch size: few, more, many rows |",
        "|---|---|---|---|---|",
    ]
    for name, technique in techniques.items():
        d = technique.traits.defaults
        if d is not None:
            passes = f"{d.num_epochs:g}"
            rate = f"{d.learning_rate:g}" + (" × the embeddings' RMS" if d.per_embedding_rms else "")
            sizes = ", ".join(str(d.batch_size(num_rows)) for num_rows in (300, 5_000, 50_000))
            lines.append(f"| {name} | {rate} | {passes} | {d.min_steps}, {d.max_steps} | {sizes} |")
    return lines


def _facts_table(technique: Any) -> list[str]:
    """What a technique says of itself beyond the first table, and how it is asked for."""
    t, name = technique.traits, technique.model_fields["type"].default
    recipe, command = example_lines(technique)
    peft = " or ".join(f"`{kind}`" for kind in technique.peft_types) or "none"
    rows = {
        "trains": t.trains,
        "where": t.where,
        "source": t.source,
        "PEFT file type": peft,
        "in a recipe": f"`{recipe}`",
        "on the command line": f"`{command}`",
        "alternatives tried with a tuning budget": ", ".join(f"`{_yaml(a)}`" for a in technique.alternatives),
    }
    return [f"| {name} | |", "|---|---|", *(f"| {key} | {_cell(text)} |" for key, text in rows.items() if text)]


def example_lines(technique: Any) -> tuple[str, str]:
    """A technique in a recipe and on the command line, with what it must be given or its first number."""
    name = technique.model_fields["type"].default
    numbers = (
        (key, setting.default)
        for key, setting in technique.model_fields.items()
        if isinstance(setting.default, int | float) and not isinstance(setting.default, bool)
    )
    given = dict(technique.example) or (dict([first]) if (first := next(numbers, None)) else {})
    recipe = f"technique: {_yaml({'type': name, **given}) if given else name}"
    overrides = [shlex.quote(f"technique.{key}={_yaml(value)}") for key, value in given.items()]
    return recipe, " ".join([f"tailor tune rows.jsonl -t {name}", *overrides])


def _nemo_table() -> list[str]:
    """The alias table of NeMo's block: its schemes, its keys, and what a key is when it is not given."""
    from tailor.recipes.nemo import BLOCKS, SCHEMES

    lines = ["| NeMo | here | when not given |", "|---|---|---|"]
    for scheme, names in SCHEMES.items():
        ours = [BLOCKS[name].technique for name in names] or ["full"]
        lines.append(f"| `peft_scheme: {_yaml(scheme)}` | `technique: {_yaml(ours if len(ours) > 1 else ours[0])}` | |")
    for name, block in BLOCKS.items():
        fixed = f", with `{_yaml(block.fixed)}`" if block.fixed else ""
        lines.append(f"| `{name}` | `{block.technique}`{fixed} | |")
        for key, known in block.keys.items():
            setting = f"`{known.ours}`" if known.ours else "no setting, only checked"
            default = f" `{_yaml(known.default)}`" if known.default is not None else ""
            lines.append(f"| `{name}.{key}` | {setting} |{f' as `{known.like}`' if known.like else default} |")
    return lines


def _settings_table(technique: Any) -> list[str]:
    lines = ["| setting | default | |", "|---|---|---|"]
    for key, setting in technique.model_fields.items():
        if key != "type":
            default = (
                "required" if setting.is_required() else f"`{_yaml(setting.get_default(call_default_factory=True))}`"
            )
            lines.append(f"| `{key}` | {default} | {_cell(setting.description or '')} |")
    return lines


def cli_page(app: Any, program: str = "tailor") -> str:
    """The `--help` of a Typer app and of every command below it, as a page."""
    from typer.main import get_command

    command = get_command(app)
    parts = [f"# `{program}`: every command", GENERATED, f"What `{program} COMMAND --help` prints."]
    for path in _commands(command, ()):
        title = " ".join((program, *path))
        parts += [f"{'#' * (2 + min(len(path), 2))} {title}", f"```text\n{_help(app, path, program)}\n```"]
    return "\n\n".join(parts) + "\n"


def exit_codes() -> str:
    """The table of exit codes, from the tree of errors."""
    from tailor.errors import TailorError

    kinds: list[type[TailorError]] = [TailorError]
    for kind in kinds:  # grows while it is walked: the whole tree, root first
        kinds += kind.__subclasses__()
    rows = {
        kind.exit_code: _first_line(inspect.getdoc(kind) or "")
        for kind in reversed(kinds[1:])  # of those with one code the last word is the root's
        if kind.__module__ == TailorError.__module__
    }
    rows |= {
        0: "It worked.",
        TailorError.exit_code: "Anything else a person can act on.",
        2: "The command line is wrong.",
    }
    lines = ["## Exit codes", "", "Results go to stdout, everything else to stderr.", "", "| code | |", "|---|---|"]
    return "\n".join(lines + [f"| {code} | {_cell(text)} |" for code, text in sorted(rows.items())]) + "\n"


def _commands(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The path of the command and of those below it, hidden ones left out; lazily imported ones included."""
    yield path
    if hasattr(command, "list_commands"):
        context = command.context_class(command, info_name=path[-1] if path else None)
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            if child is not None and not child.hidden:
                yield from _commands(child, (*path, name))


def _help(app: Any, path: Sequence[str], program: str) -> str:
    from typer import rich_utils
    from typer.testing import CliRunner

    # read from the terminal and the environment otherwise, so the page would depend on who made it
    rich_utils.MAX_WIDTH, rich_utils.FORCE_TERMINAL = WIDTH, False
    environment = {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TERM": "dumb", "LC_ALL": "C.UTF-8"}
    result = CliRunner(env=environment).invoke(app, [*path, "--help"], prog_name=program)
    if result.exit_code != 0:
        raise SystemExit(f"`{' '.join((program, *path))} --help` failed: {result.exception or result.output}")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.output)
    return "\n".join(line.rstrip() for line in plain.splitlines()).strip("\n")


def between(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced. Exits with a message when they are missing."""
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise SystemExit(f"the markers {begin} … {end} must stand once each, in this order")
    before, after = text.split(begin)[0], text.split(end)[1]
    return f"{before}{begin}\n{GENERATED}\n\n{content}\n\n{end}{after}"


def documents() -> dict[Path, str]:
    """Every generated file and what it should contain. Raises ImportError when a part of the package is missing."""
    app = importlib.import_module("tailor.cli.main").app
    readme, road = ROOT / "README.md", ROOT / "docs" / "road.md"
    return {
        readme: between(readme.read_text("utf-8"), "map", folder_map()),
        road: between(road.read_text("utf-8"), "names", names_table()),
        ROOT / "docs" / "techniques.md": techniques_page(),
        ROOT / "docs" / "cli.md": cli_page(app) + "\n" + exit_codes(),
    }


def drift(wanted: Mapping[Path, str]) -> str:
    """A diff from the files as they are to what they should contain, empty when they agree."""
    lines: list[str] = []
    for path, text in wanted.items():
        present = path.read_text("utf-8").splitlines() if path.is_file() else []
        lines += difflib.unified_diff(present, text.splitlines(), str(path), "from the code", lineterm="", n=1)
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the documents, or with `--check` print a diff and return 1 when they are out of step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 when something is out of step")
    check = parser.parse_args(arguments).check
    try:
        wanted = documents()
    except ImportError as error:
        raise SystemExit(f"the documents describe a module that cannot be imported: {error}") from error
    if check and (difference := drift(wanted)):
        print(f"{difference}\n\nThe documents are out of step with the code: run `make docs`.", file=sys.stderr)
        return 1
    for path, text in wanted.items() if not check else ():
        path.write_text(text, "utf-8")
    return 0


def _summary(path: Path) -> str:
    return _cell(_first_line(ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""))


def _first_line(text: str) -> str:
    return " ".join(text.strip().split("\n\n")[0].split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _yes(flag: bool) -> str:
    return "yes" if flag else "no"


def _yaml(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{key}: {_yaml(item)}' for key, item in value.items())}}}"
    return f"[{', '.join(map(_yaml, value))}]" if isinstance(value, tuple | list) else str(value)


if __name__ == "__main__":
    sys.exit(main())
