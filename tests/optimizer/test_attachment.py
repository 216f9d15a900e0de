"""attach(): the plan it prints, what it refuses, and attaching again."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard
from torch.nn.parallel import DistributedDataParallel

from lowrank_comm import CompressedOptimizer, ConfigError, PowerSGD
from lowrank_comm.bidirectional import BidirectionalOptimizer, InkheartSGD
from tests.support.engines import (
    ENGINES,
    WORLD,
    Net,
    Setup,
    every_engine,
    full,
    loss_of,
    plain_names,
    wrapped,
)
from tests.support.gloo import GlooPool


def compressed(model: nn.Module, process_group: Any = None, **options: Any) -> CompressedOptimizer:
    base = torch.optim.SGD(plain_names(model).items(), lr=0.1)
    return CompressedOptimizer(base, PowerSGD(2), process_group, min_compression_rate=0, **options)


def printed(rank: int, setup: Setup) -> tuple[str, str, int]:
    """What attach prints and returns."""
    model, process_group = wrapped(setup)
    optimizer = compressed(model, process_group, shard_scope=setup.scope)
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        plan = optimizer.attach(model)
    memory = sum(e.nbytes for e in optimizer.reducer.state.error_memory().values())
    optimizer.detach()
    return out.getvalue(), str(plan), memory


@every_engine
def test_attach_prints_once_what_it_returns(gloo: GlooPool, engine: Setup) -> None:
    results = gloo.run(printed, WORLD, engine)
    assert [text for text, _, _ in results[1:]] == [""] * (WORLD - 1)
    text, plan, _ = results[0]
    assert text == plan + "\n"
    name = {"plain": "plain model", "ddp": "DDP", "flat": "FSDP2, flat"}.get(
        engine.engine, "FSDP2, HSDP"
    )
    assert f", {name}" in text.splitlines()[0]
    assert ("2 nodes of 2 ranks" in text) == bool(engine.nodes)
    for words in (
        "low-rank: 6 matrices",
        "dense:    8 parameters",
        "whole model: ",
        "error memory",
    ):
        assert words in text
    # else dense is a small part
    assert ("capped by" in text) == (engine.scope == "matrix" or not engine.nodes)
    model = sum(p.numel() for p in Net().parameters() if p.dim() == 2) * 4
    ranks = 2 if engine.nodes else 1
    assert sum(memory for _, _, memory in results[:ranks]) == model


def refused(rank: int, what: str) -> str:
    """The message of a wrong use."""
    model = Net()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group: Any = None
    attached: nn.Module = model
    optimizer: CompressedOptimizer | None = None
    if what == "fsdp1":
        attached = FullyShardedDataParallel(
            model, use_orig_params=True, device_id=torch.device("cpu")
        )
    elif what == "built before fully_shard":
        optimizer = compressed(model)
        fully_shard(model)
    elif what == "another model":
        optimizer = compressed(Net())
        attached = DistributedDataParallel(model)
    elif what == "partly another model":
        named = [*model.named_parameters(), ("more", nn.Parameter(torch.ones(2, 2)))]
        optimizer = CompressedOptimizer(torch.optim.SGD(named, lr=0.1), PowerSGD(2))
        attached = DistributedDataParallel(model)
    elif what == "sub-mesh without a mesh":
        fully_shard(model, mesh=mesh["shard"])
    elif what == "sub-mesh of the wrong dimension":
        fully_shard(model, mesh=mesh["replicate"])
        group = mesh
    elif what == "1-D group between nodes":
        fully_shard(model, mesh=mesh["shard"])
        group = mesh["replicate"]
    elif what == "another group than the mesh's":
        fully_shard(model, mesh=mesh)
        group = mesh["shard"]
    elif what == "parts only":
        fully_shard(model.blocks[0])
    elif what == "offload":
        fully_shard(model, offload_policy=CPUOffloadPolicy(pin_memory=False))
    elif what == "ignored":
        fully_shard(model, ignored_params={model.head.weight})
    elif what == "columns in matrix scope":
        fully_shard(model, mesh=mesh, shard_placement_fn=lambda p: Shard(1 if p.dim() > 1 else 0))
        optimizer = compressed(model, shard_scope="matrix")
    elif what == "columns in flat":
        model = attached = nn.Sequential(nn.Linear(8, 8))
        fully_shard(model, shard_placement_fn=lambda p: Shard(1 if p.dim() > 1 else 0))
    elif what == "divide factor":
        fully_shard(model)
        model.set_gradient_divide_factor(2.0)  # type: ignore[operator]
    elif what == "comm hook":
        attached = ddp = DistributedDataParallel(model)
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        ddp.register_comm_hook(None, allreduce_hook)
    elif what == "two wrappers":
        attached = nn.ModuleList(
            [DistributedDataParallel(model.blocks[0]), DistributedDataParallel(model.blocks[1])]
        )
    elif what == "overlap under FSDP2":
        fully_shard(model)
        optimizer = compressed(model, overlap=True)
    elif what == "after a step":
        attached = DistributedDataParallel(model)
        optimizer = compressed(model)
        for p in model.parameters():
            p.grad = torch.full_like(p, float(rank))
        optimizer.step()
    elif what == "a group that is not DDP's":
        attached, group = DistributedDataParallel(model), mesh["replicate"]
    elif what == "parameters of nobody":
        attached = DistributedDataParallel(model)
        matrices = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
        optimizer = CompressedOptimizer(torch.optim.SGD(matrices, lr=0.1), PowerSGD(2))
    elif what == "two optimizers":
        attached = DistributedDataParallel(model)
        other = compressed(attached)
        other.attach(attached)
    elif what == "scope":
        group = mesh
        optimizer = None
    try:
        if what == "scope":
            compressed(model, group, shard_scope="rows")
        (optimizer or compressed(attached, group)).attach(attached)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


REFUSED = {
    "a group that is not DDP's": [
        "ConfigError",
        "process_group covers the ranks",
        "Leave process_group out",
    ],
    "parameters of nobody": [
        "ConfigError",
        "8 trainable parameters",
        "first.bias",
        "parameter group",
    ],
    "two optimizers": ["ConfigError", "another CompressedOptimizer", "detach()"],
    "fsdp1": ["UnsupportedError", "FSDP1", "fully_shard"],
    "built before fully_shard": ["ConfigError", "none of this model's", "after fully_shard"],
    "another model": ["ConfigError", "none of this model's"],
    "partly another model": ["ConfigError", "all but 1"],
    "sub-mesh without a mesh": ["ConfigError", "2 of 4 ranks", "process_group=mesh"],
    "sub-mesh of the wrong dimension": ["ConfigError", "mesh=mesh['shard']"],
    "1-D group between nodes": ["ConfigError", "whole 2-D mesh"],
    "another group than the mesh's": ["ConfigError", "process_group", "leave process_group out"],
    "parts only": ["UnsupportedError", "apply it to the model last"],
    "offload": ["UnsupportedError", "CPUOffloadPolicy"],
    "ignored": ["UnsupportedError", "head.weight", "ignored_params"],
    "columns in matrix scope": ["UnsupportedError", "dimension 1", 'shard_scope="shard"'],
    "columns in flat": ["UnsupportedError", "Shard(0)"],
    "divide factor": ["UnsupportedError", "set_gradient_divide_factor"],
    "comm hook": ["UnsupportedError", "communication hook"],
    "two wrappers": ["UnsupportedError", "wrap the whole model once"],
    "overlap under FSDP2": ["ConfigError", "overlap=True", "FSDP2, flat"],
    "after a step": ["ConfigError", "before the first one"],
    "scope": ["ConfigError", "shard_scope='rows'", '"matrix"'],
}


@pytest.mark.parametrize(("what", "words"), REFUSED.items(), ids=REFUSED.keys())
def test_wrong_use_is_refused_on_every_rank(gloo: GlooPool, what: str, words: list[str]) -> None:
    for said in gloo.run(refused, WORLD, what):
        for word in words:
            assert word in said, said


def sharded_after_attach(rank: int) -> list[str]:
    """fully_shard replaces the parameters behind the optimizer's back."""
    model = Net()
    optimizer = compressed(model)
    optimizer.attach(model)
    fully_shard(model)
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lowrank_comm").addHandler(handler)
    for step in range(2):
        loss_of(model, step, rank).backward()
        optimizer.step()
    logging.getLogger("lowrank_comm").removeHandler(handler)
    return said


