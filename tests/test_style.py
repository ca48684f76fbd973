"""The rules of CONTRIBUTING.md that a program can check: sizes, names, docstrings, and what may never be imported."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = sorted((ROOT / "src").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
PROGRAMS = sorted(path for folder in ("docs", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.py"))
EMPTY_NAMES = {"utils.py", "util.py", "helpers.py", "helper.py", "common.py", "misc.py"}
UNFINISHED = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
MACHINE_PATH = re.compile(r"(?<![\w/.~<])/(?:work|root)/")
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".jsonl", ".jinja", ".cfg", ".sh", ""}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def imports(path: Path) -> set[str]:
    nodes = list(ast.walk(tree(path)))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}


def tracked() -> list[Path]:
    """The files of the project as git sees them, those not yet added included."""
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [path for path in (ROOT / part for part in listed.split("\0") if part) if path.is_file()]


def test_files_are_short() -> None:
    limits = [(SOURCE, 400), (TESTS, 600), (PROGRAMS, 400)]
    sizes = [(path, len(path.read_text("utf-8").splitlines()), limit) for files, limit in limits for path in files]
    assert [f"{name(path)}: {size} lines" for path, size, limit in sizes if size > limit] == []


def test_functions_are_short() -> None:
    sizes = [(path, f, (f.end_lineno or 0) - f.lineno + 1) for path in SOURCE for f in functions(path)]
    assert [f"{name(path)}:{f.lineno}: {f.name} has {size} lines" for path, f, size in sizes if size > 60] == []


def test_file_names_say_something() -> None:
    assert [name(path) for path in SOURCE + TESTS + PROGRAMS if path.name in EMPTY_NAMES] == []


def test_every_module_says_what_it_is_for() -> None:
    assert [name(path) for path in SOURCE + PROGRAMS if not ast.get_docstring(tree(path))] == []


def test_every_public_function_and_class_of_the_package_has_a_docstring() -> None:
    found = []
    for path in SOURCE:
        for node in tree(path).body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                found.append(f"{name(path)}:{node.lineno}: {node.name}")
    assert found == []


def test_nothing_is_left_unfinished() -> None:
    files = SOURCE + TESTS + PROGRAMS
    assert [name(path) for path in files if UNFINISHED.search(path.read_text("utf-8"))] == []


def test_nothing_can_unpickle() -> None:
    pickles = {"pickle", "cPickle", "cloudpickle", "dill", "joblib", "shelve"}
    assert [name(path) for path in SOURCE if imports(path) & pickles] == []
    calls = [(path, node) for path in SOURCE for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]
    assert [f"{name(path)}:{n.lineno}" for path, n in calls if ast.unparse(n.func) == "torch.load"] == []


def test_no_file_names_the_machine_it_was_written_on() -> None:
    files = [path for path in tracked() if path.suffix in TEXT]
    assert files
    assert [name(path) for path in files if MACHINE_PATH.search(path.read_text("utf-8", errors="replace"))] == []


def test_test_files_have_names_of_their_own() -> None:
    # the tests folders are no packages, so pytest tells modules apart by their bare name
    names = [path.name for path in TESTS if path.name != "conftest.py"]
    assert sorted(names) == sorted(set(names))
