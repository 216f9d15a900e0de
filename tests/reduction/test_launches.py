"""What a step costs an accelerator, counted on its path: launches, bytes that they
touch, and numbers for which the host waits.

Each shape may cost some launches, and each matrix one: the product that decodes it into
its gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from lowrank_comm import CompressedOptimizer, PowerSGD, PowerSGDPlus
from lowrank_comm.communication.collectives import AllGather, AllToAll, Exchange
from lowrank_comm.communication.group import PretendedGroup
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.numerics.device import accelerator_path
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.reduction.reducer import ParamInfo, Reducer
from tests.support.launches import Launches, count

A_SHAPE, A_MATRIX, BYTES, HOST_READS = 60, 1, 12.0, 2
SHAPES = 5


def llama(layers: int, h: int = 64) -> list[tuple[int, ...]]:
    """Return the shapes of a LLaMA's parameters, narrowed to the width h: matrices of
    five shapes, and vectors.
    """
    f, v, kv = h * 7 // 2, h * 32, h // 4
    layer = [(h, h), (kv, h), (kv, h), (h, h), (f, h), (f, h), (h, f), (h,), (h,)]
    return [(v, h), *(shape for _ in range(layers) for shape in layer), (h,), (v, h)]


def counted(
    shapes: Sequence[tuple[int, ...]],
    compressor: Compressor,
    steps: int = 4,
    dtype: torch.dtype = torch.float32,
    look: Callable[[CompressedOptimizer], object] = lambda optimizer: None,
    piece_mb: float = 25.0,
) -> Launches:
    """Count the step after `steps` others, with the base's own."""
    with accelerator_path():
        model = torch.nn.ParameterList(torch.zeros(shape, dtype=dtype) for shape in shapes)
        base = torch.optim.SGD(model.named_parameters(), lr=0.0, foreach=True)
        optimizer = CompressedOptimizer(
            base, compressor, min_compression_rate=0, bucket_cap_mb=piece_mb
        )
        for step in range(steps + 1):
            for parameter in model:
                parameter.grad = torch.randn_like(parameter)
            if step == steps:
                return count(optimizer.step)
            optimizer.step()
            look(optimizer)
    raise AssertionError


def elements(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(torch.Size(shape).numel() for shape in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_launches_grow_by_shapes_and_by_one_a_matrix(dtype: torch.dtype) -> None:
    few, many = (counted(llama(layers), PowerSGD(4), dtype=dtype) for layers in (8, 32))
    assert many.launches - few.launches <= A_MATRIX * 7 * (32 - 8)
    assert few.launches <= A_SHAPE * SHAPES
    assert few.host_reads == many.host_reads == HOST_READS
    # PyTorch's powerSGD_hook, with matrices of one shape together, has 334
    assert many.launches < 334


def test_bytes_are_near_to_the_least() -> None:
    """Delta is formed, read twice and kept, the mean is written into the gradients, and
    the base's step reads and writes.
    """
    shapes = llama(8, h=256)
    assert counted(shapes, PowerSGD(4)).bytes <= BYTES * 4 * elements(shapes)


def test_looking_at_the_memory_costs_little() -> None:
    """A view of the error memory, and a log of its norm, take the subtraction at once,
    which is one operation a shape, whatever the number of matrices.
    """
    plain = counted(llama(8), PowerSGD(4))
    looked = counted(llama(8), PowerSGD(4), look=lambda optimizer: optimizer.error_memory())
    held: list[object] = []
    viewed = counted(llama(8), PowerSGD(4), look=lambda o: held.append(o.error_memory()))
    assert looked.launches <= plain.launches + SHAPES
    assert viewed.launches <= plain.launches + 2 * SHAPES


@pytest.mark.parametrize("restart", ["svd", "randomized"])
def test_a_step_with_restarts_grows_alike(restart: str) -> None:
    compressor = PowerSGDPlus(4, restart_every=4, restart=restart)  # type: ignore[arg-type]
    few, many = (launched(counted(llama(layers), compressor)) for layers in (8, 32))
    assert many - few <= A_MATRIX * 7 * (32 - 8)
    assert few <= A_SHAPE * SHAPES


def test_a_piece_costs_launches_and_reads_of_its_own() -> None:
    """Each matrix a piece, the costliest case: a restart of an LLM by explicit SVDs."""
    compressor = PowerSGDPlus(4, restart_every=4, restart="svd")
    few, many = (counted(llama(layers), compressor, piece_mb=1e-6) for layers in (2, 4))
    matrices = 7 * (4 - 2)
    assert launched(many) - launched(few) <= 45 * matrices
    assert many.host_reads - few.host_reads <= 2 * matrices


class _Echo(PretendedGroup):
    """A group whose other workers send what this one does."""

    def start(self, exchanges: Sequence[Exchange]) -> list[Any]:
        for one in exchanges:
            if isinstance(one, AllGather):
                one.everyone.copy_(one.own.expand_as(one.everyone))
            elif isinstance(one, AllToAll):
                one.received.copy_(one.given)
        return []


def reduced(workers: int, quantization: Quantization | None) -> Launches:
    """Count the fourth pass of a reducer of a LLaMA's 226 matrices."""
    with accelerator_path():
        slots = [
            ParamInfo(str(k), shape, torch.float32, torch.device("cpu"))
            for k, shape in enumerate(llama(32))
        ]
        group = _Echo(workers, 0)
        reducer = Reducer(
            slots, PowerSGD(4), group, min_compression_rate=0, quantization=quantization
        )
        # nobody is asked
        reducer.workers.agreed = True

        def step() -> None:
            assert reducer.reduce([torch.randn(slot.shape) for slot in slots]).applied
            reducer.commit()

        for _ in range(3):
            step()
        return count(step)


@pytest.mark.parametrize(("workers", "more"), [(2, 60), (4, 80)])
def test_int8_factors_cost_few_launches_more(workers: int, more: int) -> None:
    """In one leg between two workers, in two between four; no read by the host more."""
    plain, coded = (reduced(workers, q) for q in (None, Quantization(factors="int8")))
    assert plain.launches < coded.launches <= plain.launches + more
    assert coded.host_reads == plain.host_reads == HOST_READS
    assert coded.bytes <= 1.35 * plain.bytes


def launched(one: Launches) -> int:
    """Return the launches without the draws, which the CPU makes."""
    return one.launches - one.operations["randn"]
