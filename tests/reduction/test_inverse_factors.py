"""Gram matrices of several batches are factorised together, and each gets what it gets
alone.
"""

from __future__ import annotations

import torch

from lowrank_comm.compressors.requests import InverseFactor, Mean, Request
from lowrank_comm.numerics.linalg import inverse_factor
from lowrank_comm.reduction.inverse_factors import inverse_factors


def asked(count: int, r: int, dtype: torch.dtype, seed: int, second: bool) -> InverseFactor:
    a = torch.randn(count, 40, r, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    a[0, :, -1] = a[0, :, 0]
    pivot = torch.rand(count, dtype=torch.float64) if second else None
    return InverseFactor(a.mT @ a, dtype, pivot)


def test_each_gets_what_it_gets_alone() -> None:
    requests: dict[int, Request] = {
        3: asked(2, 4, torch.float32, 0, False),
        5: asked(7, 4, torch.float32, 1, False),
        6: Mean(torch.zeros(3)),
        7: asked(3, 4, torch.float32, 2, True),
        8: asked(1, 4, torch.float32, 3, True),
        9: asked(2, 3, torch.float32, 4, False),
        10: asked(2, 4, torch.float64, 5, False),
    }
    answers = inverse_factors(requests)
    assert sorted(answers) == [3, 5, 7, 8, 9, 10]
    for k, (factor, pivot) in answers.items():
        one = requests[k]
        assert isinstance(one, InverseFactor)
        for row in range(len(one.gram)):
            before = None if one.pivot is None else one.pivot[row : row + 1]
            alone = inverse_factor(one.gram[row : row + 1].double(), one.dtype, before)
            torch.testing.assert_close(factor[row], alone[0][0], rtol=0, atol=0, equal_nan=True)
            assert torch.equal(pivot[row], alone[1][0])
        assert factor.dtype == one.dtype
        # its last column depends on the first
        assert not bool(pivot[0] > 1e-3)
        assert bool((pivot[1:] > 1e-3).all()) or one.pivot is not None
