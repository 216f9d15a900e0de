"""`BidirectionalOptimizer` over real processes: equal to the simulation, the veto,
resume, GradScaler, what is refused.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from lowrank_comm import (
    CompressedOptimizer,
    ConfigError,
    ConfigMismatchError,
    LowRankCommError,
    PowerSGD,
    StateMismatchError,
    UnsupportedError,
)
from lowrank_comm.bidirectional import (
    M3,
    M4,
    BidirectionalOptimizer,
    BidirectionalSimulation,
    InkheartSGD,
    MarinaP,
    Method,
)
from lowrank_comm.numerics.randomness import stream
from tests.support import ROOT
from tests.support.gloo import GlooPool

SHAPES = {"matrix": (5, 3), "vector": (4,), "scalar": ()}
D = 20
METHODS_RUN: list[Method] = [
    # G < n divides n: broadcasts in fixed groups
    InkheartSGD(2, 0.3, uplink_fraction=0.4),
    # G = n: scatter
    InkheartSGD(4, 0.3, uplink_fraction=0.4, mask="independent"),
    # G does not divide n: scatter, workers permuted
    InkheartSGD(3, 0.3, uplink_fraction=0.4),
    MarinaP(2),
    M3(4, 0.3, uplink_fraction=0.4),
    M4(2, 0.3, uplink_fraction=0.4),
]


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    return {
        name: nn.Parameter(torch.full(shape, 0.5, dtype=dtype)) for name, shape in SHAPES.items()
    }


def flat(named: dict[str, nn.Parameter]) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in named.values()])


def pull(w: Tensor, t: int, worker: int) -> Tensor:
    """This worker's gradient at w, (d,), with targets and noise of its own."""
    noise = torch.randn(D, generator=stream(worker, "test", t, "noise"), dtype=torch.float64)
    return w - worker - 1 + 0.3 * noise.to(w.dtype)


def set_gradients(named: dict[str, nn.Parameter], gradient: Tensor) -> None:
    for p, piece in zip(
        named.values(), gradient.split([p.numel() for p in named.values()]), strict=True
    ):
        p.grad = piece.reshape(p.shape).clone()


def build(
    named: dict[str, nn.Parameter], method: Method, kind: str = "sgd", **keywords: Any
) -> BidirectionalOptimizer:
    base = (
        torch.optim.SGD(named.items(), lr=0.2)
        if kind == "sgd"
        else torch.optim.AdamW(named.items(), lr=0.05)
    )
    return BidirectionalOptimizer(base, method, **keywords)


def train(
    optimizer: BidirectionalOptimizer, named: dict[str, nn.Parameter], rank: int, steps: range
) -> None:
    for t in steps:
        set_gradients(named, pull(flat(named), t, rank))
        optimizer.step()


# --- equal to the simulation ---


def trajectory(rank: int, method: Method) -> tuple[list[Tensor], list[Tensor], Any]:
    named = parameters()
    optimizer, points, servers = build(named, method, seed=3), [], []
    for t in range(25):
        train(optimizer, named, rank, range(t, t + 1))
        points.append(flat(named))
        x = optimizer.server_parameters()
        servers.append(torch.cat([x[name].reshape(-1) for name in SHAPES]))
    return points, servers, (optimizer.ledger.coordinates, optimizer.ledger.bytes)


