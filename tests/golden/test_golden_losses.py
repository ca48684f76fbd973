"""Golden losses: a refactoring must leave them equal. To renew them: python tests/golden/regenerate.py."""

from __future__ import annotations

import pytest
from golden_runs import TOLERANCE, golden_run, path, read

from tailor.models.base import load_base
from tailor.techniques import TECHNIQUES


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_losses_are_golden(technique: str) -> None:
    assert path(technique).exists(), f"make it: python tests/golden/regenerate.py {technique}"
    expected = read(technique)
    assert f"regenerate.py {technique}" in expected["made_by"]
    found = golden_run(load_base("tailor-nano", "cpu", "float32"), technique, expected)
    for name, value in found.items():
        if name == "settings":
            assert {key: value[key] for key in expected[name]} == expected[name]  # newer settings may stand beside them
        else:
            assert value == pytest.approx(expected[name], abs=TOLERANCE, rel=TOLERANCE), name
    assert set(expected) - set(found) == {"made_by", "how", "made_with"}


def test_every_golden_file_belongs_to_a_technique() -> None:
    files = {file.stem for file in path("x").parent.glob("*.json")}
    assert files == {path(technique).stem for technique in TECHNIQUES}
