"""ProjectedAdamW: its moments against NumPy and torch, and how a refresh carries them
over.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_comm import ProjectedAdamW
from tests.support.projected_model import SHAPES, give, parameters, run
from tests.support.reference import gradient
from tests.support.reference_projection import ProjectedAdam, Projection

SETTINGS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "scale": 0.5, "betas": (0.8, 0.95)}


@pytest.mark.parametrize("second_moment", ["rotate", "keep", "reset"])
@pytest.mark.parametrize("side", ["short", "long"])
@pytest.mark.parametrize(("projection", "until"), [("galore", 0), ("golore", 0), ("golore", 6)])
def test_fifteen_steps_as_numpy(projection: str, until: int, side: str, second_moment: str) -> None:
    """tau = 4: three refreshes after the first, between them moments that must have
    been carried over.
    """
    held = parameters()
    papers = {
        name: ProjectedAdam(
            held[name].detach().numpy(),
            Projection(name, shape, 1, 3, 4, projection, side, until),
            SETTINGS["lr"],
            SETTINGS["betas"],
            1e-8,
            SETTINGS["weight_decay"],
            SETTINGS["scale"],
            second_moment,
        )
        for name, shape in SHAPES.items()
    }
    optimizer = ProjectedAdamW(
        held.items(), rank=3, restart_every=4, projection=projection, galore_until=until, side=side,
        second_moment=second_moment, **SETTINGS,
    )  # fmt: skip
    for t, after in enumerate(run(optimizer, held, 15)):
        for k, (name, shape) in enumerate(SHAPES.items()):
            papers[name].step([gradient(shape, t, 0, k)])
            np.testing.assert_allclose(
                after[name].numpy(), papers[name].w, rtol=1e-9, atol=1e-9, err_msg=f"{name} {t}"
            )
    # singular vectors may differ in sign, and coordinates with them
    if projection == "golore" and not until:
        for name, paper in papers.items():
            basis = torch.from_numpy(paper.subspace.p)
            turn = optimizer.state[held[name]]["projector"].mT @ basis
            np.testing.assert_allclose(
                (optimizer.state[held[name]]["exp_avg"] @ turn).numpy(),
                paper.first,
                rtol=1e-9,
                atol=1e-9,
            )


def test_with_both_moments_kept_it_is_galores_published_optimizer() -> None:
    """Three refreshes, as galore_torch's `AdamW` and `GaLoreProjector` compute them,
    but for eps and the decay, whose conventions differ. Bases are taken from the
    optimizer, since singular vectors have no sign of their own.
    """
    held, tau, rank, lr, scale, (b1, b2) = parameters(), 4, 3, 0.01, 0.25, (0.8, 0.95)
    weights = {name: held[name].detach().clone() for name in SHAPES}
    moments = {name: (torch.zeros(()), torch.zeros(())) for name in SHAPES}
    optimizer = ProjectedAdamW(
        held.items(), lr, rank, tau, projection="galore", first_moment="keep",
        second_moment="keep", scale=scale, betas=(b1, b2), eps=0.0, weight_decay=0.0,
    )  # fmt: skip
    for t in range(10):
        (after,) = run(optimizer, held, 1, t)
        for k, (name, (m, n)) in enumerate(SHAPES.items()):
            g = torch.from_numpy(gradient((m, n), t, 0, k))
            p = optimizer.state[held[name]]["projector"]
            if t % tau == 0:
                u, _, vt = torch.linalg.svd(g, full_matrices=False)
                theirs = vt[:rank].T if m >= n else u[:, :rank]
                torch.testing.assert_close(p @ p.T, theirs @ theirs.T)
            r = g @ p if m >= n else p.T @ g
            first, second = (b1 * moments[name][0] + (1 - b1) * r, b2 * moments[name][1])
            moments[name] = (first, second + (1 - b2) * r.square())
            step_size = lr * math.sqrt(1 - b2 ** (t + 1)) / (1 - b1 ** (t + 1))
            update = first / moments[name][1].sqrt()
            weights[name] -= step_size * scale * (update @ p.T if m >= n else p @ update)
            torch.testing.assert_close(after[name], weights[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("how", ["not two dimensions", "rank=None", "full rank"])
def test_what_is_not_projected_is_torchs_adamw(how: str) -> None:
    held, others = parameters(), parameters()
    names = ("bias", "filter") if how == "not two dimensions" else tuple(held)
    rank = {"not two dimensions": 3, "rank=None": None, "full rank": 9}[how]
    settings = {"lr": 0.01, "weight_decay": 0.1, "betas": (0.8, 0.95)}
    optimizer = ProjectedAdamW(held.items(), rank=rank, restart_every=4, scale=0.25, **settings)
    plain = torch.optim.AdamW(others.values(), **settings)
    for t, after in enumerate(run(optimizer, held, 9)):
        give(others, t)
        plain.step()
        for name in names:
            torch.testing.assert_close(after[name], others[name].detach(), rtol=1e-12, atol=1e-12)
        if how == "not two dimensions":
            assert not torch.allclose(after["tall"], others["tall"])


def test_the_rotated_moment_is_written_back() -> None:
    """At a refresh M <- b1 M T + (1 - b1) R, in the state. (Known defect: the rotated
    moment goes into the update and is forgotten; the next step starts from the old
    coordinates in the new subspace.)
    """
    held = parameters()
    optimizer = ProjectedAdamW(
        held.items(), rank=3, restart_every=4, projection="golore", **SETTINGS
    )
    run(optimizer, held, 4)
    state = optimizer.state[held["tall"]]
    before, old = state["exp_avg"].clone(), state["projector"].clone()
    run(optimizer, held, 1, 4)
    b1, overlap = SETTINGS["betas"][0], old.mT @ state["projector"]
    r = torch.from_numpy(gradient(SHAPES["tall"], 4, 0, 0)) @ state["projector"]
    torch.testing.assert_close(
        state["exp_avg"], b1 * before @ overlap + (1 - b1) * r, rtol=1e-12, atol=1e-12
    )
    assert not torch.allclose(state["exp_avg"], before)
    assert not torch.allclose(state["exp_avg"], b1 * before + (1 - b1) * r)


@pytest.mark.parametrize("second_moment", ["rotate", "keep", "reset"])
def test_the_second_moment_is_carried_over_as_asked(second_moment: str) -> None:
    held = parameters()
    optimizer = ProjectedAdamW(
        held.items(),
        rank=3,
        restart_every=4,
        projection="golore",
        second_moment=second_moment,
        **SETTINGS,
    )
    run(optimizer, held, 4)
    state = optimizer.state[held["tall"]]
    before, old = state["exp_avg_sq"].clone(), state["projector"].clone()
    run(optimizer, held, 1, 4)
    shares = (old.mT @ state["projector"]).square()
    carried = {
        "rotate": before @ shares + before.mean(1, keepdim=True) * (1 - shares.sum(0)),
        "keep": before,
        "reset": torch.zeros_like(before),
    }[second_moment]
    b2 = SETTINGS["betas"][1]
    r = torch.from_numpy(gradient(SHAPES["tall"], 4, 0, 0)) @ state["projector"]
    torch.testing.assert_close(
        state["exp_avg_sq"], b2 * carried + (1 - b2) * r.square(), rtol=1e-12, atol=1e-12
    )
    assert float(state["exp_avg_sq"].min()) >= 0.0
    assert (float(state["step"]), float(state["second_step"])) == (
        5.0,
        1.0 if second_moment == "reset" else 5.0,
    )


def test_rotation_of_the_second_moment_is_exact_for_uncorrelated_coordinates() -> None:
    """Gradients with independent coordinates of given variances: S is their variances;
    in the new subspace, inside the old one, rotated S is the variances of the new
    coordinates, by 20 000 samples. Kept by position it is not.
    """
    generator = torch.Generator().manual_seed(0)
    variances = torch.tensor([[9.0, 4.0, 1.0, 0.25]], dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(4, 4, generator=generator, dtype=torch.float64)).Q
    optimizer = ProjectedAdamW(parameters().items(), rank=3)
    state = {"exp_avg": torch.zeros(1, 4, dtype=torch.float64), "exp_avg_sq": variances.clone()}
    optimizer.rule.move(state, turn)
    sample = (
        torch.randn(20_000, 4, generator=generator, dtype=torch.float64) * variances.sqrt() @ turn
    ).square()
    error = sample.std(0) / 20_000**0.5
    assert bool(((state["exp_avg_sq"][0] - sample.mean(0)).abs() < 4 * error).all())
    assert bool(((variances[0] - sample.mean(0)).abs() > 10 * error).any())


def test_the_first_moment_comes_as_near_as_the_new_subspace_allows() -> None:
    """The subspace turned by 40 degrees in every direction, and its columns mixed as an
    SVD may: the distance of the moment to the old one in the full space is sin 40
    degrees = 0.643, the least possible; kept by position it is above 1.
    """
    generator = torch.Generator().manual_seed(1)
    q = torch.linalg.qr(torch.randn(12, 6, generator=generator, dtype=torch.float64)).Q
    old, angle = q[:, :3], math.radians(40)
    mix = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
    new = (math.cos(angle) * old + math.sin(angle) * q[:, 3:]) @ mix
    moment = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    optimizer = ProjectedAdamW(parameters().items(), rank=3)
    state = {"exp_avg": moment.clone(), "exp_avg_sq": torch.ones_like(moment)}
    optimizer.rule.move(state, old.mT @ new)

    def distance(coordinates: Tensor) -> float:
        return float((coordinates @ new.mT - moment @ old.mT).norm() / moment.norm())

    assert distance(state["exp_avg"]) == pytest.approx(math.sin(angle), abs=1e-12)
    # least squares
    assert distance(state["exp_avg"]) == pytest.approx(distance(moment @ old.mT @ new), abs=1e-12)
    assert distance(moment) > 1.0


def test_weight_decay_is_of_the_weights_before_the_step() -> None:
    held, undecayed = parameters(), parameters()
    lr, decay = 0.1, 0.5
    start = held["tall"].detach().clone()
    run(ProjectedAdamW(held.items(), lr=lr, rank=3, weight_decay=decay), held, 1)
    run(ProjectedAdamW(undecayed.items(), lr=lr, rank=3, weight_decay=0.0), undecayed, 1)
    update = undecayed["tall"].detach() - start
    torch.testing.assert_close(
        held["tall"].detach(), start + update - lr * decay * start, rtol=1e-13, atol=1e-13
    )
    assert not torch.allclose(held["tall"].detach(), (start + update) * (1 - lr * decay))
