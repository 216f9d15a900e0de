"""A seeded sample of the fault campaign: every kind of fault and every engine once.

The whole matrix is `make faults`; what it found is in docs/reliability.md.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from tests.faults import injectors
from tests.faults.campaign import Reference, missing, reference, struck
from tests.faults.injectors import DAMAGES, KINDS
from tests.faults.plan import EVERY, IMPOSSIBLE, SEEDS, STEPS, Measured, cells, plan
from tests.faults.worker import ENGINES, WORLD
from tests.support.needs import require

SEED = 2026

# Engines in a random order, one for a kind; there are more kinds than engines.
_order = random.Random(SEED).sample(ENGINES, len(ENGINES))
SAMPLE = [
    (_order[k % len(_order)], kind, 1 if kind == "link down" else 0) for k, kind in enumerate(KINDS)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind", "seed"), SAMPLE, ids=lambda one: str(one))
def test_a_run_that_is_struck_ends_as_if_it_had_not_been(
    folder: Path, engine: str, kind: str, seed: int
) -> None:
    require(missing(kind))
    expected: Reference = reference(engine, folder / engine)
    row = struck(plan(engine, kind, seed, expected.measured), folder / "run", expected)
    assert row["struck"]
    assert row["wrong"] == [], json.dumps(row, indent=1)
    assert row["lost"] <= EVERY
    # else nothing has been compared
    assert row["executed"] >= STEPS
    if kind == "damaged file":
        assert row["outcome"].startswith(("refused", "passed over"))


@pytest.mark.slow
def test_a_trainer_whose_optimizer_is_gone_says_so(folder: Path) -> None:
    """Trainer itself goes on with a new optimizer, and without a word."""
    expected = reference("trainer", folder / "trainer")
    planned = plan("trainer", "damaged file", 0, expected.measured)
    assert planned.damage == "removed"
    row = struck(planned, folder / "run", expected)
    assert row["damaged"] == "optimizer.pt"
    assert row["outcome"] == "told that the optimizer starts anew", json.dumps(row, indent=1)


MEASURED = Measured(seconds=0.05, events=[6, 3, 3, 3], bytes=30_000)


def test_the_matrix_has_200_faults_and_names_what_cannot_exist() -> None:
    assert SEEDS >= 3
    assert len(cells()) * SEEDS >= 200
    assert len(cells()) == len(ENGINES) * len(KINDS) - len(IMPOSSIBLE)
    assert set(SAMPLE) <= {(*cell, seed) for cell in cells() for seed in range(SEEDS)}
    assert {engine for engine, _, _ in SAMPLE} == set(ENGINES)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_gives_one_fault_that_fits_the_run(kind: str) -> None:
    drawn = [plan(engine, kind, seed, MEASURED) for engine in ENGINES for seed in range(40)]
    assert drawn == [plan(one.engine, kind, one.seed, MEASURED) for one in drawn]
    for one in drawn:
        assert 0 <= one.fault.rank < WORLD[one.engine]
        assert 1 <= one.fault.step <= STEPS
        if one.fault.point in ("save", "saved"):
            assert one.fault.step % EVERY == 0
    assert len({(one.fault.rank, one.fault.point, one.fault.step) for one in drawn}) > 5


@pytest.mark.parametrize("how", DAMAGES)
def test_damage_changes_a_file(tmp_path: Path, how: str) -> None:
    file, content = tmp_path / "file", bytes(range(1, 256)) * 4
    for where in (0.0, 0.5, 0.999):
        file.write_bytes(content)
        injectors.damage(file, how, where)
        assert not file.exists() or file.read_bytes() != content