@pytest.mark.parametrize("method", METHODS_RUN, ids=repr)
def test_processes_equal_the_simulation(gloo: GlooPool, method: Method) -> None:
    answers = gloo.run(trajectory, 4, method)
    simulation = BidirectionalSimulation(
        method, torch.full((D,), 0.5, dtype=torch.float64), 4, gamma=0.2, seed=3
    )
    differed = False
    for t in range(25):
        w = simulation.points
        assert simulation.step(torch.stack([pull(w[i], t, i) for i in range(4)]))
        for rank, (points, servers, _) in enumerate(answers):
            torch.testing.assert_close(points[t], simulation.points[rank], rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(servers[t], simulation.x, rtol=1e-12, atol=1e-12)
            assert torch.equal(servers[t], answers[0][1][t])
        differed |= not torch.equal(answers[1][0][t], answers[2][0][t])
    # the workers' weights are their own
    assert differed
    coordinates, sent = answers[1][2]
    # the busiest link, by the same formula
    assert coordinates == simulation.ledger.coordinates
    assert sent["uplink"] == 8 * coordinates["uplink"] and sent["control"] == 25 * 16
    assert all(answer[2] == answers[0][2] for answer in answers)


def in_a_subgroup(rank: int) -> Tensor | None:
    """Ranks 1 and 3 are the workers; rank 1 serves."""
    group = dist.new_group([1, 3])
    if rank not in (1, 3):
        return None
    named = parameters()
    optimizer = build(named, InkheartSGD(2, 0.3, uplink_fraction=0.4), process_group=group)
    train(optimizer, named, rank, range(10))
    assert optimizer.is_server == (rank == 1)
    return torch.cat([p.reshape(-1) for p in optimizer.server_parameters().values()])


def test_a_process_group_of_some_ranks(gloo: GlooPool) -> None:
    answers = gloo.run(in_a_subgroup, 4)
    assert torch.equal(answers[1], answers[3])


def test_alone_and_uncompressed_it_is_the_base_exactly() -> None:
    for kind in ("sgd", "adamw"):
        named, plain = parameters(), parameters()
        optimizer = build(named, InkheartSGD(1, uplink_fraction=1.0), kind)
        base = (
            torch.optim.SGD(plain.items(), lr=0.2)
            if kind == "sgd"
            else torch.optim.AdamW(plain.items(), lr=0.05)
        )
        for t in range(10):
            train(optimizer, named, 0, range(t, t + 1))
            set_gradients(plain, pull(flat(plain), t, 0))
            base.step()
        assert torch.equal(flat(named), flat(plain))


# --- a plain loop, and evaluation at x ---


def real_loop(rank: int) -> tuple[list[float], bool, bool]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
    base = torch.optim.Adam(model.parameters(), lr=0.02)
    section = {"compressor": "inkheart", "uplink_fraction": 0.5, "downlink_groups": 2, "seed": 1}
    optimizer = BidirectionalOptimizer.from_config(base, section)
    optimizer.attach(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 100, 0.5)
    draws = torch.Generator().manual_seed(rank)
    held_out = torch.randn(64, 6, generator=torch.Generator().manual_seed(99))
    losses = []
    for t in range(120):
        inputs = torch.randn(16, 6, generator=draws)
        loss = (model(inputs).squeeze(1) - inputs.sum(dim=1)).square().mean() / 2
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if t % 40 == 0 or t == 119:
            own = [p.detach().clone() for p in model.parameters()]
            with optimizer.at_server_parameters(), torch.no_grad():
                losses.append(
                    float((model(held_out).squeeze(1) - held_out.sum(dim=1)).square().mean())
                )
            assert all(torch.equal(a, b) for a, b in zip(own, model.parameters(), strict=True))
    return losses, bool(optimizer.base.state), optimizer.is_server


@pytest.mark.filterwarnings("ignore:4 parameters have no names")
def test_a_model_learns_and_is_evaluated_at_x(gloo: GlooPool) -> None:
    answers = gloo.run(real_loop, 4)
    # the same x everywhere
    assert all(losses == answers[0][0] for losses, _, _ in answers)
    assert answers[0][0][-1] < 0.5 * answers[0][0][0]
    assert [server for _, _, server in answers] == [True, False, False, False]
    # Adam's moments are on the server only
    assert [holds for _, holds, _ in answers] == [True, False, False, False]


# --- the veto ---


def everything(optimizer: BidirectionalOptimizer, named: dict[str, nn.Parameter]) -> list[Tensor]:
    saved = optimizer.state_dict()
    own = [value.clone() for value in saved["lowrank_comm_bidirectional"]["tensors"].values()]
    moments = [
        v.clone()
        for entry in saved["state"].values()
        for v in entry.values()
        if isinstance(v, Tensor)
    ]
    return [flat(named), *own, *moments]


def vetoed(rank: int, method: Method, at: str) -> tuple[bool, bool, int]:
    named = parameters(torch.float32)
    optimizer = build(named, method, "adamw")
    train(optimizer, named, rank, range(4))
    before = everything(optimizer, named)
    gradient = pull(flat(named), 4, rank)
    if at == "rank 2" and rank == 2:
        gradient[7] = math.nan
    if at == "sum":
        # finite on each worker, and not when scaled up and added
        gradient[:] = 3e38
    set_gradients(named, gradient)
    optimizer.step()
    after = everything(optimizer, named)
    skipped = optimizer.step_was_skipped
    train(optimizer, named, rank, range(5, 6))
    assert not optimizer.step_was_skipped
    return skipped, len(before) == len(after) and all(map(torch.equal, before, after)), optimizer.t


@pytest.mark.parametrize(
    ("method", "at"),
    [
        (METHODS_RUN[0], "rank 2"),
        (METHODS_RUN[4], "rank 2"),
        (METHODS_RUN[5], "rank 2"),
        (METHODS_RUN[0], "sum"),
    ],
    ids=repr,
)
def test_a_vetoed_step_leaves_all_state_as_it_was(gloo: GlooPool, method: Method, at: str) -> None:
    assert gloo.run(vetoed, 4, method, at) == [(True, True, 5)] * 4


def sparse(rank: int, method: Method) -> tuple[str, int]:
    named = parameters(torch.float32)
    optimizer = build(named, method, "adamw")
    train(optimizer, named, rank, range(2))
    set_gradients(named, pull(flat(named), 2, rank))
    name, parameter = next(iter(named.items()))
    if rank == 2:
        grad = parameter.grad.to_sparse()
        parameter.grad = None
        parameter.grad = grad
    try:
        optimizer.step()
    except LowRankCommError as error:
        told = str(error)
    parameter.grad = None
    train(optimizer, named, rank, range(2, 3))
    return told.replace(name, "PARAMETER"), optimizer.t


@pytest.mark.parametrize("method", [METHODS_RUN[0], METHODS_RUN[4], METHODS_RUN[5]], ids=repr)
def test_a_gradient_that_cannot_be_averaged_ends_the_step_on_all_workers(
    gloo: GlooPool, method: Method
) -> None:
    for told, t in gloo.run(sparse, 4, method):
        assert "on rank 2 the gradient of PARAMETER is sparse" in told
        assert t == 3


def raising(rank: int, method: Method) -> tuple[str, bool, bool]:
    """What is raised where the base raises on rank 0 in the middle of its step; whether
    everything is as before; and whether the run then is the one without.
    """
    said, ends = "", []
    for raises in (True, False):
        named = parameters(torch.float32)
        optimizer = build(named, method, "adamw")
        train(optimizer, named, rank, range(3))
        if raises:
            step = optimizer.base.step

            def broken(*_: object, named: dict[str, nn.Parameter] = named) -> None:
                with torch.no_grad():
                    named["matrix"].zero_()
                raise ValueError("the base is broken")

            before = everything(optimizer, named)
            set_gradients(named, pull(flat(named), 3, rank))
            gradients = [p.grad for p in named.values()]
            optimizer.base.step = broken  # type: ignore[method-assign]
            try:
                optimizer.step()
            except (LowRankCommError, ValueError) as error:
                said = f"{type(error).__name__}: {error}"
            optimizer.base.step = step  # type: ignore[method-assign]
            after = everything(optimizer, named)
            untouched = len(before) == len(after) and all(map(torch.equal, before, after))
            untouched &= all(p.grad is g for p, g in zip(named.values(), gradients, strict=True))
        train(optimizer, named, rank, range(3, 6))
        ends.append(flat(named))
    return said, untouched, torch.equal(*ends)


@pytest.mark.parametrize("method", METHODS_RUN[3:], ids=repr)
def test_what_the_base_raises_on_rank_0_ends_the_step_on_all_ranks(
    gloo: GlooPool, method: Method
) -> None:
    first, *others = gloo.run(raising, 4, method)
    assert first == ("ValueError: the base is broken", True, True)
    for said, untouched, goes_on in others:
        assert said.startswith("LowRankCommError")
        assert "on rank 0" in said
        assert "ValueError: the base is broken" in said
        assert untouched
        assert goes_on


def scaled(rank: int) -> tuple[list[float], list[bool]]:
    named = parameters(torch.float32)
    optimizer = build(named, InkheartSGD(2, uplink_fraction=1.0))
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=100)
    model = nn.Module()
    for name, p in named.items():
        model.register_parameter(name, p)
    optimizer.attach(model, scaler=scaler)
    scales, skipped = [], []
    for t in range(3):
        loss = sum((p.sum() for p in named.values()), torch.zeros(()))
        scaler.scale(loss).backward()
        if t == 1 and rank == 3:
            named["vector"].grad[0] = math.inf  # type: ignore[index]
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
        skipped.append(optimizer.step_was_skipped)
    x = torch.cat([p.reshape(-1) for p in optimizer.server_parameters().values()])
    # two steps, without the scale
    torch.testing.assert_close(x, torch.full((D,), 0.5 - 2 * 0.2))
    return scales, skipped


