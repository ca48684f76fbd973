"""benchmarks/scaling.py: every sweep trains at a small size, and exponents are those of the numbers."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest


@pytest.fixture
def scaling() -> ModuleType:
    import scaling

    return scaling


def measured(scaling: ModuleType, power: float) -> tuple[Any, list[Any]]:
    """The slots sweep with seconds that grow with a power of the size, and memory that does not grow."""
    sweep = scaling.SWEEPS["slots"]
    return sweep, [scaling.Measured(w, 0.1 * w.slots**power, 3, 256.0 * w.slots, 400.0, 430.0) for w in sweep.works()]


def test_the_exponent_of_a_power_law_is_its_power(scaling: ModuleType) -> None:
    assert scaling.exponents([1, 10, 100], [5.0, 50.0, 500.0]) == pytest.approx((1.0, 1.0))
    assert scaling.exponents([2, 4, 8], [3.0, 3.0, 12.0]) == pytest.approx((1.0, 2.0))


def test_the_table_and_the_drawing_tell_it(scaling: ModuleType) -> None:
    sweep, found = measured(scaling, power=1.5)
    lines = scaling.table(sweep, found)
    assert len(lines) == len(sweep.sizes) + 2
    assert re.match(r" +4 +0\.8000 +781\.2 +1,024 +400 +30\.0$", lines[3])
    assert "seconds 1.50, last two 1.50" in lines[-1]
    assert "training memory 0.00, last two 0.00" in lines[-1]
    drawn = ElementTree.fromstring(str(scaling.drawing(sweep, found)))
    texts = ["".join(node.itertext()) for node in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert {"exponent 1.50, last two 1.50", "exponent 0.00, last two 0.00", "16"} <= set(texts)
    assert len(list(drawn.iter("{http://www.w3.org/2000/svg}circle"))) == 2 * len(sweep.sizes)


@pytest.mark.usefixtures("own_home")
@pytest.mark.parametrize("changes", [{"length": 24, "slots": 2, "rank": 2}, {"num_rows": 12, "rank": 2}])
def test_a_small_measurement(scaling: ModuleType, monkeypatch: pytest.MonkeyPatch, changes: dict[str, int]) -> None:
    tiny = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 8}
    monkeypatch.setattr(scaling, "SHAPE", {**scaling.SHAPE, **tiny})
    work = scaling.Work(**{"batch_size": 2, **changes})
    found = scaling.measure(work, seconds=0.0)
    assert found.num_steps == scaling.FEWEST_STEPS
    assert found.seconds > 0
    assert found.peak > 0
    if work.num_rows:
        assert 2 * 8 < found.num_tokens < 2 * 60
    else:
        assert found.num_tokens == 2 * 24 * 2


def test_every_sweep_grows_one_size_alone(scaling: ModuleType) -> None:
    for name, sweep in scaling.SWEEPS.items():
        assert list(sweep.sizes) == sorted(sweep.sizes)
        assert [getattr(work, name) for work in sweep.works()] == list(sweep.sizes)
        assert len({str(scaling.replace(work, **{name: 1})) for work in sweep.works()}) == 1


def test_the_worker_is_the_program_itself(scaling: ModuleType) -> None:
    assert Path(scaling.__file__).name == "scaling.py"
    assert scaling.Work(**scaling.asdict(scaling.Work(rank=3))) == scaling.Work(rank=3)
