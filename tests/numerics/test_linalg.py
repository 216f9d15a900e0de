"""Orthonormal bases of what is rank-deficient, padded, rounded, huge or tiny."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_comm import CompressedOptimizer, PowerSGD, PowerSGDPlus
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.numerics.linalg import dead_tolerance, inverse_factor
from tests.support.driver import simulation
from tests.support.matrices import apply, every_compressor, low_rank, relative
from tests.support.networks import compressed, distance, loss_of, network
from tests.support.reference import gradient


def test_a_basis_that_was_rounded_on_the_wire_is_orthonormal_again() -> None:
    """With r = m every basis spans everything, so P P^T D = D, unless P is not
    orthonormal: then it is off by as much.
    """
    sim = simulation(
        PowerSGDPlus(7, restart_every=1), {"w": (7, 12)}, dtype=torch.float32, wire_dtype="bfloat16"
    )
    g = torch.as_tensor(gradient((7, 12), 0, 0), dtype=torch.float32)
    assert relative(apply(sim, g), g.to(torch.bfloat16).float()) < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize("rank_before", [0, 1, 5, 40])
def test_dead_columns_of_q_are_redrawn_before_use(
    dtype: torch.dtype, tolerance: float, rank_before: int
) -> None:
    """120 x 48 at full rank 48: after a gradient of lower rank most columns of Q are
    dead. Random vectors in P alone would miss more than half of the next gradient; with
    Q redrawn it goes through whole.
    """
    sim = simulation(PowerSGD(48), {"w": (120, 48)}, dtype=dtype)
    poor = (
        low_rank(120, 48, rank_before, 1, dtype)
        if rank_before
        else torch.zeros(120, 48, dtype=dtype)
    )
    apply(sim, poor)
    for seed in (2, 3):
        g = low_rank(120, 48, 48, seed, dtype)
        assert relative(apply(sim, g), g) < tolerance


@pytest.mark.parametrize("rows", [8, 15])
def test_a_gradient_whose_first_rows_and_columns_are_zero(rows: int) -> None:
    """Padding: a basis filled with unit vectors e_1, e_2, ... would never see it."""
    sim = simulation(PowerSGD(2), {"w": (20, 18)})
    apply(sim, torch.zeros(20, 18, dtype=torch.float64))
    g = torch.zeros(20, 18, dtype=torch.float64)
    g[rows:, rows:] = low_rank(20 - rows, 18 - rows, 2, 5)
    assert relative(apply(sim, g), g) < 1e-10
    assert float(sim.error_memory(0)["w"][:rows].norm()) < 1e-10


@every_compressor
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e18, 1e-18])
def test_scale_does_not_matter(compressor: Compressor, dtype: torch.dtype, scale: float) -> None:
    """C(s Delta) = s C(Delta): squares of 1e18 overflow float32 and those of 1e-18
    vanish, unless one takes care.
    """
    one = simulation(compressor, {"w": (12, 9)}, dtype=dtype)
    other = simulation(compressor, {"w": (12, 9)}, dtype=dtype)
    for t in range(6):
        g = torch.as_tensor(gradient((12, 9), t, 0), dtype=dtype)
        expected, actual = apply(one, g), apply(other, g * scale)
        assert relative(actual.double() / scale, expected.double()) < (
            1e-10 if dtype == torch.float64 else 1e-4
        )


def run_three_steps(inside: Callable[[], Any]) -> tuple[nn.Module, CompressedOptimizer]:
    model = network(dtype=torch.float32)
    optimizer = compressed(model, compressor=PowerSGDPlus(2, restart_every=2))
    for t in range(3):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        with inside():
            optimizer.step()
    return model, optimizer


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def new_style_precision() -> Iterator[None]:
    """torch's newer settings, which do not go together with
    `torch.get_float32_matmul_precision`.
    """
    backends = {torch.backends.mkldnn.matmul: "bf16", torch.backends.cuda.matmul: "tf32"}
    before = {backend: backend.fp32_precision for backend in backends}
    for backend, precision in backends.items():
        backend.fp32_precision = precision
    try:
        yield
        assert {backend: backend.fp32_precision for backend in backends} == backends
    finally:
        for backend, precision in before.items():
            backend.fp32_precision = precision


@pytest.mark.parametrize(
    "inside",
    [
        lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        lambda: matmul_precision("medium"),
        new_style_precision,
    ],
    ids=["autocast", "medium", "new style"],
)
def test_a_step_computes_in_full_precision_whatever_torch_is_set_to(
    inside: Callable[[], Any],
) -> None:
    one, _ = run_three_steps(contextlib.nullcontext)
    other, optimizer = run_three_steps(inside)
    assert distance(one, other) == 0.0
    assert any(e.any() for e in optimizer.error_memory().values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_column_of_round_off_is_no_direction(dtype: torch.dtype) -> None:
    """Next to the largest one, however sharp its angle; all columns tiny are fine."""
    a = torch.linalg.qr(torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(0)).double())
    columns = a.Q.clone()
    columns[0, :, 1] *= dead_tolerance(dtype) / 2
    columns[1] *= dead_tolerance(dtype) / 2
    factor, pivot = inverse_factor(columns.mT @ columns, dtype)
    assert not pivot[0] > 0
    assert pivot[1] > 0.99
    basis = columns[1] @ factor[1].double()
    torch.testing.assert_close(basis.mT @ basis, torch.eye(3).double(), rtol=0, atol=1e-6)
