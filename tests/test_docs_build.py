"""The generator of the documents: a toy command line becomes a stable page, drift is seen, the real pages build."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_build", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def toy(option_help: str = "how many") -> typer.Typer:
    app = typer.Typer(help="A toy.", add_completion=False)
    below = typer.Typer(help="Things below.")
    app.add_typer(below, name="things")

    @app.command()
    def run(name: str, times: int = typer.Option(3, help=option_help)) -> None:
        """Run it some times."""

    @app.command(hidden=True)
    def secret() -> None:
        """Not for people."""

    @below.command("list")
    def list_things() -> None:
        """List the things."""

    return app


def test_the_page_shows_the_help_of_every_visible_command(build: ModuleType) -> None:
    page = build.cli_page(toy(), "toy")
    assert re.findall(r"^#+ (.*)$", page, re.MULTILINE) == [
        "`toy`: every command",
        *("toy", "toy run", "toy things", "toy things list"),
    ]
    for text in ("Usage: toy run [OPTIONS]", "Run it some times.", "how many", "[default: 3]", "List the things."):
        assert text in page
    assert "secret" not in page


@pytest.mark.parametrize(
    "environment",
    [{"COLUMNS": "50"}, {"FORCE_COLOR": "1", "COLUMNS": "200"}, {"GITHUB_ACTIONS": "true", "TERM": "xterm-256color"}],
)
def test_the_page_does_not_depend_on_the_terminal(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    text = "a longer text that says how many times it runs and so needs a good deal of room"
    page = build.cli_page(toy(text))
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert page == build.cli_page(toy(text))
    assert "\x1b" not in page
    assert max(map(len, page.splitlines())) <= build.WIDTH


def test_a_missing_module_is_said_clearly(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(build.importlib, "import_module", missing)
    with pytest.raises(SystemExit, match=r"cannot be imported: No module named 'tailor\.cli\.main'"):
        build.main(["--check"])


def test_only_what_stands_between_the_markers_is_replaced(build: ModuleType) -> None:
    text = "before\n<!-- begin map -->\nold\n<!-- end map -->\nafter\n"
    made = build.between(text, "map", "new")
    assert made.startswith("before\n<!-- begin map -->\n")
    assert made.endswith("\nnew\n\n<!-- end map -->\nafter\n")
    assert "old" not in made
    assert build.between(made, "map", "new") == made
    with pytest.raises(SystemExit, match="must stand once each"):
        build.between("nothing here", "map", "new")


def test_drift_is_a_diff_and_an_exit_code(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    monkeypatch.setattr(build, "documents", lambda: {page: "as it should be\n"})
    assert build.main(["--check"]) == 1
    assert not page.exists()
    assert "+as it should be" in capsys.readouterr().err
    assert build.main([]) == 0
    assert page.read_text("utf-8") == "as it should be\n"
    assert build.main(["--check"]) == 0


def test_the_map_names_every_folder_and_file(build: ModuleType) -> None:
    made = build.folder_map()
    for path in (ROOT / "src" / "tailor").rglob("*.py"):
        folder, _, file = path.relative_to(ROOT / "src" / "tailor").as_posix().partition("/")
        if path != ROOT / "src" / "tailor" / "__init__.py":
            named = file.removesuffix("__init__.py") or f"{folder}/"
            assert f"`{named if file else folder}`" in made


def test_the_techniques_page_follows_the_registry(build: ModuleType) -> None:
    from tailor.techniques import TECHNIQUES

    page = build.techniques_page()
    for name, technique in TECHNIQUES.items():
        section = page.split(f"## {name}\n")[1].split("\n## ")[0]
        assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == [
            k for k in technique.model_fields if k != "type"
        ]
        assert f"| source | {technique.traits.source} |" in section
        assert f"| in a recipe | `{build.example_lines(technique)[0]}` |" in section
        assert technique.traits.formula.split(";")[0] in section
    assert "| `rank` | `16` | rank of the update: its capacity and its size |" in page


def test_the_techniques_page_lists_the_names_that_nemo_has(build: ModuleType) -> None:
    from tailor.recipes.nemo import BLOCKS

    page = build.techniques_page()
    for name, block in BLOCKS.items():
        assert all(f"| `{name}.{key}` | " in page for key in block.keys)
    assert "| `peft_scheme: adapter_and_ptuning` | `technique: [adapter, p_tuning]` | |" in page
    assert "| `lora_tuning.adapter_dim` | `rank` | `32` |" in page
    assert "| `lora_tuning.alpha` | `alpha` | as `adapter_dim` |" in page


def test_the_exit_codes_are_those_of_the_errors(build: ModuleType) -> None:
    rows = re.findall(r"^\| (\d+) \| (.+) \|$", build.exit_codes(), re.MULTILINE)
    assert [int(code) for code, _ in rows] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 130, 143]
    assert dict(rows)["4"] == "A data file or some of its rows cannot be used."
