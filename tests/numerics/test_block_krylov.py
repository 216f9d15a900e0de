"""Leading singular vectors of large matrices: what they capture next to the exact ones,
and that they are orthonormal whatever the matrix.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lowrank_comm.numerics import block_krylov, linalg
from lowrank_comm.numerics.block_krylov import columns_of_space, leading_left_vectors
from lowrank_comm.numerics.device import accelerator_path
from lowrank_comm.numerics.linalg import leading_left_singular_vectors, thin_svd

ROUND_OFF = {torch.float32: 1e-6, torch.float64: 1e-12}

both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def with_values(m: int, n: int, values: Tensor) -> Tensor:
    """An m x n matrix of these singular values, at most min(m, n)."""
    count = len(values)
    u, v = (torch.linalg.qr(drawn(side, count, seed=k)).Q for k, side in enumerate((m, n)))
    return (u * values) @ v.T


def captured(u: Tensor, d: Tensor) -> float:
    return float((u.double().mT @ d.double()).square().sum())


def off_orthonormal(u: Tensor) -> float:
    u = u.double()
    return float((u.mT @ u - torch.eye(u.shape[-1], dtype=torch.float64)).abs().amax())


def after(r: int, tail: Tensor) -> Tensor:
    """r singular values 1, and then the tail."""
    return torch.cat([torch.ones(r, dtype=torch.float64), tail])


def share(count: int) -> Tensor:
    """0 to 1 in equal steps."""
    return torch.arange(count, dtype=torch.float64) / count


WITH_A_GAP = {
    "nothing behind": lambda r, s: after(r, 0 * share(s - r)),
    "0.9 in all others": lambda r, s: after(r, 0.9 + 0 * share(s - r)),
    "0.9 falling slowly": lambda r, s: after(r, 0.9 - 0.2 * share(s - r)),
    "0.9 falling to 0": lambda r, s: after(r, 0.9 - 0.9 * share(s - r)),
    # those that polynomials of a Krylov space keep down worst
    "0.9 and Chebyshev's": lambda r, s: after(r, 0.9 * torch.cos(math.pi / 2 * share(s - r))),
    "0.9^k": lambda r, s: 0.9 ** (s * share(s)),
}
FLAT = {
    "flat": lambda r, s: after(s, share(0)),
    "almost flat": lambda r, s: 1 - 0.05 * share(s),
    "linear": lambda r, s: 1 - share(s),
    "a cluster around r": lambda r, s: torch.cat(
        [1 - 0.02 * share(4 * r), 0.97 - 0.97 * share(s - 4 * r)]
    ),
    "1/sqrt k": lambda r, s: (1 + s * share(s)) ** -0.5,
    "0.99^k": lambda r, s: 0.99 ** (s * share(s)),
    "one far above": lambda r, s: torch.cat([after(1, share(0)), 1e-3 - 1e-3 * share(s - 1)]),
}
SIZES = [(1, 500, 700), (4, 700, 500), (32, 600, 600), (64, 660, 900)]


@pytest.mark.parametrize(("r", "m", "n"), SIZES)
@pytest.mark.parametrize(
    ("spectrum", "least"),
    [(one, 0.999) for one in WITH_A_GAP] + [(one, 0.98) for one in FLAT],
)
def test_captured_energy(spectrum: str, least: float, r: int, m: int, n: int) -> None:
    values = (WITH_A_GAP | FLAT)[spectrum](r, min(m, n))
    d = with_values(m, n, values).float()[None]
    u = leading_left_vectors(d, r)
    assert off_orthonormal(u) < ROUND_OFF[torch.float32]
    assert captured(u, d) >= least * float(values[:r].square().sum())


@pytest.mark.parametrize("r", [1, 4, 32])
@pytest.mark.parametrize(("m", "n"), [(600, 600), (400, 1400), (1400, 400), (380, 6000)])
@both_dtypes
def test_captured_energy_of_noise(r: int, m: int, n: int, dtype: torch.dtype) -> None:
    """Gaussian matrices, whose singular values are dense next to the largest."""
    d = drawn(1, m, n, dtype=dtype)
    best = float(torch.linalg.svdvals(d)[0, :r].double().square().sum())
    u = leading_left_vectors(d, r)
    assert off_orthonormal(u) < ROUND_OFF[dtype]
    assert 0.98 * best <= captured(u, d) <= best * (1 + 1e-5)


def poor(what: str, m: int, n: int) -> Tensor:
    """Matrices of which a Krylov space has less than its columns."""
    d = torch.zeros(1, m, n, dtype=torch.float64)
    if what == "a row":
        d[:, 0] = drawn(n)
    elif what == "a column":
        d[:, :, 3] = 1
    elif what == "rank 2":
        d[0] = drawn(m, 2) @ drawn(2, n, seed=1)
    elif what == "rank 30":
        d[0] = drawn(m, 30) @ drawn(30, n, seed=1)
    elif what == "padded":
        d[0, m // 2 :, n // 3 :] = drawn(m - m // 2, n - n // 3)
    elif what == "the identity":
        d[0] = torch.eye(m, n)
    elif what == "0.3^k":
        d[0] = with_values(m, n, 0.3 ** torch.arange(min(m, n), dtype=torch.float64))
    return d


@both_dtypes
@pytest.mark.parametrize(("m", "n"), [(150, 260), (260, 150), (150, 150), (109, 109)])
@pytest.mark.parametrize(
    "what",
    ["zero", "a row", "a column", "rank 2", "rank 30", "padded", "the identity", "0.3^k"],
)
def test_rank_deficient_matrices(what: str, m: int, n: int, dtype: torch.dtype) -> None:
    d = poor(what, m, n).to(dtype)
    u = leading_left_vectors(d, 4)
    assert off_orthonormal(u) < ROUND_OFF[dtype]
    best = float(torch.linalg.svdvals(d)[0, :4].double().square().sum())
    assert captured(u, d) >= (1 - 20 * ROUND_OFF[dtype]) * best


@both_dtypes
@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e-38])
def test_scale_does_not_matter(scale: float, dtype: torch.dtype) -> None:
    d = with_values(150, 260, WITH_A_GAP["0.9 falling to 0"](4, 150)).to(dtype)[None]
    u = leading_left_vectors(d * scale, 4)
    assert off_orthonormal(u) < ROUND_OFF[dtype]
    # entries of 1e-38 have lost digits themselves
    assert captured(u, d) == pytest.approx(4, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@both_dtypes
def test_what_is_not_finite_gives_nan(
    value: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of the exact decomposition: the step is vetoed by all, not ended by one."""
    monkeypatch.setattr(linalg, "_SVD_ELEMENTS", 1000)
    d = drawn(2, 150, 260, dtype=dtype)
    d[1, 7, 9] = value
    u = leading_left_singular_vectors(d, 4)
    assert u.shape == (2, 150, 4)
    assert u.dtype == dtype
    assert u[1].isnan().all()


