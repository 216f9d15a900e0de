"""Numbers in few bits: sizes, packing, rounding, what is not finite, settings."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.quantization import FORMATS, Format, Quantization, _packed, _unpacked

every_format = pytest.mark.parametrize("name", FORMATS)

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def counts_of(x: Tensor, last: int | None = None) -> Tensor:
    """All numbers of every block are real, but in the last block `last` of them."""
    counts = torch.full((x.shape[0],), float(x.shape[1]), dtype=x.dtype)
    counts[-1] = x.shape[1] if last is None else last
    return counts


def round_trip(
    format: Format, x: Tensor, noise: Tensor | None = None, last: int | None = None
) -> Tensor:
    return format.decode(format.encode(x, counts_of(x, last), noise), x.dtype)


def test_exact_bytes() -> None:
    assert {name: (f.block, f.block_bytes) for name, f in FORMATS.items()} == {
        "int8": (256, 260),
        "int4": (64, 36),
        "sign": (1024, 132),
    }
    int8 = FORMATS["int8"]
    assert [int8.bytes(n) for n in (0, 1, 256, 257, 1000)] == [0, 260, 260, 520, 1040]
    for format in FORMATS.values():
        assert format.encode(normal(3, format.block), torch.full((3,), 1.0)).shape == (
            3,
            format.block_bytes,
        )


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_every_code_survives_packing(bits: int) -> None:
    """At every place in a byte; also of no block at all."""
    codes = torch.arange(1 << bits, dtype=torch.uint8).repeat(8).view(-1, 8 // bits * 2)
    for turn in range(8 // bits):
        turned = codes.roll(turn, dims=1)
        packed = _packed(turned, bits)
        assert packed.shape == (codes.shape[0], codes.shape[1] * bits // 8)
        assert torch.equal(_unpacked(packed, bits), turned)
    assert _unpacked(_packed(codes[:0], bits), bits).shape == (0, codes.shape[1])


@every_dtype
@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_nearest_is_within_half_a_step(name: str, dtype: torch.dtype, size: float) -> None:
    format = FORMATS[name]
    x = size * normal(20, format.block, dtype=dtype)
    off = (round_trip(format, x) - x).abs() / (x.abs().amax(dim=1, keepdim=True) / format.top)
    assert float(off.max()) <= 0.5 + 1e-4
    # and a step is no finer than said
    assert float(off.max()) > 0.45
    ends = x.abs().argmax(dim=1, keepdim=True)
    torch.testing.assert_close(
        round_trip(format, x).gather(1, ends), x.gather(1, ends), rtol=3e-7, atol=0
    )


@every_dtype
def test_sign_is_the_mean_size_with_signs(dtype: torch.dtype) -> None:
    """c = mean|x| sign(x), ||x - c||^2 = (1 - ||x||_1^2 / (d ||x||_2^2)) ||x||^2; the
    sign of zero is +.
    """
    x = normal(5, 1024, dtype=dtype)
    x[0, :10] = torch.tensor([0.0, -0.0] * 5, dtype=dtype)
    c = round_trip(FORMATS["sign"], x)
    signs = torch.where(x >= 0, 1.0, -1.0)
    torch.testing.assert_close(c, x.abs().mean(dim=1, keepdim=True) * signs, rtol=1e-6, atol=0)
    assert bool((c[0, :10] > 0).all())
    delta = x.norm(p=1, dim=1) ** 2 / (1024 * x.norm(dim=1) ** 2)
    left = (x - c).norm(dim=1) ** 2 / x.norm(dim=1) ** 2
    torch.testing.assert_close(left, 1 - delta, rtol=1e-5, atol=0)


@every_format
def test_a_part_filled_block_is_a_block_of_its_real_numbers(name: str) -> None:
    """Its scale is of these only: the same numbers in two sizes of filling give the
    same.
    """
    format, real = FORMATS[name], 24
    x = torch.zeros(2, format.block, dtype=torch.float64)
    x[1, :real] = normal(real)
    c = round_trip(format, x, last=real)
    # zeros stay zeros, in every format
    assert torch.count_nonzero(c[0]) == 0
    expected = x[1, :real].abs().mean() if name == "sign" else x[1, :real].abs().max()
    torch.testing.assert_close(c[1, :real].abs().max(), expected, rtol=1e-6, atol=0)


@every_format
@every_dtype
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_does_not_come_out_finite(
    name: str, dtype: torch.dtype, bad: float
) -> None:
    """The whole block, and no other one."""
    x = normal(3, FORMATS[name].block, dtype=dtype)
    x[1, 7] = bad
    c = round_trip(FORMATS[name], x)
    assert not bool(torch.isfinite(c[1]).any())
    assert bool(torch.isfinite(c[[0, 2]]).all())


def test_beyond_float32_and_below_it() -> None:
    """Scales are float32: what has no such scale does not come out finite, or comes out
    as zero, and stays in the error.
    """
    for format in FORMATS.values():
        x = normal(1, format.block)
        assert not bool(torch.isfinite(round_trip(format, 1e60 * x)).any())
        assert torch.count_nonzero(round_trip(format, 1e-60 * x)) == 0


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_stochastic_rounding_is_right_on_average_and_nearest_is_not(name: str) -> None:
    """20 000 draws of a block's numbers, 4.5 standard errors."""
    format, draws = FORMATS[name], 20_000
    x = torch.zeros(1, format.block, dtype=torch.float64)
    x[0, :8] = torch.tensor([1.0, 0.3, -0.3, 0.011, -0.77, 0.5, 0.0, 0.123])
    generator = torch.Generator().manual_seed(0)
    total, squares = torch.zeros(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    for _ in range(20):
        noise = torch.zeros(draws // 20, format.block)
        noise[:, :8] = torch.rand(draws // 20, 8, generator=generator)
        c = round_trip(format, x.expand(draws // 20, -1), noise)[:, :8]
        total, squares = total + c.sum(0), squares + (c**2).sum(0)
    mean = total / draws
    error = ((squares / draws - mean**2).clamp(min=0) / draws).sqrt()
    assert bool(((mean - x[0, :8]).abs() <= 4.5 * error + 1e-7).all())
    nearest = round_trip(format, x)[0, :8]
    assert float(((nearest - x[0, :8]).abs() / error.clamp(min=1e-9)).max()) > 6


def test_bad_settings_are_refused() -> None:
    for bad in (
        {"dense": "int2"},
        {"factors": 8},
        {"rounding": "up"},
        {"dense": "sign", "rounding": "stochastic"},
    ):
        with pytest.raises(ConfigError, match=re.escape("quantization.")):
            Quantization(**bad)
