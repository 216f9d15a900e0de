"""ProjectedSGD against NumPy."""

from __future__ import annotations

import numpy as np

from lowrank_comm import ProjectedSGD
from tests.support.projected_model import SHAPES, parameters, run
from tests.support.reference import gradient
from tests.support.reference_projection import Projection


def test_sgd_as_numpy() -> None:
    """M <- mu M T + R, over three refreshes."""
    held, shape = parameters(), SHAPES["wide"]
    optimizer = ProjectedSGD(
        held.items(), lr=0.1, rank=3, restart_every=4, momentum=0.9, weight_decay=0.05, scale=0.5
    )
    subspace, w = Projection("wide", shape, 1, 3, 4, "galore"), held["wide"].detach().numpy().copy()
    moment = np.zeros(shape)
    for t, after in enumerate(run(optimizer, held, 10)):
        g = gradient(shape, t, 0, 1)
        subspace.refresh(g)
        subspace.t += 1
        # in the full space, re-projected at each refresh
        moment = subspace.project(0.9 * moment + g)
        w = w - 0.1 * (0.5 * moment + 0.05 * w)
        np.testing.assert_allclose(after["wide"].numpy(), w, rtol=1e-9, atol=1e-9)