def test_a_step_without_any_gradient_is_told_once(gloo: GlooPool) -> None:
    for said in gloo.run(sharded_after_attach, WORLD):
        assert [line for line in said if "no worker has a gradient" in line] == said[:1]
        assert "fully_shard" in said[0]


def compiled_as_a_whole(rank: int, setup: Setup) -> list[float]:
    """attach is given what torch.compile returns. The sum of the parameters after two
    steps.
    """
    model, process_group = wrapped(setup)
    whole = torch.compile(model, backend="eager")
    optimizer = compressed(model, process_group)
    optimizer.attach(whole)
    for step in range(2):
        loss_of(whole, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    return [full(p).double().sum().item() for p in model.parameters()]


@pytest.mark.parametrize("name", ["DDP", "FSDP2, flat", "FSDP2, HSDP 2-D mesh, shard"])
def test_a_model_that_was_compiled_as_a_whole(gloo: GlooPool, name: str) -> None:
    results = gloo.run(compiled_as_a_whole, WORLD, ENGINES[name])
    assert all(one == results[0] for one in results)


def by_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
}


def two_steps(rank: int, model: nn.Module, optimizer: CompressedOptimizer) -> list[Tensor]:
    """The parameters after two steps of a new optimizer."""
    optimizer.attach(model)
    for step in range(1, 3):
        loss_of(model, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.detach()
    return [p.detach().clone() for p in model.parameters()]


def copied(rank: int, setup: Setup, inner: bool) -> list[str]:
    """How copies differ of a model that is attached, or of the module in DDP: from the
    model that has their weights, when both train on.
    """
    model, process_group = wrapped(setup)
    optimizer = compressed(model, process_group, **setup.options)
    optimizer.attach(model)
    loss_of(model, 0, rank).backward()
    optimizer.step()
    optimizer.zero_grad()
    start = [p.detach().clone() for p in model.parameters()]
    wrong, ends = [], {}
    for how, make in COPIES.items():
        one = make(model.module if inner else model)
        one = DistributedDataParallel(one, **setup.wrap) if inner else one
        ends[how] = two_steps(rank, one, compressed(one, process_group, **setup.options))
        if not all(map(torch.equal, model.parameters(), start)):
            wrong.append(f"{how}: the original has changed")
    optimizer.detach()
    expected = two_steps(rank, model, compressed(model, process_group, **setup.options))
    return wrong + [how for how, end in ends.items() if not all(map(torch.equal, end, expected))]


@pytest.mark.parametrize(
    ("name", "inner"),
    [
        ("plain model", False),
        ("plain model, two levels, shard", False),
        ("DDP", False),
        ("DDP", True),
    ],
)
def test_a_copy_of_an_attached_model_is_a_model_like_any_other(
    gloo: GlooPool, name: str, inner: bool
) -> None:
    setup = ENGINES[name]
    if setup.engine == "ddp":
        setup = replace(setup, wrap={"find_unused_parameters": not inner})
    assert gloo.run(copied, WORLD, setup, inner) == [[]] * WORLD


def test_what_is_saved_of_a_model_needs_no_part_of_this_library() -> None:
    model = Net()
    optimizer = compressed(model, reduce_at="backward")
    loss_of(model, 0, 0).backward()
    optimizer.step()
    leaf = torch.ones(3, 3).requires_grad_(True)
    of_the_leaf = CompressedOptimizer(
        torch.optim.SGD([("w", leaf)], lr=0.1), PowerSGD(1), reduce_at="backward"
    )
    for one in (model, model.state_dict(keep_vars=True), copy.deepcopy(leaf)):
        file = io.BytesIO()
        torch.save(one, file)
        assert b"lowrank_comm" not in file.getvalue()
    of_the_leaf.detach()


def interrupted_by_detach(rank: int, setup: Setup, gives_back: bool) -> list[Tensor]:
    """Four steps; after the second, the model is given back and attached again, or
    another optimizer has it meanwhile.
    """
    model, process_group = wrapped(setup)
    options = {"shard_scope": setup.scope, **setup.options}
    optimizer = compressed(model, process_group, **options)
    optimizer.attach(model, in_use=lambda: False)
    for step in range(4):
        if gives_back and step == 2:
            other = compressed(model, process_group, **options)
            other.attach(model)
            assert not optimizer.is_attached_to(model)
            other.detach()
            optimizer.attach(model)
        loss_of(model, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    errors = optimizer.error_memory()
    return [*map(full, model.parameters()), *(full(errors[name]) for name in sorted(errors))]


@every_engine
def test_an_optimizer_whose_loop_has_ended_gives_way_and_may_come_back(
    gloo: GlooPool, engine: Setup
) -> None:
    expected = gloo.run(interrupted_by_detach, WORLD, engine, False)
    for one, other in zip(
        gloo.run(interrupted_by_detach, WORLD, engine, True), expected, strict=True
    ):
        assert all(map(torch.equal, one, other))


def test_parameters_of_an_optimizer_that_is_in_use_are_refused() -> None:
    model = Net()
    first = compressed(model, reduce_at="backward")
    with pytest.raises(ConfigError, match=r"another optimizer.*callback\.detach\(\)"):
        compressed(model, reduce_at="backward")
    first.detach()
    compressed(model, reduce_at="backward")


def added_later(rank: int, setup: Setup) -> str:
    """A parameter that comes to the optimizer after attach."""
    model, process_group = wrapped(setup)
    optimizer = compressed(model, process_group)
    optimizer.attach(model)
    loss_of(model, 0, rank).backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.ones(3, 3)))]})
    try:
        loss_of(model, 1, rank).backward()
        optimizer.step()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize("name", ["DDP", "FSDP2, flat", "FSDP2, HSDP 2-D mesh, shard"])
