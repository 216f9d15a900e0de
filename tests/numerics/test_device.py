"""Which path a device takes, and numbers on their way to it."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

from lowrank_comm.numerics.device import (
    accelerator_path,
    counts_as_large,
    current_stream,
    numbers_on,
    on_accelerator,
    on_device,
)

CPU = torch.device("cpu")


def test_numbers_become_a_tensor_of_the_asked_dtype() -> None:
    for path in (numbers_on, _on_the_accelerators_path):
        numbers = path(CPU, [1.0, 0.5, -3.0], torch.float64)
        assert numbers.dtype == torch.float64
        assert numbers.tolist() == [1.0, 0.5, -3.0]
        assert path(CPU, [], torch.float32).shape == (0,)


def _on_the_accelerators_path(*arguments: object) -> torch.Tensor:
    with accelerator_path():
        return numbers_on(*arguments)  # type: ignore[arg-type]


def test_a_cpu_has_no_streams() -> None:
    assert current_stream(CPU) is None


def test_the_path_is_of_all_threads_and_ends_with_the_context() -> None:
    """Engines call from threads of autograd."""
    seen: list[bool] = []
    with accelerator_path():
        with accelerator_path():
            pass
        thread = threading.Thread(target=lambda: seen.append(on_accelerator(CPU)))
        thread.start()
        thread.join()
        assert counts_as_large(1, 100)
    assert seen == [True]
    assert not on_accelerator(CPU)
    assert not counts_as_large(100, 100)
    assert counts_as_large(101, 100)
    assert on_accelerator(torch.device("meta"))


def test_what_goes_to_a_gpu_is_copied_from_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host waits for a copy from other memory; here the two calls are looked at,
    since there is no GPU.
    """
    given, pinned = torch.ones(3), torch.zeros(3)
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: pinned if self is given else None)
    monkeypatch.setattr(Tensor, "to", lambda self, *where, **how: (self, where, how))
    sent, where, how = on_device(given, torch.device("cuda"))
    assert sent is pinned
    assert (where, how) == ((torch.device("cuda"),), {"non_blocking": True})
    # a CPU has no pinned memory
    assert on_device(given, CPU)[0] is given
