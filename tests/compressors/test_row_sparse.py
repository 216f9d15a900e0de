"""Embeddings row by row: only rows that some worker touched are sent."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_comm import CompressedOptimizer, ConfigError, PowerSGD, Rule
from lowrank_comm.simulation import Simulation
from tests.support.gloo import GlooPool


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


V, D = 40, 6


def by_rows(workers: int, rows: int = V, copies: int = 1, wire: str | None = None) -> Simulation:
    shapes = {f"embed_{k}": (rows, D) for k in range(copies)}
    rules = (Rule("embed*", treatment="row_sparse"),)
    return Simulation(
        shapes, PowerSGD(), workers, dtype=torch.float64, rules=rules, wire_dtype=wire
    )


def touching(rows: list[int], seed: int, size: int = V) -> Tensor:
    """A gradient of these rows; of a row that is named twice, the sum."""
    ids = torch.tensor(rows, dtype=torch.long)
    return torch.zeros(size, D, dtype=torch.float64).index_add_(
        0, ids, normal(len(rows), D, seed=seed)
    )


@pytest.mark.parametrize(
    ("touched", "sent"),
    [
        # the union over the workers; not 4, and not each worker's own
        ([[3, 7], [7, 39]], 3),
        ([[3, 3, 3], [3]], 1),
        ([[], [0, 5]], 2),
        # 2 N k = m: still row by row
        ([list(range(10)), list(range(10, 20))], 20),
        # 2 N k > m, though the union is of few rows
        ([list(range(11)), [0]], None),
        ([[], []], 0),
    ],
    ids=["union", "duplicates", "one worker", "half", "above half", "none"],
)
def test_rows_that_were_touched_travel_and_no_others(
    touched: list[list[int]], sent: int | None
) -> None:
    gradients = [touching(rows, seed) for seed, rows in enumerate(touched)]
    sim = by_rows(2)
    out = sim.reduce([{"embed_0": g} for g in gradients])["embed_0"]
    torch.testing.assert_close(out, (gradients[0] + gradients[1]) / 2, rtol=1e-15, atol=1e-16)
    k = max(len(set(rows)) for rows in touched)
    bytes_of = sim.last_reports[0].bytes
    assert bytes_of.get("dense", 0) == 8 * D * (V if sent is None else sent)
    assert bytes_of["rows"] == 4 * (1 if sent is None else 1 + k)
    assert sim.error_memory(0) == {}


def test_several_embeddings_each_have_a_union_of_their_own() -> None:
    """Of one shape, thus of one batch; and on a narrow wire, what was rounded is as for
    a dense parameter.
    """
    sim = by_rows(3, rows=60, copies=2)
    given = [
        {f"embed_{k}": touching([worker, 10 * k + 7], 5 * worker + k, 60) for k in range(2)}
        for worker in range(3)
    ]
    out = sim.reduce(given)
    for name in out:
        torch.testing.assert_close(
            out[name], sum(g[name] for g in given) / 3, rtol=1e-14, atol=1e-15
        )
    assert sim.last_reports[0].bytes["dense"] == 8 * D * 2 * 4
    narrow = by_rows(3, rows=60, copies=2, wire="bfloat16").reduce(given)
    assert all(torch.count_nonzero(narrow[name]) == torch.count_nonzero(out[name]) for name in out)
    assert all(torch.allclose(narrow[name], out[name], atol=0.03) for name in out)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [[4], list(range(30))], ids=["row by row", "dense"])
def test_a_row_that_is_not_finite_vetoes(bad: float, rows: list[int]) -> None:
    sim = by_rows(2)
    wrong = touching(rows, 0)
    wrong[4, 2] = bad
    assert sim.reduce([{"embed_0": touching([1], 1)}, {"embed_0": wrong}]) == {}
    assert sim.reducers[0].ledger.vetoed == 1
    assert sim.reduce([{"embed_0": touching([1], 1)}] * 2) != {}


def rows_over_gloo(rank: int) -> tuple[Any, dict[str, int]]:
    embedding = torch.nn.Parameter(torch.zeros(V, D, dtype=torch.float64))
    base = torch.optim.SGD([("embed_0", embedding)], lr=0.0)
    optimizer = CompressedOptimizer(
        base, PowerSGD(), rules=(Rule("embed*", treatment="row_sparse"),)
    )
    embedding.grad = touching([rank, 9], rank)
    optimizer.step()
    return embedding.grad.numpy().copy(), dict(optimizer.ledger.bytes)


def test_row_by_row_over_gloo(gloo: GlooPool) -> None:
    sim = by_rows(3)
    out = sim.reduce([{"embed_0": touching([rank, 9], rank)} for rank in range(3)])[
        "embed_0"
    ].numpy()
    for applied, sent in gloo.run(rows_over_gloo, 3):
        assert abs(applied - out).max() < 1e-15
        assert {kind: n for kind, n in sent.items() if kind != "fingerprint"} == dict(
            sim.reducers[0].ledger.bytes
        )


def test_row_by_row_needs_rows() -> None:
    with pytest.raises(ConfigError, match=r"rule 'b'.*row_sparse.*shape \(5,\)"):
        Simulation({"b": (5,)}, PowerSGD(2), 2, rules=[Rule("b", treatment="row_sparse")])