def test_a_grad_scaler_is_lowered_on_all_workers(gloo: GlooPool) -> None:
    assert gloo.run(scaled, 4) == [([8.0, 4.0, 4.0], [False, True, False])] * 4


# --- resume ---


def interrupted(
    rank: int, method: Method, folder: str, dtype: torch.dtype, kind: str = "adamw"
) -> tuple[bool, bool]:
    named = parameters(dtype)
    optimizer = build(named, method, kind, seed=5)
    train(optimizer, named, rank, range(6))
    torch.save(optimizer.state_dict(), Path(folder) / f"{rank}.pt")
    train(optimizer, named, rank, range(6, 12))
    again = parameters(dtype)
    # the seed is the run's, from the file
    resumed = build(again, method, kind, seed=0)
    resumed.load_state_dict(torch.load(Path(folder) / f"{rank}.pt", weights_only=True))
    train(resumed, again, rank, range(6, 12))
    one, two = everything(optimizer, named), everything(resumed, again)
    return len(one) == len(two) and all(map(torch.equal, one, two)), resumed.seed == 5


@pytest.mark.parametrize("method", [METHODS_RUN[0], METHODS_RUN[4], METHODS_RUN[5]], ids=repr)
def test_the_same_workers_resume_bit_by_bit(gloo: GlooPool, method: Method, tmp_path: Path) -> None:
    assert gloo.run(interrupted, 4, method, str(tmp_path), torch.float32) == [(True, True)] * 4