def test_a_parameter_added_after_attach_is_refused(gloo: GlooPool, name: str) -> None:
    for said in gloo.run(added_later, WORLD, ENGINES[name]):
        assert said.startswith("ConfigError")
        assert "'late'" in said
        assert "after attach" in said


def attached_twice(rank: int, setup: Setup) -> list[float]:
    """Steps with one optimizer after another on the same wrapped model; and a step of
    the engine alone after detach. The largest parameter after each, the same on all
    ranks while somebody averages.
    """
    model, process_group = wrapped(setup)

    def state() -> float:
        return sum(full(p).double().sum().item() for p in model.parameters())

    ends = []
    for _ in range(2):
        optimizer = compressed(model, process_group)
        optimizer.attach(model)
        loss_of(model, 0, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        optimizer.detach()
        ends.append(state())
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model, 3, rank).backward()
    base.step()
    return [*ends, state()]


@pytest.mark.parametrize("name", ["DDP", "FSDP2, flat", "FSDP2, HSDP 2-D mesh, shard"])
def test_a_model_can_be_attached_anew_and_given_back(gloo: GlooPool, name: str) -> None:
    results = gloo.run(attached_twice, WORLD, ENGINES[name])
    assert all(one == results[0] for one in results)
    assert all(a != b for a, b in zip(results[0], results[0][1:], strict=False))


