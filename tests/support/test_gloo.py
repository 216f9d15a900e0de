"""The harness of gloo processes itself: it must end, whatever a case does."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support.gloo import CaseFailed, GlooPool


def total(rank: int, value: float) -> float:
    number = torch.tensor(value * (rank + 1))
    dist.all_reduce(number)
    return float(number)


def one_rank_raises(rank: int) -> None:
    if rank == 1:
        raise ValueError("rank 1 has had enough")
    dist.all_reduce(torch.ones(1))


def one_rank_never_comes(rank: int) -> None:
    if rank == 0:
        dist.all_reduce(torch.ones(1))


def dies(rank: int) -> None:
    raise SystemExit(3)


@pytest.mark.slow
def test_failures_are_told_and_the_next_case_runs() -> None:
    pool = GlooPool(2)
    try:
        assert pool.run(total, 2, 2.0) == [6.0, 6.0]
        assert pool.run(total, 1, 2.0) == [2.0]
        with pytest.raises(CaseFailed, match="rank 1 has had enough"):
            pool.run(one_rank_raises, 2)
        assert pool.run(total, 2, 1.0) == [3.0, 3.0]
        with pytest.raises(CaseFailed, match="rank 0 of 2"):
            pool.run(one_rank_never_comes, 2, timeout=3.0)
        with pytest.raises(CaseFailed, match="SystemExit"):
            pool.run(dies, 1)
    finally:
        pool.close()