def elsewhere(rank: int, method: Method, folder: str) -> tuple[Tensor, Tensor, Tensor, list[str]]:
    """Two workers resume what four have saved, both from rank 0's file."""
    named = parameters()
    optimizer = build(named, method)
    saved = torch.load(Path(folder) / "0.pt", weights_only=True)
    optimizer.load_state_dict(saved)
    start = flat(named)
    state = {
        k: v.clone()
        for k, v in optimizer.state_dict()["lowrank_comm_bidirectional"]["tensors"].items()
    }
    if "y" in state:
        assert torch.equal(state["y"][0], saved["lowrank_comm_bidirectional"]["tensors"]["y_bar"])
        assert torch.equal(state["v"], state["y"])
    train(optimizer, named, rank, range(6, 300))
    x = torch.cat([p.reshape(-1) for p in optimizer.server_parameters().values()])
    return saved["lowrank_comm_bidirectional"]["tensors"]["x"], start, x, sorted(state)


@pytest.mark.parametrize(
    "method", [METHODS_RUN[0], M3(2, 0.3, uplink_fraction=0.4), METHODS_RUN[5]], ids=repr
)
def test_another_number_of_workers_starts_at_x(
    gloo: GlooPool, method: Method, tmp_path: Path
) -> None:
    gloo.run(interrupted, 4, method, str(tmp_path), torch.float64, "sgd")
    for rank, (x, start, end, names) in enumerate(gloo.run(elsewhere, 2, method, str(tmp_path))):
        assert torch.equal(start, x) and ("x" in names) == (rank == 0)
        # the mean of the two targets; noise stays
        assert float((end - 1.5).norm()) < 1.0
        assert float((start - 1.5).norm()) > 1.0


