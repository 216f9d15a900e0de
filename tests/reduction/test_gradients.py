"""Gradients as a caller may assign them: in any layout and dtype, on some workers only,
and some that cannot be averaged, which must end the step on all workers alike.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from lowrank_comm import CompressedOptimizer, LowRankCommError, PowerSGD
from lowrank_comm.reduction.gradients import own_memory, unusable, writable
from lowrank_comm.reduction.params import ParamInfo
from tests.support.gloo import GlooPool
from tests.support.reference import gradient

WORLD = 4
SHAPES = {"one": (6, 5), "twin": (6, 5), "bias": (7,)}
MODES: dict[str, dict[str, Any]] = {
    "step": {},
    "backward": {"reduce_at": "backward"},
    "shards": {"nodes": 2},
    "whole matrices": {"nodes": 2, "shard_scope": "matrix"},
}


class Model(nn.Module):
    """Its gradients are what is drawn, unless `assign(model)` puts others in their
    place: before a pass at the end of backward, or from a hook of each parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rest = nn.ParameterDict({n: torch.ones(shape) for n, shape in SHAPES.items()})

    def backward(self, step: int, rank: int, assign: Callable[[Model], None] | None) -> None:
        loss = torch.zeros(())
        for k, p in enumerate(self.rest.values()):
            loss = loss + (p * drawn(tuple(p.shape), step, rank, k)).sum()
        queue = torch.autograd.Variable._execution_engine.queue_callback
        if assign is not None:
            loss.register_hook(lambda _: queue(lambda: assign(self)))
        loss.backward()


def drawn(shape: tuple[int, ...], step: int, rank: int, number: int) -> Tensor:
    return torch.as_tensor(gradient(shape, step, rank, number), dtype=torch.float32)


def optimizer_of(model: Model, nodes: int = 0, **options: Any) -> CompressedOptimizer:
    if nodes:
        options["process_group"] = init_device_mesh(
            "cpu", (nodes, WORLD // nodes), mesh_dim_names=("between", "inside")
        )
    return CompressedOptimizer(
        torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9),
        PowerSGD(rank=2),
        min_compression_rate=0,
        **options,
    )


# --- what cannot be averaged ---


def sparse(p: nn.Parameter) -> None:
    p.grad = torch.ones(p.shape).to_sparse()


