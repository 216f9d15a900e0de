"""examples/counterexample.py against rational arithmetic, and its figure."""

from __future__ import annotations

import importlib.util
import sys
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from lowrank_comm.lab.problems import theorem1
from tests.support import ROOT
from tests.support.rational import RationalPowerSGD, combine

EXAMPLE = ROOT / "examples" / "counterexample.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("counterexample", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["counterexample"] = module
    spec.loader.exec_module(module)
    return module


def test_the_examples_powersgd_is_exact(example: ModuleType) -> None:
    """The library's float64 PowerSGD in the example against rational arithmetic: every
    update equal, number by number, for 300 steps.
    """
    steps = 300
    problem = example.PROBLEM
    run = theorem1.train(problem, example.SECTIONS["PowerSGD"], example.OPTIMIZERS["MSGD"], steps)
    d = [Fraction(int(value)) for value in problem.d]
    a = [[x * y for y in d] for x in d]
    b = [[Fraction(1)] * 4] * 4
    rational = RationalPowerSGD(4, problem.workers, [1, 0, 0, 0])
    sigma, first_slope = Fraction(int(problem.sigma)), Fraction(2)
    for row, update in zip(problem.coins(steps, 0), run.updates, strict=True):
        expected = rational.step(
            [combine((first_slope * (1 - int(coin)), a), (sigma * int(coin), b)) for coin in row]
        )
        assert [[Fraction(value) for value in line] for line in update.tolist()] == expected
    assert run.trapped_exactly
    assert max(abs(loss - 3.0) for loss in run.losses) < 1e-11


def test_the_example_draws_figure_1(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "figure.png"
    runs = example.main(["--steps", "250", "--output", str(picture)])
    for optimizer in ("MSGD", "Adam"):
        trapped, free, plain = (
            runs[optimizer][name] for name in ("PowerSGD", "PowerSGD+", "uncompressed")
        )
        assert trapped.trapped_exactly
        assert not free.trapped_exactly
        # psi'^2 ||A||^2
        assert min(trapped.squared_gradients) == max(trapped.squared_gradients) == 64.0
        assert max(free.losses[-50:]) < 0.05 * free.losses[0]
        assert max(plain.losses[-50:]) < 0.05 * plain.losses[0]
    assert Image.open(picture).format == "PNG"
    assert picture.stat().st_size > 10_000
    assert "PowerSGD+" in capsys.readouterr().out
