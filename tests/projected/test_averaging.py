"""The optimizers in the projected space over real processes: equal to one process with
the mean gradient, or refused.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_comm import (
    ConfigMismatchError,
    LowRankCommError,
    ProjectedAdamW,
    ProjectedSGD,
    UnsupportedError,
)
from lowrank_comm.projected.optimizer import ProjectedOptimizer
from tests.support import ROOT
from tests.support.gloo import GlooPool
from tests.support.projected_model import loss_of, model, parameters
from tests.support.reference import gradient

SETTINGS: dict[str, Any] = {"lr": 0.02, "rank": 3, "restart_every": 4}


def of(kind: str, held: dict[str, nn.Parameter], **more: Any) -> ProjectedOptimizer:
    settings = {
        **SETTINGS,
        "projection": "galore" if kind.startswith("galore") else "golore",
        **more,
    }
    if kind == "hybrid":
        settings["galore_until"] = 5
    return (ProjectedSGD if kind.endswith("SGD") else ProjectedAdamW)(held.items(), **settings)


def give(held: dict[str, nn.Parameter], t: int, workers: list[int]) -> None:
    """The mean of some workers' gradients."""
    for k, p in enumerate(held.values()):
        parts = [torch.as_tensor(gradient(tuple(p.shape), t, worker, k)) for worker in workers]
        p.grad = (sum(parts[1:], parts[0]) / len(parts)).to(p.dtype)


def train(rank: int, kind: str, options: dict[str, Any], steps: int) -> list[dict[str, Tensor]]:
    # whoever draws from the global generator differs
    torch.manual_seed(rank)
    held = parameters()
    optimizer = of(kind, held, **options)
    history = []
    for t in range(steps):
        give(held, t, [rank])
        optimizer.step()
        history.append({name: p.detach().clone() for name, p in held.items()})
    return history


@pytest.mark.parametrize("kind", ["galore", "golore", "hybrid", "galore SGD", "golore, long side"])
def test_processes_equal_one_with_the_mean_gradient(gloo: GlooPool, kind: str) -> None:
    options = {"side": "long"} if kind.endswith("long side") else {}
    kind = kind.removesuffix(", long side")
    histories = gloo.run(train, 3, kind, options, 10)
    held = parameters()
    optimizer = of(kind, held, **options)
    for t in range(10):
        give(held, t, [0, 1, 2])
        optimizer.step()
        for name, p in held.items():
            assert all(
                torch.equal(other[t][name], histories[0][t][name]) for other in histories[1:]
            )
            torch.testing.assert_close(histories[0][t][name], p.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["galore", "golore"])
def test_a_narrow_wire_keeps_workers_equal(gloo: GlooPool, kind: str) -> None:
    narrow = gloo.run(train, 2, kind, {"wire_dtype": "bfloat16"}, 6)
    wide = gloo.run(train, 2, kind, {}, 6)
    for t in range(6):
        assert all(torch.equal(narrow[0][t][name], narrow[1][t][name]) for name in narrow[0][t])
    moved = {
        name: float((wide[0][5][name] - p.detach()).norm()) for name, p in parameters().items()
    }
    assert all(
        float((narrow[0][5][name] - wide[0][5][name]).norm()) < 0.2 * moved[name] for name in moved
    )
    assert any(not torch.equal(narrow[0][5][name], wide[0][5][name]) for name in moved)


