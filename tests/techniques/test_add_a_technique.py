"""docs/add-a-technique.md is true: its code, added to a copy of the package as the page says, does what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mood_rows import write_moods
from tiny_models import tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]
FENCE = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def code_blocks() -> dict[str, str]:
    """The page's code by its title: a file, or a place in one."""
    return dict(FENCE.findall((ROOT / "docs" / "add-a-technique.md").read_text("utf-8")))


def insert(path: Path, line: str, after: str) -> None:
    """Put a line behind the last one that matches, up to the end of its dict."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    places = [number for number, text in enumerate(lines) if re.match(after, text)]
    place = places[-1] + 1
    if not after.startswith("from"):
        place += next(number for number, text in enumerate(lines[place:]) if text.startswith("}"))
    lines.insert(place, line)
    path.write_text("".join(lines), "utf-8")


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package and its tests with the page's file and lines added."""
    folder = tmp_path_factory.mktemp("copy")
    unwanted = shutil.ignore_patterns("__pycache__", "*.pyc")
    for part in ("src", "tests", "docs"):
        shutil.copytree(ROOT / part, folder / part, ignore=unwanted)
    shutil.copy(ROOT / "pyproject.toml", folder)
    for title, code in code_blocks().items():
        path, _, place = title.partition(", ")
        if title == "commands":
            continue
        if not place:
            assert not (folder / path).exists(), f"{path} is in the package: choose another example"
            (folder / path).write_text(code, "utf-8")
        elif place == "the import":
            insert(folder / path, code, r"from tailor\.techniques\.")
        else:
            insert(folder / path, code, rf"{place.removeprefix('in ')}\b.* = \{{")
    return folder


def run(copy: Path, *command: str, cwd: Path | None = None) -> str:
    """What a command in the copy printed; it must succeed."""
    own = {"PYTHONPATH": str(copy / "src"), "OMP_NUM_THREADS": "1", "TAILOR_HOME": str(copy / "home"), "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, *command], cwd=cwd or copy, env={**os.environ, **own}, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{done.stdout[-5000:]}\n{done.stderr[-5000:]}"
    return done.stdout


def tailor(copy: Path, cwd: Path, *arguments: str) -> str:
    return run(copy, "-c", "from tailor.cli.main import main; main()", *arguments, cwd=cwd)


def test_the_page_has_one_file_and_one_line_and_what_they_need() -> None:
    assert list(code_blocks()) == [
        "src/tailor/techniques/vera.py",
        "src/tailor/techniques/__init__.py, the import",
        "src/tailor/techniques/__init__.py, in TECHNIQUES",
        "tests/technique_cases.py, the import",
        "tests/technique_cases.py, in CASES",
        "commands",
    ]
    assert [code.count("\n") for code in code_blocks().values()][1:5] == [1, 1, 1, 1]


def test_the_file_is_in_the_style_of_the_others(copy: Path) -> None:
    pytest.importorskip("ruff")
    files = ["src/tailor/techniques/vera.py", "src/tailor/techniques/__init__.py", "tests/technique_cases.py"]
    run(copy, "-m", "ruff", "check", "--no-cache", *files)
    run(copy, "-m", "ruff", "format", "--no-cache", "--check", *files)
    run(copy, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_layers.py")


def test_the_contracts_hold_for_it(copy: Path) -> None:
    """All of them for the technique alone; in company, where every technique is in one batch."""
    alone, company = "(vera and not +vera)", "(mixed and llama)"
    file = "tests/contract/test_technique_contract.py"
    command = ["-m", "pytest", "-v", "-p", "no:cacheprovider", "-m", "not slow", file, "-k", f"{alone} or {company}"]
    passed = re.findall(r"::(test_\w+)\[(\S+)\] PASSED", run(copy, *command))
    names = {name for name, case in passed if "vera" in case}
    assert names >= {
        "test_the_registry_is_consistent",
        "test_a_new_slot_is_the_base",
        "test_a_slot_changes_what_the_base_says",
        "test_off_is_the_base_bit_for_bit",
        "test_packed_equals_unpacked",
        "test_what_is_scored_is_what_is_generated",
        "test_save_and_load_give_equal_logits",
        "test_only_what_is_declared_moves",
        "test_training_lowers_the_loss",
        "test_resuming_is_bit_identical",
    }
    assert {name for name, case in passed if case == "llama"} == {
        "test_a_mixed_batch_equals_separate_runs",
        "test_a_mixed_backward_equals_separate_ones",
        "test_mixed_generation_equals_generation_alone",
    }


def test_the_commands_of_the_page_know_it(copy: Path, tmp_path: Path) -> None:
    """Trained, merged and verified from the command line, with the page's own command on a tiny base."""
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "tiny")
    tiny_tokenizer().hf.save_pretrained(tmp_path / "tiny")
    write_moods(tmp_path).rename(tmp_path / "rows.jsonl")
    tune, init, _ = (shlex.split(line)[1:] for line in code_blocks()["commands"].splitlines())
    small = ["--base", "tiny", "--name", "mine", "train.num_steps=6", "train.batch_size=4"]
    made = json.loads(tailor(copy, tmp_path, *tune, *small, "--json", "--quiet"))
    assert made["techniques"][0] == {
        "type": "vera",
        "rank": 64,
        "start": 0.1,
        "projection_seed": 0,
        "target_modules": None,
    }
    # 2 layers: q and o 32 → 32, k and v 32 → 16, gate and up 32 → 48, down 48 → 32
    assert made["num_parameters"] == 2 * (7 * 64 + 2 * 32 + 2 * 16 + 2 * 48 + 32)
    assert made["parity"]["passed"] is True
    assert {"reloaded artifact", "merged weights"} <= {hop["name"] for hop in made["parity"]["hops"]}
    assert (Path(made["folder"]) / "weights.safetensors").is_file()
    assert tailor(copy, tmp_path, "generate", "mine", "I feel glad 0", "--json")
    tailor(copy, tmp_path, *init)
    assert "projection_seed: 0" in (tmp_path / "vera.yaml").read_text()


def test_the_documents_and_the_comparison_have_its_row(copy: Path) -> None:
    page = run(
        copy,
        "-c",
        "import sys; sys.path.insert(0, 'docs'); import build; print(build.techniques_page())\n"
        "from tailor.recipes.compare_settings import CompareRecipe\n"
        "print([entry.title for entry in CompareRecipe(name='x', data={'train': 'x'}).techniques])",
    )
    assert "## vera\n" in page
    assert "W x + diag(b) B diag(d) A x" in page
    assert "| `projection_seed` | `0` |" in page
    assert "'vera'" in page.splitlines()[-1]
