"""Numbers as codes: the formats, averages of codes, and the draws of stochastic
rounding.

That every compressor keeps the mass, vetoes and resumes with codes around it is shown
by the conformance suite.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_comm import Acp, Atomo, Compressor, GoLore, Identity, PowerSGD, RandomProjection
from lowrank_comm.communication import Group
from lowrank_comm.communication.collectives import among
from lowrank_comm.communication.quantized_mean import Noise, QuantizedMean
from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.quantization import FORMATS, Format, Quantization, _packed, _unpacked
from lowrank_comm.numerics.randomness import uniform
from lowrank_comm.simulation import Simulation
from tests.support.gloo import GlooPool

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


# --- formats ---------------------------------------------------------------------------------------------------------


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


# --- averages --------------------------------------------------------------------------------------------------------


def averaged(
    name: str, given: list[list[Tensor]], noise: list[Noise] | None = None
) -> list[list[tuple[Tensor, Tensor]]]:
    """(mean, own as sent) of every tensor, by worker. given: each worker's tensors."""
    means = [
        QuantizedMean(FORMATS[name], t, len(given), k, noise[k] if noise else None)
        for k, t in enumerate(given)
    ]
    among([mean.scatter() for mean in means])
    among([mean.gather() for mean in means])
    for mean in means:
        mean.decode()
    return [mean.answers() for mean in means]


@every_format
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_mean_of_what_was_sent_is_what_all_apply(name: str, workers: int) -> None:
    """Tensors of several sizes and fillings, also fewer blocks than workers; without
    what the second rounding took off, the mean of what was sent is another one.
    """
    shapes = [(2, 30, 11), (5,), (1, 3, 700)]
    given = [
        [normal(*shape, seed=10 * k + j) for j, shape in enumerate(shapes)] for k in range(workers)
    ]
    for chosen in ([0, 1, 2], [1]):
        answers = averaged(name, [[tensors[j] for j in chosen] for tensors in given])
        for place, j in enumerate(chosen):
            mean = answers[0][place][0]
            assert mean.shape == shapes[j]
            assert all(torch.equal(one[place][0], mean) for one in answers)
            sent = torch.stack([one[place][1] for one in answers]).mean(0)
            torch.testing.assert_close(sent, mean, rtol=1e-12, atol=1e-12)
            if workers > 1:
                naive = torch.stack([first_rounding(name, tensors[j]) for tensors in given]).mean(0)
                assert float((naive - mean).norm() / mean.norm()) > 1e-4


def first_rounding(name: str, x: Tensor) -> Tensor:
    """What a worker's own codes decode to."""
    (_, own), *_ = averaged(name, [[x]])[0]
    rows, format = (1 if x.dim() < 2 else x.shape[0]), FORMATS[name]
    flat = x.reshape(rows, -1)
    blocks = format.blocks(flat.shape[1])
    padded = torch.zeros(rows, blocks * format.block, dtype=x.dtype)
    padded[:, : flat.shape[1]] = flat
    counts = (
        (flat.shape[1] - torch.arange(blocks) * format.block)
        .clamp(max=format.block)
        .to(x.dtype)
        .repeat(rows)
    )
    c = format.decode(format.encode(padded.view(-1, format.block), counts), x.dtype)
    return c.view(rows, -1)[:, : flat.shape[1]].reshape(own.shape)


@every_format
def test_no_number_at_all(name: str) -> None:
    """A rank's share of a small sum may be empty."""
    answers = averaged(name, [[normal(0)] for _ in range(3)])
    assert [pair[0].shape for (pair,) in answers] == [(0,)] * 3


def over_gloo(rank: int, names: list[str]) -> list[list[tuple[Any, Any]]]:
    group = Group()
    answers = []
    for name in names:
        mean = QuantizedMean(
            FORMATS[name],
            [normal(2, 30, 11, seed=rank), normal(5, seed=rank)],
            group.size,
            rank,
            None,
        )
        for leg in (mean.scatter, mean.gather):
            for work in group.start([leg()]):
                work.wait()
        mean.decode()
        answers.append([(a.numpy().copy(), b.numpy().copy()) for a, b in mean.answers()])
    return answers


def test_over_gloo_as_in_one_process(gloo: GlooPool) -> None:
    by_rank = gloo.run(over_gloo, 3, list(FORMATS))
    for k, name in enumerate(FORMATS):
        expected = averaged(
            name, [[normal(2, 30, 11, seed=rank), normal(5, seed=rank)] for rank in range(3)]
        )
        for rank, place in itertools.product(range(3), range(2)):
            for actual, wanted in zip(by_rank[rank][k][place], expected[rank][place], strict=True):
                assert (actual == wanted.numpy()).all(), (name, rank, place)