def snapshot(optimizer: ProjectedOptimizer, held: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Everything that a step may change."""
    everything = {name: p.detach().clone() for name, p in held.items()}
    for name, p in held.items():
        everything |= {f"{name}.{key}": value.clone() for key, value in optimizer.state[p].items()}
    return everything | {"t": torch.tensor(optimizer.t)}


def one_is_not_finite(rank: int, kind: str, at: int, bad: float) -> list[Any]:
    held = parameters()
    optimizer = of(kind, held)
    for t in range(at):
        give(held, t, [rank])
        optimizer.step()
    before = snapshot(optimizer, held)
    give(held, at, [rank])
    if rank == 1:
        held["wide"].grad[2, 3] = bad
    optimizer.step()
    after, skipped = snapshot(optimizer, held), optimizer.step_was_skipped
    give(held, at, [rank])
    optimizer.step()
    same = before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )
    return [same, skipped, optimizer.step_was_skipped, optimizer.t, held["tall"].detach().clone()]


@pytest.mark.parametrize("at", [3, 4])
@pytest.mark.parametrize("kind", ["galore", "golore"])
def test_one_worker_with_nan_stops_all_and_changes_nothing(
    gloo: GlooPool, kind: str, at: int
) -> None:
    """In an ordinary step and at a refresh: parameters, moments, bases and t stay
    bit-equal; the step that comes then is the one that would have come.
    """
    told = gloo.run(one_is_not_finite, 3, kind, at, float("nan"))
    expected = gloo.run(train, 3, kind, {}, at + 1)
    for same, skipped, skipped_after, t, tall in told:
        assert (same, skipped, skipped_after, t) == (True, True, False, at + 1)
        assert torch.equal(tall, expected[0][at]["tall"])


def one_cannot_be_averaged(rank: int, kind: str) -> tuple[str, int]:
    held = parameters()
    optimizer = of(kind, held)
    for t in range(2):
        give(held, t, [rank])
        optimizer.step()
    give(held, 2, [rank])
    if rank == 1:
        grad = held["wide"].grad.to_sparse()
        held["wide"].grad = None
        held["wide"].grad = grad
    try:
        optimizer.step()
    except LowRankCommError as error:
        told = str(error)
    give(held, 2, [rank])
    optimizer.step()
    return told, optimizer.t


@pytest.mark.parametrize("kind", ["galore", "golore"])
def test_a_gradient_that_cannot_be_averaged_ends_the_step_on_all_workers(
    gloo: GlooPool, kind: str
) -> None:
    for told, t in gloo.run(one_cannot_be_averaged, 3, kind):
        assert "on rank 1 the gradient of wide is sparse" in told and "use sparse=False" in told
        assert t == 3


def some_are_missing(rank: int, kind: str) -> list[dict[str, Tensor]]:
    """At step 2 and at the refresh 4 rank 0 has no gradient for `wide` and `bias`, and
    nobody for `square` and `filter`.
    """
    held = parameters()
    optimizer = of(kind, held)
    history = []
    for t in range(6):
        give(held, t, [rank])
        if t in (2, 4):
            held["square"].grad = held["filter"].grad = None
            if rank == 0:
                held["wide"].grad = held["bias"].grad = None
        optimizer.step()
        history.append(snapshot(optimizer, held))
    return history


@pytest.mark.parametrize("kind", ["galore", "golore"])
def test_missing_gradients_count_as_zero_or_leave_all_as_it_is(gloo: GlooPool, kind: str) -> None:
    histories = gloo.run(some_are_missing, 2, kind)
    held = parameters()
    optimizer = of(kind, held)
    for t in range(6):
        give(held, t, [0, 1])
        if t in (2, 4):
            held["square"].grad = held["filter"].grad = None
            for k, name in enumerate(held):
                if name in ("wide", "bias"):
                    held[name].grad = (
                        torch.from_numpy(gradient(tuple(held[name].shape), t, 1, k)) / 2
                    )
        optimizer.step()
        for name, p in held.items():
            assert torch.equal(histories[0][t][name], histories[1][t][name])
            torch.testing.assert_close(histories[0][t][name], p.detach(), rtol=1e-10, atol=1e-10)
        if t in (2, 4):
            now, before = histories[0][t], histories[0][t - 1]
            for key in now:
                if key.split(".")[0] in ("square", "filter"):
                    assert torch.equal(now[key], before[key])


def first_part(rank: int, kind: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    held = parameters()
    optimizer = of(kind, held)
    for t in range(5):
        # equal mean gradients whatever the number of workers
        give(held, t, [0, 1])
        optimizer.step()
    return optimizer.state_dict(), {name: p.detach().clone() for name, p in held.items()}


def second_part(
    rank: int, kind: str, saved: dict[str, Any], values: dict[str, Tensor]
) -> dict[str, Tensor]:
    held = parameters()
    with torch.no_grad():
        for name, p in held.items():
            p.copy_(values[name])
    optimizer = of(kind, held)
    optimizer.load_state_dict(saved)
    for t in range(5, 15):
        give(held, t, [0, 1])
        optimizer.step()
    return {name: p.detach().clone() for name, p in held.items()}


@pytest.mark.parametrize("kind", ["galore", "hybrid"])
def test_a_state_dict_resumes_at_another_number_of_workers(gloo: GlooPool, kind: str) -> None:
    saved, values = gloo.run(first_part, 2, kind)[1]
    resumed = gloo.run(second_part, 3, kind, saved, values)
    held = parameters()
    optimizer = of(kind, held)
    for t in range(15):
        give(held, t, [0, 1])
        optimizer.step()
    for name, p in held.items():
        torch.testing.assert_close(resumed[0][name], p.detach(), rtol=1e-10, atol=1e-10)
        assert all(torch.equal(other[name], resumed[0][name]) for other in resumed)


def with_scaler(rank: int, overflows: bool) -> list[dict[str, Tensor]]:
    """A GradScaler on each worker; rank 1 overflows at step 2."""
    net = model(torch.float32)
    optimizer = ProjectedAdamW(net.named_parameters(), **SETTINGS)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    history = []
    for t in range(5):
        optimizer.zero_grad()
        scaler.scale(loss_of(net, 2 * t + rank)).backward()
        if overflows and t == 2 and rank == 1:
            net[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        history.append({name: p.detach().clone() for name, p in net.named_parameters()})
    return history


def test_a_grad_scaler_waits_for_nobody(gloo: GlooPool) -> None:
    plain, overflowed = gloo.run(with_scaler, 2, False), gloo.run(with_scaler, 2, True)
    for name in plain[0][0]:
        for histories in (plain, overflowed):
            assert all(torch.equal(histories[0][t][name], histories[1][t][name]) for t in range(5))
        assert torch.equal(overflowed[0][2][name], overflowed[0][1][name])
        assert not torch.equal(plain[0][2][name], plain[0][1][name])


def the_page(rank: int) -> float:
    """The example of docs/memory_efficient.md, in a group that is there already; the
    sum of the trained weights.
    """
    page = (ROOT / "docs" / "memory_efficient.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert code.count("torch.distributed.init_process_group") == 1
    names: dict[str, Any] = {}
    exec(
        code.replace('torch.distributed.init_process_group("gloo")', "").replace("leave()", ""),
        names,
    )
    # and a bias, five counters
    assert names["optimizer"].state_bytes() == 8 * 512 * 16 + 4 * 256 * 16 + 8 * 512 + 4 * 5
    return float(names["model"].weight.detach().sum())


def test_the_pages_example_trains(gloo: GlooPool) -> None:
    sums = gloo.run(the_page, 2)
    torch.manual_seed(0)
    assert sums[0] == sums[1] != float(nn.Linear(256, 512).weight.detach().sum())


# --- refusals ---


def refused(rank: int, how: str) -> str:
    """The error on this rank, and its kind."""
    net: nn.Module = model()
    try:
        if how == "DDP":
            net = nn.parallel.DistributedDataParallel(net)
            optimizer = ProjectedAdamW(net.module.named_parameters(), **SETTINGS)
            net(torch.full((4, 10), float(rank), dtype=torch.float64)).sum().backward()
            optimizer.step()
        elif how == "FSDP2":
            from torch.distributed.fsdp import fully_shard

            fully_shard(net)
            ProjectedAdamW(net.named_parameters(), **SETTINGS)
        elif how == "group":
            mesh = torch.distributed.init_device_mesh(
                "cpu", (2, 1), mesh_dim_names=("replicate", "shard")
            )
            ProjectedAdamW(net.named_parameters(), process_group=mesh, **SETTINGS)
        else:
            settings = {**SETTINGS, "restart_every": 4 + rank} if how == "settings" else SETTINGS
            optimizer = ProjectedAdamW(net.named_parameters(), **settings)
            if how == "values" and rank == 1:
                with torch.no_grad():
                    net[0].weight[0, 0] += 1.0
            loss_of(net, rank).backward()
            optimizer.step()
            if how == "loaded" and rank == 1:
                optimizer.load_state_dict(optimizer.state_dict())
                optimizer.state[net[0].weight]["exp_avg"] += 1.0
            elif how == "loaded":
                optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
    except LowRankCommError as error:
        return f"{type(error).__name__}: {error}"
    return ""


REFUSALS: dict[str, tuple[type[Exception], list[str]]] = {
    "DDP": (
        LowRankCommError,
        ["averaged them already", "do not wrap it in DistributedDataParallel"],
    ),
    "FSDP2": (UnsupportedError, ["sharded (FSDP)", "CompressedOptimizer"]),
    "group": (LowRankCommError, ["2-D mesh", "mesh['replicate']"]),
    "settings": (ConfigMismatchError, ["restart_every: 4 on rank 0, 5 on rank 1"]),
    "values": (
        ConfigMismatchError,
        ["values of the parameters", "broadcast the parameters from rank 0"],
    ),
    "loaded": (ConfigMismatchError, ["state of the optimizer (load the same on all workers)"]),
}


@pytest.mark.parametrize("how", list(REFUSALS))
def test_what_cannot_work_is_refused_on_every_rank(gloo: GlooPool, how: str) -> None:
    kind, words = REFUSALS[how]
    for text in gloo.run(refused, 2, how):
        assert text
        assert issubclass(getattr(__import__("lowrank_comm"), text.split(":")[0]), kind)
        assert all(word in text for word in words), text
    assert gloo.run(refused, 2, "nothing at all") == ["", ""]