def re_wrapped(rank: int) -> list[int]:
    """Collectives that DDP makes by itself in each backward pass."""
    from lowrank_comm.communication.group import collectives_so_far

    model = DistributedDataParallel(Net(), bucket_cap_mb=0.001)
    optimizer = compressed(model, reduce_at="step")
    optimizer.attach(model)
    counts = []
    for step in range(5):
        before = collectives_so_far()
        loss_of(model, step, rank).backward()
        counts.append(collectives_so_far() - before)
        optimizer.step()
        optimizer.zero_grad()
    return counts


def test_ddps_own_all_reduce_is_not_paid(gloo: GlooPool) -> None:
    for counts in gloo.run(re_wrapped, 2):
        assert counts[0] == 0
        # in the second iteration DDP agrees on its buckets anew
        assert counts[2:] == [0, 0, 0]


# --- loops that know which backward pass is the last ---
def test_a_plain_model_is_averaged_at_the_end_of_the_last_pass() -> None:
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    optimizer = CompressedOptimizer(
        torch.optim.SGD(model.named_parameters(), lr=0.1), PowerSGD(rank=1)
    )
    last = False
    optimizer.attach(model, is_last_backward=lambda: last)
    assert optimizer.is_attached_to(model)
    x = torch.randn(8, 16)
    (model(x) ** 2).sum().backward()
    one = model.weight.grad.clone()
    assert int(torch.linalg.matrix_rank(one)) > 1, "still this worker's own"
    last = True
    (model(x) ** 2).sum().backward()
    assert int(torch.linalg.matrix_rank(model.weight.grad, rtol=1e-4)) == 1
    sent = model.weight.grad.clone()
    optimizer.step()
    assert torch.equal(model.weight.grad, sent), "nothing is averaged again"
    torch.testing.assert_close(sent + optimizer.error_memory()["weight"], 2 * one)
    # nobody says it any more
    optimizer.attach(model)
    optimizer.zero_grad()
    (model(x) ** 2).sum().backward()
    assert int(torch.linalg.matrix_rank(model.weight.grad, rtol=1e-4)) > 1


