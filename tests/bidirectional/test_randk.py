"""RandK: unbiased for every worker, with the omega it says, no indices sent."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_comm import ConfigError
from lowrank_comm.bidirectional import PermK, RandK
from tests.support.unbiased import DRAWS, D, V, moments


def randk_draws(randk: RandK, worker: int) -> Tensor:
    found = [randk.indices(5, t, 3, [worker], D) for t in range(DRAWS)]
    indices = torch.cat([one for one in found if one is not None])
    rows = V.expand(DRAWS, D)
    return randk.decompress(randk.compress(rows, indices), indices, D)


@pytest.mark.parametrize("mask", ["window", "independent"])
def test_randk_is_unbiased_with_its_omega(mask: str) -> None:
    """omega = d/K - 1 = 10/3 - 1 with K = 3, within 4 standard errors."""
    randk = RandK(0.3, mask)
    draws = randk_draws(randk, worker=2)
    deviation, omega = moments(draws)
    assert (draws != 0).sum(dim=1).eq(3).all()
    assert deviation < 4
    spread = (draws - V).square().sum(dim=1).std() / DRAWS**0.5 / V.square().sum()
    assert abs(omega - randk.omega(D)) < 4 * float(spread)
    # the control: not scaled up
    biased, _ = moments(draws * 3 / D)
    assert biased > 100


@pytest.mark.parametrize("mask", ["window", "independent"])
def test_masks_of_workers_are_independent_per_coordinate(mask: str) -> None:
    """Two workers keep one coordinate together with probability (K/d)^2."""
    randk = RandK(0.3, mask)
    both = torch.zeros(D)
    for t in range(DRAWS):
        indices = randk.indices(5, t, 2, [0, 1], D)
        assert indices is not None
        kept = torch.zeros(2, D).scatter_(1, indices, 1.0)
        both += kept.prod(dim=0)
    p = 0.09
    # ten coordinates at once
    assert ((both / DRAWS - p).abs() < 4.5 * (p * (1 - p) / DRAWS) ** 0.5).all()


@pytest.mark.parametrize("mask", ["window", "independent"])
def test_a_worker_draws_what_the_server_draws_for_it(mask: str) -> None:
    randk = RandK(0.3, mask)
    everyones = randk.indices(7, 3, 5, range(5), D)
    assert everyones is not None
    for i in range(5):
        own = randk.indices(7, 3, 5, [i], D)
        assert own is not None and torch.equal(own[0], everyones[i])
    again = randk.indices(7, 4, 5, range(5), D)
    assert again is not None and not torch.equal(again, everyones)


def test_mean_of_messages_is_mean_of_what_they_stand_for() -> None:
    randk = RandK(0.4)
    vectors = torch.randn(6, D, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    indices = randk.indices(0, 0, 6, range(6), D)
    values = randk.compress(vectors, indices)
    assert values.shape == (6, 4)
    whole = randk.decompress(values, indices, D).mean(dim=0)
    torch.testing.assert_close(randk.mean(values, indices, D), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fraction", [1.0, 0.99])
def test_full_rank_is_dense(fraction: float) -> None:
    randk = RandK(fraction)
    assert randk.indices(0, 0, 2, range(2), D) is None and randk.omega(D) == 0
    assert torch.equal(randk.mean(V.expand(2, D), None, D), V)


def test_draws_leave_the_global_state_alone_and_do_not_depend_on_it() -> None:
    state = torch.get_rng_state()
    first = (
        PermK(3).draw(0, 1, 7, D).permutation,
        RandK(0.3, "independent").indices(0, 1, 2, [0, 1], D),
    )
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    second = (
        PermK(3).draw(0, 1, 7, D).permutation,
        RandK(0.3, "independent").indices(0, 1, 2, [0, 1], D),
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(first, second, strict=True)
        if a is not None and b is not None
    )
    torch.set_rng_state(state)


@pytest.mark.parametrize(
    ("fraction", "mask", "named"),
    [(0, "window", "0"), (1.5, "window", "1.5"), (0.5, "hash", "hash")],
)
def test_bad_values_are_named(fraction: float, mask: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        RandK(fraction, mask)
