"""Exchanges of workers that live in one process."""

from __future__ import annotations

import torch

from lowrank_comm.communication.collectives import AllGather, AllToAll, alone, among


def test_a_sum_is_on_every_worker() -> None:
    workers = [torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0]), torch.tensor([100.0, 200.0])]
    among(workers)
    for buffer in workers:
        assert buffer.tolist() == [111.0, 222.0]


def test_a_gather_has_one_row_a_worker() -> None:
    workers = [AllGather(torch.full((3,), float(w)), torch.empty(2, 3)) for w in range(2)]
    among(workers)
    for worker in workers:
        assert worker.everyone.tolist() == [[0.0] * 3, [1.0] * 3]


def test_in_an_exchange_row_w_goes_to_worker_w() -> None:
    """Worker v gives 10 v + w to worker w."""
    given = [torch.tensor([[10.0 * v + w] for w in range(3)]) for v in range(3)]
    workers = [AllToAll(rows, torch.empty(3, 1)) for rows in given]
    among(workers)
    for w, worker in enumerate(workers):
        assert worker.received.flatten().tolist() == [w, 10.0 + w, 20.0 + w]


def test_one_worker_alone_gets_what_it_gives() -> None:
    gather = AllGather(torch.tensor([1.0, 2.0]), torch.empty(1, 2))
    swap = AllToAll(torch.tensor([[3.0]]), torch.empty(1, 1))
    total = torch.tensor([4.0])
    for exchange in (gather, swap, total):
        alone(exchange)
    assert gather.everyone.tolist() == [[1.0, 2.0]]
    assert swap.received.tolist() == [[3.0]]
    assert total.tolist() == [4.0]
