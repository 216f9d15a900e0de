"""benchmarks/limit.py: the count that the limit of a step is made of."""

from __future__ import annotations

import pytest
import torch

import benchmarks.limit as limits
from benchmarks.limit import IN_CACHE, ITEM, PRODUCTS, STAGES, Copy, Products, limit, matrices_of

SHAPES = [(64, 32), (16,), (48, 32), (64, 32)]


@pytest.fixture(scope="module")
def products() -> Products:
    measured = Products(SHAPES, rank=2)
    measured.measure()
    return measured


def test_the_limit_counts_seven_arrays_and_four_products(products: Products) -> None:
    # a copy that takes two seconds moves an array in one
    stages = limit(2.0, products)
    assert [memory for memory, _ in stages] == [3.0, 1.0, 3.0]
    seconds = {kind: products.seconds(kind) for kind in PRODUCTS}
    assert sum(multiplied for _, multiplied in stages) == pytest.approx(sum(seconds.values()))
    assert stages[2][1] == seconds["decode"] + seconds["update"]
    assert sorted(kind for stage in STAGES for kind in stage.products) == sorted(PRODUCTS)


def test_products_are_of_all_matrices_and_never_slower_when_tried_again(
    products: Products,
) -> None:
    elements = sum(m * n for m, n in matrices_of(SHAPES))
    assert elements == 2 * 64 * 32 + 48 * 32
    for kind in PRODUCTS:
        assert products.gflops(kind) == pytest.approx(
            2 * elements * 2 / products.seconds(kind) / 1e9
        )
    before = {kind: products.seconds(kind) for kind in PRODUCTS}
    products.measure()
    assert all(products.seconds(kind) <= before[kind] for kind in PRODUCTS)


def test_the_copy_is_as_large_as_the_matrices() -> None:
    assert Copy(SHAPES).bytes == ITEM * (2 * 64 * 32 + 48 * 32)


def test_a_call_on_many_matrices_counts_for_each_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "_fastest", lambda call: 1.0)
    measured = Products(SHAPES, rank=2)
    measured.measure()
    together = [IN_CACHE // (m * n) for m, n in matrices_of(SHAPES)]
    assert measured.seconds("times") == pytest.approx(sum(1.0 / number for number in together))
    # and a call on some rows of a large one for these alone
    large = Products([(2 * IN_CACHE // 64, 64)], rank=2)
    large.measure()
    assert large.seconds("times") == 1.0


@pytest.mark.parametrize("shape", [(8, 4), (3, 8, 4)])
def test_what_is_timed_are_the_products_of_a_step(shape: tuple[int, ...]) -> None:
    a = torch.randn(shape, dtype=torch.float64)
    p = torch.randn(*shape[:-1], 2, dtype=torch.float64)
    q = torch.randn(*shape[:-2], 4, 2, dtype=torch.float64)
    expected = a - 1e-6 * p @ q.mT
    PRODUCTS["update"](a, p, q)
    torch.testing.assert_close(a, expected)
    PRODUCTS["decode"](a, p, q)
    torch.testing.assert_close(a, p @ q.mT)
    PRODUCTS["times"](a, p, q)
    torch.testing.assert_close(p, a @ q)
