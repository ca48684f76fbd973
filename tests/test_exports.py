"""The public surface: what `tailor` exports is sorted, documented, described, and costs nothing until it is used."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tailor

ROOT = Path(__file__).parents[1]


def test_all_is_sorted_and_complete() -> None:
    assert tailor.__all__ == sorted(tailor.__all__)
    assert set(tailor.__all__) <= set(dir(tailor))
    assert set(tailor._HOMES) == set(tailor.__all__)


def test_what_type_checkers_see_is_what_is_loaded() -> None:
    tree = ast.parse((ROOT / "src/tailor/__init__.py").read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == tailor._HOMES


def test_the_documented_names_are_the_exported_ones() -> None:
    text = (ROOT / "docs/road.md").read_text("utf-8")
    table = text.split("<!-- begin names -->")[1].split("<!-- end names -->")[0]
    assert sorted(re.findall(r"^\| `tailor\.(\w+)` \|", table, re.MULTILINE)) == tailor.__all__


@pytest.mark.parametrize("name", tailor.__all__)
def test_every_name_loads_and_says_what_it_is(name: str) -> None:
    value = getattr(tailor, name)
    described = value if callable(value) else sys.modules[tailor._HOMES[name]]
    assert inspect.getdoc(described)


def test_unknown_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'lroa'"):
        tailor.lroa


def test_importing_the_package_is_light() -> None:
    script = "import sys, tailor; print([m for m in ('torch', 'transformers', 'pydantic') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
