"""Numbers on their way to a device."""

from __future__ import annotations

import torch

from lowrank_comm.numerics.device import current_stream, numbers_on

CPU = torch.device("cpu")


def test_numbers_become_a_tensor_of_the_asked_dtype() -> None:
    numbers = numbers_on(CPU, [1.0, 0.5, -3.0], torch.float64)
    assert numbers.dtype == torch.float64
    assert numbers.tolist() == [1.0, 0.5, -3.0]
    assert numbers_on(CPU, [], torch.float32).shape == (0,)


def test_a_cpu_has_no_streams() -> None:
    assert current_stream(CPU) is None