def misfit(rank: int, folder: str) -> str:
    named = parameters()
    optimizer = build(named, METHODS_RUN[5])
    train(optimizer, named, rank, range(1))
    before = flat(named)
    saved = torch.load(Path(folder) / f"{rank}.pt", weights_only=True)
    if rank == 1:
        saved["lowrank_comm_bidirectional"]["shapes"]["matrix"] = [3, 5]
    try:
        optimizer.load_state_dict(saved)
    except StateMismatchError as error:
        assert torch.equal(flat(named), before)
        return str(error)
    return "loaded"


def test_a_state_that_fits_not_everywhere_is_refused_everywhere(
    gloo: GlooPool, tmp_path: Path
) -> None:
    gloo.run(interrupted, 2, METHODS_RUN[5], str(tmp_path), torch.float64, "sgd")
    for told in gloo.run(misfit, 2, str(tmp_path)):
        assert told.startswith("rank 1: ") and "'matrix' is [3, 5] there and [5, 3] here" in told


def test_misfits_name_what_differs() -> None:
    named = parameters()
    optimizer = build(named, M3(1))
    train(optimizer, named, 0, range(2))
    saved = optimizer.state_dict()
    with pytest.raises(StateMismatchError, match=r"method 'm3'.*'m4'"):
        build(parameters(), M4(1)).load_state_dict(saved)
    del saved["lowrank_comm_bidirectional"]["tensors"]["x"]
    with pytest.raises(StateMismatchError, match="has no x"):
        build(parameters(), M3(1)).load_state_dict(saved)
    plain = build(parameters(), M3(1))
    plain.load_state_dict(torch.optim.SGD(parameters().values(), lr=0.7).state_dict())
    assert plain.param_groups[0]["lr"] == 0.7


# --- what is refused ---


def wrapped(rank: int, how: str) -> str:
    model = nn.Linear(6, 3)
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    try:
        if how == "fsdp2":
            from torch.distributed.fsdp import fully_shard

            fully_shard(model)
            base = torch.optim.SGD(model.named_parameters(), lr=0.1)
        optimizer = BidirectionalOptimizer(base, InkheartSGD(2))
        if how.startswith("ddp"):
            engine = nn.parallel.DistributedDataParallel(model)
            if how == "ddp attached":
                optimizer.attach(engine)
            engine(torch.full((2, 6), float(rank))).sum().backward()
        else:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
        optimizer.step()
    except UnsupportedError as error:
        return str(error)
    return "stepped"


@pytest.mark.parametrize(
    ("how", "engine"),
    [
        ("ddp attached", "DistributedDataParallel"),
        ("ddp", "DistributedDataParallel"),
        ("fsdp2", "FSDP2"),
    ],
)
def test_engines_that_need_equal_weights_are_refused(gloo: GlooPool, how: str, engine: str) -> None:
    for told in gloo.run(wrapped, 2, how):
        assert engine in told and "every worker holds weights of its own" in told


def test_deepspeed_and_fsdp1_parameters_are_refused() -> None:
    for mark in ("ds_id", "_is_flat_param"):
        parameter = nn.Parameter(torch.zeros(3))
        setattr(parameter, mark, 1)
        optimizer = BidirectionalOptimizer(
            torch.optim.SGD([("p", parameter)], lr=0.1), InkheartSGD(1)
        )
        parameter.grad = torch.zeros(3)
        with pytest.raises(UnsupportedError, match="held in shards"):
            optimizer.step()