def test_a_matrix_gives_what_it_gives_alone() -> None:
    """Bit by bit on a CPU; where products of a batch run side by side, the same
    subspace to round-off. The global random state is not touched.
    """
    values = WITH_A_GAP["0.9 falling to 0"](4, 1000)
    d = torch.stack([with_values(1000, 1100, values), drawn(1000, 1100), drawn(1000, 1100, seed=1)])
    before = torch.get_rng_state()
    together = leading_left_singular_vectors(d, 4)
    for k in (2, 0):
        assert torch.equal(leading_left_singular_vectors(d[k : k + 1], 4)[0], together[k])
    with accelerator_path():
        beside = leading_left_singular_vectors(d, 4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(
        (beside.mT @ together).abs(),
        torch.eye(4, dtype=d.dtype).expand(3, -1, -1),
        atol=1e-6,
        rtol=0,
    )


def test_a_transposed_view_gives_the_same_subspace() -> None:
    """GaLore gives one, for a basis on the side of the columns."""
    d = drawn(1, 150, 260)
    one, other = leading_left_vectors(d.mT, 4), leading_left_vectors(d.mT.contiguous(), 4)
    torch.testing.assert_close(one @ one.mT, other @ other.mT, atol=1e-3, rtol=0)
    assert captured(one, d.mT) == pytest.approx(captured(other, d.mT), rel=1e-6)


def test_where_the_decomposition_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many elements, or a short side no longer than the space; inside the
    accelerator's path the first is never so.
    """
    asked: list[tuple[int, ...]] = []

    def noted(d: Tensor, r: int) -> Tensor:
        asked.append(tuple(d.shape))
        return leading_left_vectors(d, r)

    monkeypatch.setattr(linalg, "leading_left_vectors", noted)
    monkeypatch.setattr(linalg, "_SVD_ELEMENTS", 120 * 130)
    assert columns_of_space(4) == 108
    for m, n, large in ((120, 130, False), (120, 131, True), (108, 200, False), (200, 109, True)):
        d = drawn(2, m, n)
        u = leading_left_singular_vectors(d, 4)
        assert asked == ([(1, m, n)] * 2 if large else [])
        assert large or torch.equal(u, thin_svd(d, 4)[0])
        asked.clear()
    with accelerator_path():
        leading_left_singular_vectors(drawn(2, 120, 109), 4)
        leading_left_singular_vectors(drawn(2, 120, 108), 4)
    assert asked == [(2, 120, 109)]
    # the limit itself: 1024 x 1024 is decomposed exactly
    monkeypatch.undo()
    assert linalg._SVD_ELEMENTS == 1 << 20


class Largest(TorchDispatchMode):
    """The size of the largest tensor that is made, and lies in other memory than
    `given`.
    """

    def __init__(self, given: Tensor) -> None:
        super().__init__()
        self.elements, self._given = 0, given.data_ptr()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor) and tensor.data_ptr() != self._given:
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("turned", [False, True])
def test_the_matrix_is_not_copied(turned: bool) -> None:
    d = drawn(1, 900, 1000)
    with Largest(d) as found:
        leading_left_vectors(d.mT if turned else d, 4)
    assert found.elements <= 1000 * columns_of_space(4)
    # control
    with Largest(d) as found:
        thin_svd(d, 4)
    assert found.elements >= 900 * 900


def test_control_fewer_blocks_or_no_noise_would_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above can see."""
    d = with_values(500, 700, WITH_A_GAP["0.9 and Chebyshev's"](4, 500))[None]
    monkeypatch.setattr(block_krylov, "BLOCKS", 4)
    assert captured(leading_left_vectors(d, 4), d) < 0.999 * 4
