"""The import rule: a file imports only from folders listed before its own; siblings in one set not at all."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "tailor"
ORDER = [
    *({"errors"}, {"explain"}, {"machine"}, {"store"}, {"config"}, {"runs"}),
    *({"text"}, {"metrics"}, {"data"}, {"models"}, {"techniques", "objectives"}, {"artifacts"}, {"inference"}),
    *({"training"}, {"evaluation"}, {"rag", "feedback"}, {"curation"}, {"synthesis"}, {"recipes"}, {"jobs"}),
    *({"server"}, {"cli"}),
]
RANK = {folder: rank for rank, folders in enumerate(ORDER) for folder in folders}


def imported(tree: ast.AST, package: list[str]) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, relative, lazy and type-only ones included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) + 1 - node.level] if node.level else []
            module = [*start, *(node.module.split(".") if node.module else [])]
            yield from ((node.lineno, ".".join([*module, alias.name])) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from ((node.lineno, a.value) for a in node.args[:1] if isinstance(a, ast.Constant))


def violations(text: str, module: str) -> list[str]:
    """What breaks the rule in the text of `module`: `tailor.folder.file`, with `__init__` spelled out."""
    own = module.split(".")[1]
    found = []
    for line, name in imported(ast.parse(text), module.split(".")[:-1]):
        parts = name.split(".")
        if parts[0] != "tailor" or name == "tailor.__version__":
            continue
        target = parts[1] if len(parts) > 1 else "the package root"
        if target != own and RANK.get(target, len(RANK)) >= RANK[own]:
            found.append(f"{module}:{line}: {own} may not import {target}")
    return found


def modules() -> list[tuple[Path, str]]:
    files = [path for path in sorted(SOURCE.rglob("*.py")) if path != SOURCE / "__init__.py"]  # the root sees all
    return [(path, ".".join(("tailor", *path.relative_to(SOURCE).with_suffix("").parts))) for path in files]


def test_every_source_file_has_a_place_in_the_order() -> None:
    assert [module for _, module in modules() if module.split(".")[1] not in RANK] == []


def test_the_import_rule_holds() -> None:
    assert len(modules()) > 20
    assert [problem for path, module in modules() for problem in violations(path.read_text("utf-8"), module)] == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("tailor.text.render", "from tailor.data.records import Record"),
        ("tailor.text.render", "from ..data import records"),
        ("tailor.text.render", "from .. import data"),
        ("tailor.text.__init__", "from ..data.records import Record"),
        ("tailor.text.render", "def f():\n    import tailor.data.records"),
        ("tailor.text.render", "if TYPE_CHECKING:\n    from tailor.models import slots"),
        ("tailor.text.render", "importlib.import_module('tailor.models.base')"),
        ("tailor.objectives.sft", "from tailor.techniques.lora import LoRA"),
        ("tailor.techniques.lora", "from tailor import objectives"),
        ("tailor.feedback.votes", "import tailor.rag"),
        ("tailor.errors", "from tailor.config import Strict"),
        ("tailor.store", "from tailor import runs"),
        ("tailor.models.base", "import tailor"),
        ("tailor.models.base", "from tailor import LoRA"),
        ("tailor.cli.main", "from tailor import unheard_of"),
    ],
)
def test_the_checker_finds(module: str, text: str) -> None:
    assert len(violations(text, module)) == 1


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("tailor.data.readers", "from tailor.data.rows import parse\nfrom . import rows\nfrom .rows import parse"),
        ("tailor.data.readers", "from tailor.text.messages import Message\nfrom ..errors import DataError"),
        ("tailor.data.readers", "import json, tailored\nfrom torch import Tensor"),
        ("tailor.runs", "from tailor.config import Strict\nfrom tailor import __version__"),
        ("tailor.cli.main", "from tailor.recipes.tune import tune"),
    ],
)
def test_the_checker_lets_pass(module: str, text: str) -> None:
    assert violations(text, module) == []
