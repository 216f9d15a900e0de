"""The report of a step: norms, captured energy, seconds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lowrank_comm import CompressedOptimizer, PowerSGD, PowerSGDPlus
from lowrank_comm.compressors.base import Compressor
from tests.support.gloo import GlooPool
from tests.support.launches import count
from tests.support.networks import compressed, loss_of, network
from tests.support.reference import gradient


def test_the_report_of_a_step() -> None:
    model = network()
    optimizer = compressed(model, compressor=PowerSGDPlus(2, restart_every=2))
    assert optimizer.last_report is None
    for t in range(3):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        before = {name: e.clone() for name, e in optimizer.error_memory().items()}
        given = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.reduce_gradients()
        # reading early must not spoil the report after the step
        in_between = optimizer.last_report
        optimizer.step()
        report = optimizer.last_report
        assert (report.step, report.applied, in_between.step) == (t, True, t)
        assert report.restarts == (2 if t % 2 == 0 else 0)
        delta = sum(float((given[name] + e).norm()) ** 2 for name, e in before.items())
        kept = sum(float(e.norm()) ** 2 for e in optimizer.error_memory().values())
        assert report.error_norm == pytest.approx(kept**0.5, rel=1e-10)
        assert report.captured_energy == pytest.approx(1 - kept / delta, rel=1e-8)
        assert set(report.seconds) == {"compress", "communicate", "decompress", "commit"}
        assert report.as_dict()["bytes"] == report.bytes


def test_the_norms_of_all_shapes_are_read_at_once() -> None:
    """On a GPU the host waits for each reading."""
    shapes = [(9, 6), (7, 5), (5, 8)]
    parameters = [(str(k), nn.Parameter(torch.ones(shape))) for k, shape in enumerate(shapes)]
    optimizer = CompressedOptimizer(
        torch.optim.SGD(parameters, lr=0.1),
        PowerSGDPlus(2, restart_every=2, consensus_restart=True),
        min_compression_rate=0,
    )
    for _ in range(4):
        for _, p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
        assert count(lambda: optimizer.last_report).host_reads == 1


def truth(sent_of: list[tuple[Tensor, Tensor]]) -> float:
    """||Delta - residual||^2 / ||Delta||^2 from (Delta, residual) pairs."""
    return sum(float((d - r).norm()) ** 2 for d, r in sent_of) / sum(
        float(d.norm()) ** 2 for d, _ in sent_of
    )


def captured(rank: int, compressor: Compressor) -> list[tuple[float | None, float]]:
    """The report's captured energy and the true one. At step 2 one of two twin matrices
    has no gradient anywhere.
    """
    parameters = {
        name: nn.Parameter(torch.zeros(9, 6, dtype=torch.float64)) for name in ("one", "twin")
    }
    optimizer = CompressedOptimizer(
        torch.optim.SGD(parameters.items(), lr=0.1), compressor, min_compression_rate=0
    )
    found = []
    for t in range(5):
        optimizer.zero_grad()
        for k, (name, p) in enumerate(parameters.items()):
            p.grad = (
                None
                if (t == 2 and name == "twin")
                else torch.from_numpy(gradient((9, 6), t, rank, k))
            )
        deltas = {
            n: e + p.grad
            for (n, e), p in zip(optimizer.error_memory().items(), parameters.values(), strict=True)
            if p.grad is not None
        }
        optimizer.step()
        pairs = []
        for name, delta in deltas.items():
            applied = parameters[name].grad
            u = torch.linalg.svd(applied)[0][:, : torch.linalg.matrix_rank(applied)]
            # sent is the projection on the range of what is applied
            pairs.append((delta, delta - u @ (u.T @ delta)))
        before = optimizer.last_report.captured_energy if t % 2 else None
        # changes the memory, not what was captured
        optimizer.consolidate_error_memory()
        found.append((optimizer.last_report.captured_energy, truth(pairs)))
        assert before in (None, found[-1][0])
    return found


@pytest.mark.parametrize(
    "compressor",
    [
        PowerSGD(2),
        PowerSGDPlus(2, restart_every=2),
        PowerSGDPlus(2, restart_every=2, consensus_restart=True),
    ],
    ids=repr,
)
def test_captured_energy_is_the_share_of_delta_that_was_sent(
    gloo: GlooPool, compressor: Compressor
) -> None:
    for found in gloo.run(captured, 2, compressor):
        for said, true in found:
            assert said == pytest.approx(true, rel=1e-9)
