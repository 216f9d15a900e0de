"""The mean of tensors that are sent quantized, in one process and over gloo."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_comm import PowerSGD
from lowrank_comm.communication import Group
from lowrank_comm.communication.collectives import among
from lowrank_comm.communication.quantized_mean import Noise, QuantizedMean
from lowrank_comm.numerics.quantization import FORMATS, Quantization
from lowrank_comm.numerics.randomness import uniform
from lowrank_comm.reduction.bucket_pass import rounding_noise
from lowrank_comm.simulation import Simulation
from tests.support.gloo import GlooPool

every_format = pytest.mark.parametrize("name", FORMATS)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def averaged(
    name: str, given: list[list[Tensor]], noise: list[Noise] | None = None
) -> list[list[tuple[Tensor, Tensor]]]:
    """(mean, own as sent) of every tensor, by worker. given: each worker's tensors."""
    means = [
        QuantizedMean(FORMATS[name], t, len(given), k, noise[k] if noise else None)
        for k, t in enumerate(given)
    ]
    among([mean.first_leg() for mean in means])
    further = [leg for mean in means if (leg := mean.second_leg()) is not None]
    assert len(further) == (len(given) if len(given) > 2 else 0)
    if further:
        among(further)
    for mean in means:
        mean.decode()
    return [mean.answers() for mean in means]


@every_format
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_the_mean_of_what_was_sent_is_what_all_apply(name: str, workers: int) -> None:
    """Tensors of several sizes and fillings, also fewer blocks than workers. Of two
    workers it is the mean of their codes; of three, without what the second rounding
    took off, the mean of what was sent is another one.
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
            naive = torch.stack([first_rounding(name, tensors[j]) for tensors in given]).mean(0)
            off = float((naive - mean).norm() / mean.norm())
            assert off > 1e-4 if workers > 2 else off < 1e-12


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
        for leg in (mean.first_leg, mean.second_leg):
            exchange = leg()
            for work in group.start([] if exchange is None else [exchange]):
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
    tensor, drawn = torch.zeros(1, 64), {}
    for key in itertools.product((0, 1), (0, 1), (0, 1), (0, 1), ("int8", "int4")):
        bucket, t, worker, packet, name = key
        mean = QuantizedMean(
            FORMATS[name], [tensor], 2, worker, rounding_noise(0, bucket, t, worker)(packet)
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


@pytest.mark.parametrize(("workers", "filling"), [(1, 0), (2, 0), (3, 0), (4, 1)])
def test_what_fills_up_the_shares_is_counted_apart(workers: int, filling: int) -> None:
    """700 numbers are 3 blocks of 256: gathered as they are between two workers; of
    more, shares of 1 block. The payload does not depend on the workers.
    """
    sim = Simulation({"w": (700,)}, PowerSGD(2), workers, quantization=Quantization(dense="int8"))
    sim.reduce([{"w": normal(700, seed=k)} for k in range(workers)])
    report = sim.last_reports[0]
    assert (report.bytes["dense"], report.surplus_bytes) == (3 * 260, filling * 260)
    assert report.ratio == report.uncompressed_bytes / (report.total_bytes + filling * 260)
