"""Each peer against the formula of its paper, in cases where that is known: everything
sent, or one step computed by other means; and its bytes.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from scipy import fft
from torch import Tensor

from lowrank_comm.lab import peers
from lowrank_comm.lab.peers.chunks import Chunks
from lowrank_comm.lab.peers.one_bit_adam import signs
from lowrank_comm.lab.peers.sparse import binned
from lowrank_comm.lab.training.bases import Base, BaseName, base_optimizer
from lowrank_comm.lab.training.workers import PeerWorkers

RATE = 0.01


def weights(*shape: int) -> dict[str, Tensor]:
    return {"w": torch.zeros(shape, requires_grad=True)}


def peer(
    parameters: dict[str, Tensor], base: BaseName = "adamw", workers: int = 2, **given: Any
) -> Any:
    settings = TypeAdapter(peers.PeerSettings).validate_python(given)
    return peers.start(settings, parameters, workers, Base(base, RATE, 0.99), RATE / 2, 0)


def gradients(parameters: dict[str, Tensor], steps: int, workers: int = 2) -> list[list[dict]]:
    draw = torch.Generator().manual_seed(0)
    return [
        [
            {n: torch.randn(p.shape, generator=draw) for n, p in parameters.items()}
            for _ in range(workers)
        ]
        for _ in range(steps)
    ]


def mean(given: list[dict[str, Tensor]], name: str = "w") -> Tensor:
    return torch.stack([one[name] for one in given]).mean(0)


def test_chunks_are_cosine_transformed_and_come_back() -> None:
    x = torch.randn(12, 10, dtype=torch.float32)
    chunks = Chunks(x.shape, 6, transformed=True)
    assert chunks.sides == [6, 5]
    expected = fft.dctn(x[6:, 5:].numpy(), norm="ortho").reshape(-1)
    assert torch.allclose(chunks.cut(x)[3], torch.from_numpy(expected), atol=1e-5)
    assert torch.allclose(chunks.join(chunks.cut(x)), x, atol=1e-5)
    assert Chunks((43,), 64, transformed=False).sides == [43]


def test_demo_is_its_formula() -> None:
    """One chunk, k = 5, against SciPy's transform; then everything sent, which is the
    sign of the mean.
    """
    w = weights(8, 8)
    demo = peer(w, kind="demo", k=5, workers=2)
    momenta = [torch.zeros(8, 8), torch.zeros(8, 8)]
    for given in gradients(w, 3):
        sums, senders = torch.zeros(8, 8), torch.zeros(8, 8)
        for i in (0, 1):
            momenta[i] = 0.999 * momenta[i] + RATE * given[i]["w"]
            c = torch.from_numpy(fft.dctn(momenta[i].numpy(), norm="ortho"))
            kept = c.abs() >= c.abs().flatten().topk(5).values[-1]
            momenta[i] = momenta[i] - torch.from_numpy(fft.idctn((c * kept).numpy(), norm="ortho"))
            sums, senders = sums + c * kept, senders + kept
        update = torch.from_numpy(fft.idctn((sums / senders.clamp(min=1)).numpy(), norm="ortho"))
        assert torch.equal(demo.average(given)["w"], update.sign())
    # values of four bytes and indices of six bits
    assert demo.sent["gather"] == 3 * round(5 * (4 + 6 / 8))
    whole = peer(w, kind="demo", k=64)
    given = gradients(w, 1)[0]
    assert torch.equal(whole.average(given)["w"], mean(given).sign())
    assert whole.sent["gather"] == 4 * 64


def test_sparse_keeps_what_it_does_not_send() -> None:
    w = weights(8, 8)
    sparse = peer(w, kind="sparse", k=3, decay=0.5, workers=1, bits=2)
    before = torch.zeros(8, 8)
    for given in gradients(w, 3, workers=1):
        sent = sparse.average(given)["w"]
        left = sparse._errors[0]["w"]
        assert torch.allclose(sent + left, 0.5 * before + given[0]["w"], atol=1e-6)
        assert 0 < (sent != 0).sum() <= 3
        before = left.clone()
    # codes of two bits, indices of six, a table of four and a mean
    assert sparse.sent["gather"] == 3 * round(3 * (2 + 6) / 8 + 20)
    whole = peer(w, kind="sparse", k=64, bits=None)
    given = gradients(w, 1)[0]
    assert torch.allclose(whole.average(given)["w"], mean(given), atol=1e-6)
    assert binned(torch.randn(500), 2).unique().numel() <= 4


@pytest.mark.parametrize("orthonormal", [False, True])
def test_dion_is_its_formula(orthonormal: bool) -> None:
    w = weights(6, 4)
    dion = peer(w, "muon", kind="dion", rank=2, orthonormal=orthonormal)
    q, momentum = dion._bases["w"].clone(), torch.zeros(6, 4)
    for given in gradients(w, 3):
        # linear, so the mean momentum says all
        momentum = momentum + mean(given)
        p = torch.linalg.qr(momentum @ q).Q
        r = momentum.T @ p
        momentum = momentum - 0.05 * p @ r.T
        q = torch.linalg.qr(r).Q if orthonormal else r / r.norm(dim=0)
        expected = (6 / 4) ** 0.5 * p @ q.T
        assert torch.allclose(dion.average(given)["w"], expected, atol=1e-5)
    assert dion.sent == {"factors": 3 * 4 * 2 * (6 + 4)}
    full = peer(w, "muon", kind="dion", rank=4, orthonormal=True).average(given)["w"]
    assert torch.allclose(torch.linalg.svdvals(full), torch.full((4,), 1.5**0.5), atol=1e-5)


def test_dion_steps_the_rest_by_adamw_at_the_dense_rate() -> None:
    parameters = weights(6, 4) | {"embed": torch.zeros(5, 4, requires_grad=True)}
    dion = peer(parameters, "muon", kind="dion", rank=2)
    assert [group["lr"] for group in dion.optimizer.param_groups] == [RATE, RATE / 2]
    given = gradients(parameters, 1)[0]
    assert torch.equal(dion.average(given)["embed"], mean(given, "embed"))
    assert dion.sent["dense"] == 4 * 20


def test_one_bit_adam_is_adamw_until_it_freezes() -> None:
    """Then momenta of equal length go out as signs, and the errors keep the rest."""
    ours, theirs = weights(4, 4), weights(4, 4)
    adam = base_optimizer(theirs, Base("adamw", RATE, 0.99))
    one = peer(ours, kind="one_bit_adam", freeze_step=3)
    team = PeerWorkers(ours, one, 2, None)
    for given in gradients(ours, 3):
        for each in given:
            ours["w"].grad = each["w"]
            team.collect()
        assert team.step()
        theirs["w"].grad = mean(given)
        adam.step()
        assert torch.allclose(ours["w"], theirs["w"], atol=1e-6)
    assert one.sent == {"dense": 3 * 64}
    frozen = one._v["w"].clone()
    total = torch.zeros(4, 4)
    for given in gradients(ours, 400):
        m = one._m["w"].clone()
        one.average(given)
        total += one._m["w"] - (0.9 * m + 0.1 * mean(given))
    assert torch.equal(one._v["w"], frozen)
    assert one.sent["signs"] == 400 * (2 + 4)
    # what was sent and what is kept are all that was wanted
    kept = torch.stack([own["w"] for own in one._errors]).mean(0) + one._server["w"]
    assert torch.allclose(total, -kept, atol=1e-4)
    x = torch.randn(30)
    assert signs(x).norm() == pytest.approx(x.norm().item())


def test_the_references_greedylore_forgets_its_error_at_a_refresh() -> None:
    w = weights(4, 6)
    greedy = peer(w, kind="greedylore_reference", rank=1, restart_every=2, warmup_steps=1)
    steps = gradients(w, 4)
    for warm_or_refresh in (0, 1, 3):
        if warm_or_refresh == 3:
            before = [own["w"].clone() for own in greedy._errors]
            found = greedy.average(steps[2])["w"]
            delta = [own + given["w"] for own, given in zip(before, steps[2], strict=True)]
            left = [own["w"] for own in greedy._errors]
            # e = Delta - Delta V V^T, so the means differ by what was applied
            assert torch.allclose(sum(delta) / 2 - sum(left) / 2, found, atol=1e-5)
            assert torch.linalg.matrix_rank(found) == 1
        assert torch.allclose(
            greedy.average(steps[warm_or_refresh])["w"], mean(steps[warm_or_refresh])
        )
    assert all(not own["w"].any() for own in greedy._errors)
    assert greedy.sent == {"dense": 96, "restart": 2 * 4 * (24 + 16), "factors": 4 * (6 + 4)}
    whole = peer(w, kind="greedylore_reference", rank=4, restart_every=9)
    for given in steps:
        assert torch.allclose(whole.average(given)["w"], mean(given), atol=1e-5)


def test_a_gradient_that_is_not_finite_skips_the_step() -> None:
    w = weights(4, 4)
    team = PeerWorkers(w, peer(w, kind="demo"), 2, 1.0)
    for value in (1.0, float("nan")):
        w["w"].grad = torch.full((4, 4), value)
        team.collect()
    assert not team.step()
    assert not w["w"].detach().any()
    assert team.sent().vetoed == 1