def other_shape(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.t_()


def fewer_rows(p: nn.Parameter) -> None:
    assert p.grad is not None
    p.grad.resize_(2, 5)


def complex_numbers(p: nn.Parameter) -> None:
    p.grad_dtype = None  # type: ignore[assignment]
    p.grad = torch.ones(p.shape, dtype=torch.complex64)


def integers(p: nn.Parameter) -> None:
    p.grad_dtype = None  # type: ignore[assignment]
    p.grad = torch.ones(p.shape, dtype=torch.int32)


UNUSABLE: dict[str, tuple[Callable[[nn.Parameter], None], str]] = {
    "sparse": (sparse, "is sparse"),
    "other shape": (other_shape, "has shape (5, 6), its parameter (6, 5)"),
    "fewer rows": (fewer_rows, "has shape (2, 5), its parameter (6, 5)"),
    "complex": (complex_numbers, "is of torch.complex64"),
    "integers": (integers, "is of torch.int32"),
}


def refused(rank: int, kind: str, at: int, options: dict[str, Any]) -> tuple[str, dict, dict]:
    """What step `at` raises where rank 2 has such a gradient, and the parameters after
    further steps; and those of a run without that step.
    """
    made, _ = UNUSABLE[kind]
    said, ends = "", []
    for bad in (True, False):
        model = Model()
        optimizer = optimizer_of(model, **options)
        for step in range(4):
            wrong = bad and step == at and rank == 2
            assign = functools.partial(spoil, made) if wrong else None
            if bad or step != at:
                try:
                    model.backward(step, rank, assign)
                    optimizer.step()
                except LowRankCommError as error:
                    assert step == at
                    said = str(error)
                optimizer.zero_grad()
        ends.append({name: p.detach().clone() for name, p in model.rest.items()})
        optimizer.detach()
    return said, ends[0], ends[1]


def spoil(made: Callable[[nn.Parameter], None], model: Model) -> None:
    made(model.rest["twin"])


@pytest.mark.parametrize("at", [0, 2])
@pytest.mark.parametrize("kind", UNUSABLE)
@pytest.mark.parametrize("mode", MODES)
def test_a_gradient_that_cannot_be_averaged_is_told_on_all_ranks_and_leaves_no_trace(
    gloo: GlooPool, mode: str, kind: str, at: int
) -> None:
    for said, after, without in gloo.run(refused, WORLD, kind, at, MODES[mode]):
        assert "on rank 2 the gradient of rest.twin " + UNUSABLE[kind][1] in said
        for name, parameter in after.items():
            assert torch.equal(parameter, without[name])


def early(rank: int, kind: str) -> str:
    """The same from a hook of the parameter, whose bucket starts during backward."""
    model, made = Model(), UNUSABLE[kind][0]
    later = [False]
    model.rest["twin"].register_post_accumulate_grad_hook(
        lambda p: made(p) if rank == 2 and later[0] else None
    )
    optimizer = optimizer_of(model, overlap=True)
    for step in range(3):
        later[0] = step == 2
        try:
            model.backward(step, rank, None)
            optimizer.step()
        except LowRankCommError as error:
            return str(error)
        optimizer.zero_grad()
    return ""


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_gradient_that_cannot_be_averaged_in_a_bucket_that_starts_during_backward(
    gloo: GlooPool, kind: str
) -> None:
    for said in gloo.run(early, WORLD, kind):
        assert "on rank 2 the gradient of rest.twin " + UNUSABLE[kind][1] in said


# --- layouts ---


def expanded(model: Model) -> None:
    for p in model.rest.values():
        p.grad = torch.arange(float(p.shape[-1])).mul(0.1).expand(p.shape)


def the_same_tensor(model: Model) -> None:
    model.rest["twin"].grad = model.rest["one"].grad


def overlapping_views(model: Model) -> None:
    flat = torch.arange(50.0).mul(0.01)
    model.rest["one"].grad = flat[:30].view(6, 5)
    model.rest["twin"].grad = flat[17:47].view(6, 5)
    model.rest["bias"].grad = flat[40:47]


def one_buffer(model: Model) -> None:
    """Views that share no element, as gradient_as_bucket_view makes them."""
    flat = torch.arange(67.0).mul(0.01)
    for p in model.rest.values():
        p.grad, flat = flat[: p.numel()].view(p.shape), flat[p.numel() :]


def columns_of_one_buffer(model: Model) -> None:
    wide = torch.arange(60.0).mul(0.01).view(6, 10)
    model.rest["one"].grad, model.rest["twin"].grad = wide[:, ::2], wide[:, 1::2]


def transposed(model: Model) -> None:
    model.rest["one"].grad = torch.arange(30.0).mul(0.01).view(5, 6).t()


def sliding_window(model: Model) -> None:
    model.rest["one"].grad = torch.arange(10.0).mul(0.1).as_strided((6, 5), (1, 1))


def a_transposed_alias(model: Model) -> None:
    square = torch.arange(36.0).mul(0.01)
    model.rest["one"].grad = square[:30].view(6, 5)
    model.rest["twin"].grad = square[:30].view(5, 6).t()


def the_parameter_itself(model: Model) -> None:
    model.rest["one"].grad = model.rest["one"].detach()


def another_parameter(model: Model) -> None:
    model.rest["one"].grad = model.rest["twin"].detach()


def part_of_another_parameter(model: Model) -> None:
    model.rest["bias"].grad = model.rest["twin"].detach().view(-1)[3:10]


LAYOUTS = (
    the_parameter_itself,
    another_parameter,
    part_of_another_parameter,
    expanded,
    the_same_tensor,
    overlapping_views,
    one_buffer,
    columns_of_one_buffer,
    transposed,
    sliding_window,
    a_transposed_alias,
)


def copied(layout: Callable[[Model], None], model: Model) -> None:
    layout(model)
    grads = [p.grad.clone(memory_format=torch.contiguous_format) for p in model.rest.values()]
    for p, grad in zip(model.rest.values(), grads, strict=True):
        p.grad = grad


def poisoned(layout: Callable[[Model], None], model: Model) -> None:
    layout(model)
    model.rest["bias"].grad = torch.full((1,), torch.nan).expand(7)


def trained(rank: int, number: int, options: dict[str, Any]) -> tuple[dict, dict]:
    """Parameters after steps in which ranks 1 and 3 assign gradients of this layout,
    and after the same with copies of their own.
    """
    ends, layout = [], LAYOUTS[number]
    for assign in (layout, functools.partial(copied, layout)):
        model = Model()
        optimizer = optimizer_of(model, **options)
        for step in range(4):
            model.backward(step, rank, assign if rank % 2 else None)
            optimizer.step()
            optimizer.zero_grad()
        # a veto writes NaN, and goes on
        model.backward(4, rank, functools.partial(poisoned, layout) if rank == 1 else None)
        optimizer.step()
        assert optimizer.step_was_skipped
        ends.append({name: p.detach().clone() for name, p in model.rest.items()})
        optimizer.detach()
    return ends[0], ends[1]


@pytest.mark.parametrize("number", range(len(LAYOUTS)), ids=[one.__name__ for one in LAYOUTS])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_of_any_layout_give_what_copies_give(
    gloo: GlooPool, mode: str, number: int
) -> None:
    results = gloo.run(trained, WORLD, number, MODES[mode])
    for ours, copies in results:
        for name, parameter in ours.items():
            assert torch.equal(parameter, copies[name])
            assert torch.equal(parameter, results[0][0][name])
            assert not torch.equal(parameter, torch.ones_like(parameter))


# --- dtypes ---


def wider(rank: int, options: dict[str, Any]) -> list[Tensor]:
    """bfloat16 parameters with float32 gradients, which some ranks do not have."""
    model = Model().to(torch.bfloat16)
    for p in model.parameters():
        p.grad_dtype = torch.float32
    optimizer = optimizer_of(model, **options)
    for step in range(4):
        for k, (name, p) in enumerate(model.rest.items()):
            if (step + rank) % 3 or name == "twin":
                p.grad = drawn(tuple(p.shape), step, rank, k)
        optimizer.step()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        optimizer.zero_grad()
    return [p.detach().float() for p in model.parameters()]


@pytest.mark.parametrize("mode", ["step", "shards", "whole matrices"])
def test_gradients_wider_than_their_parameters_that_some_ranks_do_not_have(
    gloo: GlooPool, mode: str
) -> None:
    results = gloo.run(wider, WORLD, MODES[mode])
    for parameters in results:
        for one, first in zip(parameters, results[0], strict=True):
            assert torch.equal(one, first)
            assert not torch.equal(one, torch.ones_like(one))


def any_dtype(rank: int) -> list[Tensor]:
    """A parameter that takes gradients of any dtype, of which each rank assigns
    another.
    """
    model = Model()
    for p in model.parameters():
        p.grad_dtype = None  # type: ignore[assignment]
    optimizer = optimizer_of(model)
    dtype = (torch.float64, torch.bfloat16, torch.float32, torch.float16)[rank]
    for step in range(3):
        for k, p in enumerate(model.parameters()):
            p.grad = drawn(tuple(p.shape), step, rank, k).to(dtype)
        optimizer.step()
    return [p.detach() for p in model.parameters()]


def test_gradients_of_another_dtype_on_each_rank(gloo: GlooPool) -> None:
    results = gloo.run(any_dtype, WORLD)
    for parameters in results[1:]:
        for one, first in zip(parameters, results[0], strict=True):
            assert torch.equal(one, first)


# --- the functions ---


def slots_like(*tensors: Tensor) -> list[ParamInfo]:
    return [
        ParamInfo(f"p{k}", tuple(t.shape), torch.float32, torch.device("cpu"))
        for k, t in enumerate(tensors)
    ]


def test_what_can_be_averaged_is_not_refused() -> None:
    base = torch.zeros(6, 5)
    for good in (base, base.double(), base.t().contiguous().t(), base[:1].expand(6, 5), None):
        assert unusable(slots_like(base), [good], [0]) == {}
    found = unusable(slots_like(base), [base.to("meta")], [0])
    assert found == {0: "p0 is on meta, and its parameter's is expected on cpu; move it there"}


def test_only_gradients_with_memory_of_their_own_are_written_to() -> None:
    flat, column = torch.zeros(40), torch.zeros(6, 10)
    grads = [flat[:10], flat[10:20], flat[15:25], flat[20:22], flat[30:], None, column[:, 0]]
    slots = slots_like(*(torch.zeros(0) if g is None else g for g in grads))
    targets = writable(slots, grads)
    assert [k for k, target in enumerate(targets) if target is not None] == [0, 4, 6]
    assert all(target is None or target is grads[k] for k, target in enumerate(targets))
    # one inside another, and an empty one at the same place
    grads = [flat[:30], flat[5:6], flat[7:8], flat[:0], flat[30:31]]
    targets = writable(slots_like(*grads), grads)
    assert [target is None for target in targets] == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("tensor", "own"),
    [
        (torch.zeros(4, 5), True),
        (torch.zeros(4, 5).t(), True),
        (torch.zeros(4, 6)[:, ::2], True),
        (torch.zeros(3, 1).expand(3, 1), True),
        (torch.zeros(()), True),
        (torch.zeros(4, 1).expand(4, 5), False),
        (torch.zeros(9).as_strided((5, 5), (1, 1)), False),
        (torch.zeros(9).as_strided((3, 3), (2, 1)), False),
    ],
)
def test_whether_elements_share_memory(tensor: Tensor, own: bool) -> None:
    assert own_memory(tensor) is own
