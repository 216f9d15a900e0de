"""Grouped PermK: unbiased for every worker, with the omega it says; controls
that fail.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowrank_comm.bidirectional import PermK
from lowrank_comm.bidirectional.permk import Blocks
from tests.support.unbiased import DRAWS, D, V, moments

GROUPINGS = [(4, 4), (2, 4), (1, 4), (4, 8), (3, 7), (4, 6), (10, 10), (12, 12), (7, 12)]
"""(G, n): G divides n or not, d or not, and more blocks than coordinates."""


@pytest.mark.parametrize(("groups", "n"), GROUPINGS)
def test_the_workers_parts_make_up_the_vector(groups: int, n: int) -> None:
    for t in range(50):
        blocks = PermK(groups).draw(3, t, n, D)
        parts = blocks.restrict(V, range(n))
        torch.testing.assert_close(parts.mean(dim=0), V, rtol=1e-12, atol=1e-12)
        assert int((parts != 0).sum(dim=1).max()) <= blocks.length() == -(-D // groups)
        for i in range(n):
            group = int(blocks.group[i])
            assert torch.equal(blocks.place(V[blocks.coordinates(group)], i), parts[i])
            assert torch.equal(blocks.restrict(V, [i])[0], parts[i])


@pytest.mark.parametrize(("groups", "n"), [(4, 4), (4, 6), (12, 12)])
def test_permk_is_unbiased_for_every_worker_with_its_omega(groups: int, n: int) -> None:
    permk = PermK(groups)
    draws = torch.stack([permk.draw(1, t, n, D).restrict(V, range(n)) for t in range(DRAWS)])
    for i in range(n):
        deviation, omega = moments(draws[:, i])
        # ten coordinates of n workers at once
        assert deviation < 4.5, f"worker {i}"
        spread = (draws[:, i] - V).square().sum(dim=1).std() / DRAWS**0.5 / V.square().sum()
        assert abs(omega - permk.omega(n)) < 4.5 * float(spread)
    if n % groups == 0:
        assert permk.omega(n) == groups - 1


def biased(blocks: Blocks, t: int, how: str) -> Blocks:
    # every worker hears of its own coordinates only
    if how == "permutation":
        return replace(
            blocks,
            permutation=PermK(blocks.count).draw(1, 0, len(blocks.group), D).permutation,
            shift=0,
        )
    # the first groups always have the longer blocks
    return replace(blocks, shift=0)


@pytest.mark.parametrize("how", ["permutation", "shift"])
def test_controls_a_fixed_permutation_or_fixed_long_blocks_are_biased(how: str) -> None:
    draws = [
        biased(PermK(4).draw(1, t, 4, D), t, how).restrict(V, range(4)) for t in range(DRAWS // 5)
    ]
    stacked = torch.stack(draws)
    # the mean over the workers does not show it
    assert torch.allclose(stacked.mean(dim=(0, 1)), V)
    assert max(moments(stacked[:, i])[0] for i in range(4)) > 6