def test_averaging_in_step_contradicts_it() -> None:
    model = nn.Linear(16, 16)
    base = torch.optim.SGD(model.named_parameters(), lr=0.1)
    optimizer = CompressedOptimizer(base, PowerSGD(rank=1), reduce_at="step")
    with pytest.raises(
        ConfigError, match='reduce_at="step" averages gradients after whoever clips'
    ):
        optimizer.attach(model, is_last_backward=lambda: True)


def test_a_state_that_was_loaded_before_is_not_lost() -> None:
    model = nn.Linear(16, 16)
    first = CompressedOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), PowerSGD(rank=1))
    model(torch.randn(4, 16)).sum().backward()
    first.step()
    state = first.state_dict()
    first.detach()
    again = CompressedOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), PowerSGD(rank=1))
    again.load_state_dict(state)
    before = again.error_memory()["weight"].clone()
    # a plain model goes on as it is
    again.attach(model)
    assert torch.equal(again.error_memory()["weight"], before)


@pytest.mark.parametrize("kind", ["compressed", "bidirectional"])
def test_what_is_no_model_is_refused(kind: str) -> None:
    base = torch.optim.SGD(nn.Linear(16, 16).named_parameters(), lr=0.1)
    optimizer = (
        CompressedOptimizer(base, PowerSGD(rank=1))
        if kind == "compressed"
        else BidirectionalOptimizer(base, InkheartSGD(uplink_fraction=0.5))
    )
    with pytest.raises(ConfigError, match=r"takes the model.*got SGD"):
        optimizer.attach(base)  # type: ignore[arg-type]


def load_then_attach(rank: int) -> str:
    torch.manual_seed(0)
    model = nn.Linear(16, 16)
    first = CompressedOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), PowerSGD(rank=1))
    model(torch.randn(4, 16)).sum().backward()
    first.step()
    first.consolidate_error_memory()
    state = first.state_dict()
    first.detach()
    model.zero_grad()
    again = CompressedOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), PowerSGD(rank=1))
    again.load_state_dict(state)
    try:
        again.attach(DistributedDataParallel(model))
    except ConfigError as error:
        return str(error)
    return "no error"


def test_a_state_is_loaded_after_attach(gloo: GlooPool) -> None:
    for said in gloo.run(load_then_attach, 2):
        assert "load the state dict after attach" in said
