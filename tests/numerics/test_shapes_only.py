"""Tensors without numbers, and how much memory they would take."""

from __future__ import annotations

import torch

from lowrank_comm.numerics.shapes_only import ShapesOnly, once_for_a_shape


def test_memory_is_held_until_the_last_tensor_that_shares_it_is_gone() -> None:
    with ShapesOnly() as meter:
        a = torch.zeros(1000, 1000)
        assert (meter.held, meter.peak) == (4_000_000, 4_000_000)
        row = a[0]
        b = a + a.mT
        del a
        assert meter.held == 8_000_000
        del row
        assert meter.held == 4_000_000
        assert meter.start() == meter.peak == 4_000_000
        b.add_(1)
        b.to(torch.float64)
        assert (meter.held, meter.peak) == (4_000_000, 12_000_000)


def test_all_devices_are_one_and_nothing_is_read_or_drawn() -> None:
    state = torch.get_rng_state()
    with ShapesOnly() as meter:
        generator = torch.Generator("cpu").manual_seed(1)
        a = torch.randn(3, 4, generator=generator, dtype=torch.float32, device="cpu")
        held = meter.held
        assert a.is_meta
        assert a.cpu() is a.to("cuda", torch.float32) is a
        assert meter.held == held
        assert a.sum().item() == float(a.max()) == 1.0
        assert bool((a > 0).any())
        assert a[0].tolist() == [1.0] * 4
        assert torch.tensor([1.0, 2.0]).is_meta
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.zeros(1).is_meta


def test_tensors_have_places() -> None:
    with ShapesOnly():
        a, b = torch.zeros(4, 4), torch.zeros(4)
        assert a[1].data_ptr() == a.data_ptr() + 16
        assert abs(b.data_ptr() - a.data_ptr()) >= 64


def test_what_kernels_take_for_themselves() -> None:
    with ShapesOnly() as meter:
        a = torch.zeros(100, 100)
        torch.linalg.vector_norm(a, dtype=torch.float64)
        assert meter.peak == 40_000 + 8 + 80_000
        meter.start()
        torch.linalg.svd(a)
        assert meter.peak == 4 * 40_000 + 400


def test_a_function_is_carried_out_once_for_a_shape() -> None:
    calls = []

    @once_for_a_shape
    def squared(tensor: torch.Tensor, times: int) -> torch.Tensor:
        calls.append(times)
        return (tensor @ tensor) @ tensor if times > 1 else tensor @ tensor

    a = torch.eye(3)
    assert torch.equal(squared(a, 2), a)
    with ShapesOnly() as meter:
        b = torch.zeros(100, 100)
        for _ in range(2):
            held = meter.start()
            result = squared(b, 2)
            assert (meter.held - held, meter.peak - held) == (40_000, 80_000)
            del result
        squared(b, 1)
    assert calls == [2, 2, 1]
