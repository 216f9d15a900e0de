"""What the counter of launches counts, on operations whose cost is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lowrank_comm import CompressedOptimizer, PowerSGD
from lowrank_comm.numerics.device import accelerator_path
from tests.support.launches import Launches, count

A, B = torch.ones(8, 6), torch.ones(6, 3)


def test_bytes_are_what_is_read_and_what_is_written() -> None:
    out = torch.empty(8, 3)
    counted = count(lambda: torch.mm(A, B, out=out))
    assert counted.operations == {"mm": 1}
    assert counted.bytes == 4 * (48 + 18 + 24)
    assert count(lambda: A @ B) == counted
    # in place: read and written; copied to: written only
    assert count(lambda: out.add_(1.0)).bytes == 2 * 4 * 24
    given = torch.ones(8, 3)
    assert count(lambda: out.copy_(given)).bytes == 2 * 4 * 24


def test_views_and_allocations_are_no_launches() -> None:
    counted = count(lambda: A.new_empty(4, 12).copy_(A.view(4, 12)).T[1:].unbind(0))
    assert counted.operations == {"copy_": 1}


def test_an_operation_over_a_list_is_one() -> None:
    lists = [torch.ones(4) for _ in range(10)], [torch.ones(4) for _ in range(10)]
    counted = count(lambda: torch._foreach_add_(*lists))
    assert counted.launches == 1
    assert counted.bytes == 3 * 4 * 40


@pytest.mark.parametrize(
    "read",
    [
        lambda: A.sum().item(),
        lambda: float(A.sum()),
        lambda: bool(A.sum() > 0),
        lambda: A.tolist(),
        lambda: torch.equal(A, A),
        lambda: A.nonzero(),
    ],
)
def test_whatever_the_host_waits_for_is_a_read(read: Callable[[], object]) -> None:
    assert count(read).host_reads == 1


def test_a_step_costs_an_accelerator_other_launches_than_a_cpu_and_two_reads() -> None:
    def step_of_a_model() -> Launches:
        model = torch.nn.ParameterList(torch.zeros(16, 12) for _ in range(6))
        optimizer = CompressedOptimizer(
            torch.optim.SGD(model.named_parameters(), lr=0.1), PowerSGD(2), min_compression_rate=0
        )
        for _ in range(3):
            for parameter in model:
                parameter.grad = torch.randn(parameter.shape)
            counted = count(optimizer.step)
        return counted

    on_cpu = step_of_a_model()
    with accelerator_path():
        on_accelerator = step_of_a_model()
    assert on_cpu.operations != on_accelerator.operations
    assert on_cpu.host_reads == on_accelerator.host_reads == 2
