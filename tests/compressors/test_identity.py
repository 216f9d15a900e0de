"""Identity: the plain mean."""

from __future__ import annotations

import torch

from lowrank_comm import Identity
from tests.support.driver import simulation
from tests.support.matrices import SHAPES, drawn


def test_identity_is_the_plain_mean() -> None:
    sim = simulation(Identity(), SHAPES, 3)
    gradients = [drawn(0, worker) for worker in range(3)]
    applied = sim.reduce([{k: v.clone() for k, v in g.items()} for g in gradients])
    assert sim.error_memory(0) == {}
    for name in SHAPES:
        torch.testing.assert_close(
            applied[name], sum(g[name] for g in gradients) / 3, rtol=1e-15, atol=1e-15
        )