def differing(rank: int, what: str) -> str:
    named = parameters()
    if what == "values" and rank == 1:
        named["vector"].data += 1
    method = InkheartSGD(2, uplink_fraction=0.5 if what == "method" and rank else 0.25)
    optimizer = build(named, method, seed=rank if what == "seed" else 0)
    try:
        train(optimizer, named, rank, range(1))
    except ConfigMismatchError as error:
        return str(error)
    return "stepped"


@pytest.mark.parametrize(
    ("what", "named"),
    [("values", "values of the parameters"), ("method", "uplink_fraction"), ("seed", "seed")],
)
def test_workers_must_agree(gloo: GlooPool, what: str, named: str) -> None:
    assert all(named in told for told in gloo.run(differing, 2, what))


def test_bad_arguments_are_named() -> None:
    parameter = nn.Parameter(torch.zeros(3))
    base = torch.optim.SGD([("p", parameter)], lr=0.1)
    with pytest.raises(ConfigError, match="CompressedOptimizer"):
        BidirectionalOptimizer(CompressedOptimizer(base, PowerSGD(1)), InkheartSGD())
    with pytest.raises(ConfigError, match="LBFGS"):
        BidirectionalOptimizer(torch.optim.LBFGS([parameter]), InkheartSGD())
    with pytest.raises(ConfigError, match="PowerSGD"):
        BidirectionalOptimizer(base, PowerSGD(1))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="seed='a'"):
        BidirectionalOptimizer(base, InkheartSGD(), seed="a")  # type: ignore[arg-type]
    parameter.grad = torch.zeros(3)
    with pytest.raises(ConfigError, match=r"downlink_groups=2 is more than the 1 worker"):
        BidirectionalOptimizer(base, InkheartSGD(2)).step()
    half = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    with pytest.raises(ConfigError, match=r"'h' is torch\.bfloat16"):
        BidirectionalOptimizer(torch.optim.SGD([("h", half)], lr=0.1), InkheartSGD()).step()
    optimizer = BidirectionalOptimizer(base, InkheartSGD(1))
    optimizer.step()
    with pytest.raises(ConfigError, match="cannot be added"):
        optimizer.add_param_group({"params": [("q", nn.Parameter(torch.zeros(2)))]})
    parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="trainable parameters are not those"):
        optimizer.step()


@pytest.mark.parametrize(
    ("section", "told"),
    [
        ({"compressor": "inkhart"}, "did you mean 'inkheart'"),
        ({"compressor": "inkheart", "uplink_fractoin": 0.5}, "did you mean 'uplink_fraction'"),
        ({"compressor": "marina_p", "uplink_fraction": 0.5}, "it is one of inkheart, m4, m3"),
        ({"compressor": "m4", "rank": 4}, "rank=4 has no meaning for 'm4'"),
        ({"compressor": "m4", "uplink_fraction": "half"}, "uplink_fraction='half'"),
        ({"compressor": "m4", "seed": 1.5}, "seed=1.5"),
        ({}, "None is no bidirectional method"),
        ([], "must be an object"),
    ],
)
def test_bad_sections_are_explained(section: Any, told: str) -> None:
    base = torch.optim.SGD([("p", nn.Parameter(torch.zeros(3)))], lr=0.1)
    with pytest.raises(ConfigError, match=told):
        BidirectionalOptimizer.from_config(base, section)


def test_a_state_dict_goes_through_torch_save() -> None:
    named = parameters()
    optimizer = build(named, M4(1, uplink_fraction=0.5))
    train(optimizer, named, 0, range(3))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again = parameters()
    build(again, M4(1, uplink_fraction=0.5)).load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(flat(again), flat(named))


