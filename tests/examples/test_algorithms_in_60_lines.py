"""The page of the paper's algorithms, against the library: weights, bases and error
memories of the same training, in float64.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import algorithms_in_60_lines as page
import pytest
import torch

from lowrank_comm import PowerSGD, PowerSGDPlus
from lowrank_comm.simulation import Simulation

RANK, ETA, MU, STEPS = 3, 0.02, 0.5, 12


def trained_by_the_library(tau: int | None, Q: torch.Tensor) -> tuple[Any, Any, Any]:
    _, gradients = page.least_squares()
    X = torch.nn.Parameter(torch.zeros(30, 20, dtype=torch.float64))
    compressor = PowerSGD(RANK) if tau is None else PowerSGDPlus(RANK, tau, restart="svd")
    simulation = Simulation(
        {"X": X.detach()}, compressor, 4, min_compression_rate=0, initial_basis={"X": Q}
    )
    sgd = torch.optim.SGD([X], lr=ETA, momentum=MU)
    for t in range(STEPS):
        X.grad = simulation.reduce([{"X": g(X.detach(), t)} for g in gradients])["X"]
        sgd.step()
    errors = [simulation.error_memory(worker)["X"] for worker in range(4)]
    return X.detach(), simulation.reducers[0], errors


@pytest.mark.parametrize("tau", [None, 5])
def test_the_page_is_what_the_library_does(tau: int | None) -> None:
    _, gradients = page.least_squares()
    draw = torch.Generator().manual_seed(1)
    Q = torch.linalg.qr(torch.randn(20, RANK, generator=draw, dtype=torch.float64)).Q
    zero = torch.zeros(30, 20, dtype=torch.float64)
    X, basis, errors = page.powersgd_plus(zero, Q, gradients, ETA, MU, tau, STEPS)
    other, reducer, other_errors = trained_by_the_library(tau, Q)
    assert torch.allclose(X, other, rtol=0, atol=1e-11)
    for mine, its in zip(errors, other_errors, strict=True):
        assert torch.allclose(mine, its, rtol=0, atol=1e-11)
    # QR and SVD choose the signs of a basis, so its projection is compared.
    (state,) = reducer.state.bases().values()
    mine, its = (torch.linalg.qr(q).Q for q in (basis, state["Q"]))
    assert torch.allclose(mine @ mine.T, its @ its.T, rtol=0, atol=1e-11)


def test_compression_leaves_something_to_compare() -> None:
    """The comparison would hold without compression too, were the rank full."""
    _, gradients = page.least_squares()
    zero = torch.zeros(30, 20, dtype=torch.float64)
    Q = torch.eye(20, RANK, dtype=torch.float64)
    low, _, errors = page.powersgd_plus(zero, Q, gradients, ETA, MU, 5, STEPS)
    full, _, none = page.powersgd_plus(zero, torch.eye(20).double(), gradients, ETA, MU, 5, STEPS)
    assert (low - full).norm() > 0.01 * full.norm()
    # At full rank only what one worker has beside the mean is left unsent.
    assert page.mean(errors).norm() > 0.1
    assert page.mean(none).norm() < 1e-10


def test_the_page_is_short_and_runs() -> None:
    source = Path(page.__file__).read_text()
    algorithms = source.split("# fmt: off")[1].split("# fmt: on")[0].splitlines()
    assert sum(bool(line.strip()) for line in source.splitlines() if line[:1] != "#") <= 90
    assert len(algorithms) <= 60
    assert "lowrank_comm" not in source.split('"""', 2)[2]
    done = subprocess.run(
        [sys.executable, page.__file__], capture_output=True, text=True, timeout=120, check=True
    )
    last = {
        row.rsplit(": ", 1)[0]: float(row.rsplit(": ", 1)[1])
        for row in done.stdout.splitlines()[1:4]
    }
    assert len(last) == 3 and all(0 < loss < 300 for loss in last.values())
