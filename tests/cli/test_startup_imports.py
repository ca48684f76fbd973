"""Start-up: help imports nothing heavy and no command but its own, and the list of commands is true."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from tailor.cli.main import COMMANDS, MODULES, LazyGroup, app

HEAVY = ("torch", "transformers", "numpy", "pydantic", "jinja2", "ruamel", "huggingface_hub", "tokenizers")


def modules_after(*arguments: str) -> set[str]:
    """What a process has imported when the command has ended."""
    script = (
        "import json, sys; from tailor.cli.main import run; "
        f"assert run({list(arguments)!r}) == 0; print('\\n' + json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_the_list_of_commands_imports_neither_packages_nor_commands() -> None:
    found = modules_after("--help")
    assert found.isdisjoint(HEAVY)
    assert {name for name in found if name.startswith("tailor.")} == {"tailor.cli", "tailor.cli.main", "tailor.errors"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_a_command_imports_no_model_package(name: str) -> None:
    # typer itself imports pydantic when it parses options, where it is installed
    assert modules_after(name, "--help").isdisjoint(set(HEAVY) - {"pydantic", "jinja2"})


def test_the_version_needs_no_drawing() -> None:
    assert modules_after("--version").isdisjoint({"rich.console", "torch"})


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_command_says_of_itself(name: str) -> None:
    group = typer.main.get_command(app)
    assert isinstance(group, LazyGroup)
    text = inspect.cleandoc(group.get_command(None, name).help)
    assert " ".join(text.split("\n\n")[0].split()) == COMMANDS[name]


def test_every_module_with_a_command_is_in_the_list() -> None:
    folder = Path(inspect.getfile(LazyGroup)).parent
    files = (path for path in folder.glob("*.py") if "\napp = typer.Typer(" in path.read_text("utf-8"))
    modules = {path.stem for path in files} - {"main"}
    assert modules == {MODULES.get(name, name) for name in COMMANDS}