DAMAGE: dict[str, Callable[[dict[str, Any]], object]] = {
    "nan": lambda entry: entry["tensors"]["w"].view(-1)[2].fill_(float("nan")),
    "infinite x": lambda entry: entry["tensors"]["x"].fill_(float("inf")),
    "another length": lambda entry: entry["tensors"].update(x=torch.ones(3)),
    "no tensor": lambda entry: entry["tensors"].update(x="x"),
    "no tensors": lambda entry: entry.update(tensors=None),
    "steps": lambda entry: entry.update(t="3"),
    "negative steps": lambda entry: entry.update(t=-3),
    "no seed": lambda entry: entry.pop("seed"),
    "no shapes": lambda entry: entry.update(shapes=None),
    "no method": lambda entry: entry.pop("method"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_state_is_refused_with_nothing_touched(what: str) -> None:
    named = parameters()
    optimizer = build(named, M4(1, uplink_fraction=0.5))
    train(optimizer, named, 0, range(3))
    state = copy.deepcopy(optimizer.state_dict())
    DAMAGE[what](state["lowrank_comm_bidirectional"])
    train(optimizer, named, 0, range(3, 4))
    before, t = flat(named), optimizer.t
    with pytest.raises(StateMismatchError):
        optimizer.load_state_dict(state)
    assert torch.equal(flat(named), before)
    assert optimizer.t == t
    train(optimizer, named, 0, range(4, 5))


def test_a_base_that_had_loaded_compressed_gradients_is_refused() -> None:
    one, other = parameters(), parameters()
    gradients = CompressedOptimizer(
        torch.optim.SGD(one.items(), lr=0.1), PowerSGD(2), min_compression_rate=0
    )
    for p in one.values():
        p.grad = torch.ones_like(p)
    gradients.step()
    base = torch.optim.SGD(other.items(), lr=0.1)
    base.load_state_dict(copy.deepcopy(gradients.state_dict()))
    with pytest.raises(StateMismatchError, match="its error memory would be lost here"):
        BidirectionalOptimizer(base, M4(1))


# --- the page, and states of the other kind ---


def the_page(rank: int, folder: str) -> float:
    """The example of docs/bidirectional.md, in a group that is there already; rank 0's
    loss at the end.
    """
    page = (ROOT / "docs" / "bidirectional.md").read_text()
    code = page.split("```python\n")[1].split("```")[0]
    assert "init_process_group" in code
    for line in ('dist.init_process_group("gloo")\n', "leave()\n"):
        assert code.count(line) == 1
        code = code.replace(line, "")
    names: dict[str, Any] = {}
    with contextlib.chdir(folder):
        exec(code, names)
    return float(torch.nn.functional.cross_entropy(names["model"](names["x"]), names["y"]))


def test_the_pages_example_trains(gloo: GlooPool, tmp_path: Path) -> None:
    losses = gloo.run(the_page, 2, str(tmp_path))
    assert all(loss < 0.8 * math.log(10) for loss in losses)
    assert {path.name for path in tmp_path.iterdir()} == {"model.pt", "checkpoints"}
    assert len(list(tmp_path.glob("checkpoints/save-00000001/optimizer_?.pt"))) == 2


def of_the_other_kind(rank: int) -> tuple[str, str]:
    named = parameters()
    ours = build(named, InkheartSGD(2, uplink_fraction=0.4))
    train(ours, named, rank, range(3))
    gradients = CompressedOptimizer(
        torch.optim.SGD(parameters().items(), lr=0.1), PowerSGD(2), min_compression_rate=0
    )
    for group in gradients.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    gradients.step()
    said = []
    for optimizer, state in ((gradients, ours.state_dict()), (ours, gradients.state_dict())):
        try:
            optimizer.load_state_dict(state)
        except StateMismatchError as error:
            said.append(str(error))
    return said[0], said[1]


@pytest.mark.filterwarnings("ignore:state_dict")
def test_states_of_compressed_gradients_and_of_these_do_not_mix(gloo: GlooPool) -> None:
    for of_ours, of_gradients in gloo.run(of_the_other_kind, 2):
        assert "bidirectional method 'inkheart'" in of_ours and "server_parameters()" in of_ours
        assert "error memory would be lost" in of_gradients and "'lowrank_comm'" in of_gradients