def test_draws_differ_by_worker_step_and_kind_of_codes() -> None:
    """And are the same again with the same seed; the mean is right on average over the
    steps, with nearest it is not.
    """
    sim = Simulation(
        {"w": (4, 64)}, PowerSGD(), 2, quantization=Quantization(rounding="stochastic")
    )
    schemes = sim.reducers[0].assignment
    tensor, drawn = torch.zeros(1, 64), {}
    for key in itertools.product((0, 1), (0, 1), (0, 1), (0, 1), ("int8", "int4")):
        bucket, t, worker, packet, name = key
        mean = QuantizedMean(
            FORMATS[name], [tensor], 2, worker, schemes.noise(bucket, t, worker)(packet)
        )
        drawn[key] = mean._draw("codes", torch.zeros(1, 64))
        assert torch.equal(drawn[key], mean._draw("codes", torch.zeros(1, 64)))
        assert not torch.equal(drawn[key], mean._draw("mean", torch.zeros(1, 64)))
    for one, other in itertools.combinations(drawn.values(), 2):
        assert not torch.equal(one, other)
    x = torch.full((3, 64), 0.3, dtype=torch.float64)
    x[:, 0] = 1.0
    outs = {}
    for rounding in ("stochastic", "nearest"):
        noise = [
            (
                (lambda p, s, d, k=k: uniform(0, ("w",), 0, f"{p} {k}", s, torch.float32, d)[0])
                if rounding == "stochastic"
                else None
            )
            for k in range(2)
        ]
        wide = x.repeat(700, 1)
        outs[rounding] = averaged("int4", [[wide], [wide]], None if noise[0] is None else noise)[0][
            0
        ][0][:, 1:]
    n = outs["stochastic"].numel()
    off = {key: abs(float(out.mean()) - 0.3) for key, out in outs.items()}
    error = float(outs["stochastic"].std()) / n**0.5
    assert off["stochastic"] < 4.5 * error
    assert off["nearest"] > 6 * error


@pytest.mark.parametrize(("workers", "filling"), [(1, 0), (2, 1), (3, 0), (4, 1)])
def test_what_fills_up_the_shares_is_counted_apart(workers: int, filling: int) -> None:
    """700 numbers are 3 blocks of 256: shares of 3, 2, 1 and 1 blocks. The payload does
    not depend on the workers.
    """
    sim = Simulation({"w": (700,)}, PowerSGD(2), workers, quantization=Quantization(dense="int8"))
    sim.reduce([{"w": normal(700, seed=k)} for k in range(workers)])
    report = sim.last_reports[0]
    assert (report.bytes["dense"], report.surplus_bytes) == (3 * 260, filling * 260)
    assert report.ratio == report.uncompressed_bytes / (report.total_bytes + filling * 260)


def test_bad_settings_are_refused() -> None:
    for bad in (
        {"dense": "int2"},
        {"factors": 8},
        {"rounding": "up"},
        {"dense": "sign", "rounding": "stochastic"},
    ):
        with pytest.raises(ConfigError, match=re.escape("quantization.")):
            Quantization(**bad)


@pytest.mark.parametrize(
    ("compressor", "quantization", "words"),
    [
        (Atomo(2), Quantization(factors="int8"), "quantization.factors='int8'.*atomo.*gathered"),
        (Atomo(2), Quantization(restart="int4"), "quantization.restart='int4'.*atomo.*gathered"),
        (
            RandomProjection(2, form="unbiased"),
            Quantization(factors="int8"),
            "nearest.*random_projection.*stochastic",
        ),
        (
            PowerSGD(2),
            Quantization(restart="int8"),
            "quantization.restart='int8'.*powersgd.*leave it out",
        ),
        (Acp(2), Quantization(restart="int8"), "quantization.restart='int8'.*acp.*leave it out"),
        (
            GoLore(2),
            Quantization(restart="int4"),
            "quantization.restart='int4'.*golore.*leave it out",
        ),
        (
            Identity(),
            Quantization(factors="int8"),
            "quantization.factors='int8'.*identity.*quantization.dense='int8'",
        ),
    ],
    ids=[
        "gathered factors",
        "gathered restarts",
        "a bias that nothing takes back",
        "no restarts",
        "no restarts asked for",
        "restarts that send nothing",
        "nothing low-rank",
    ],
)
def test_codes_that_do_not_suit_the_compressor_are_refused(
    compressor: Compressor, quantization: Quantization, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Simulation({"w": (8, 6)}, compressor, 2, quantization=quantization)
    Simulation({"w": (8, 6)}, compressor, 2, quantization=Quantization(dense="int8"))
