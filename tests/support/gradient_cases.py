"""Cases of test_engine_runs.py about single gradients: what DDP was told to ignore, and
users' hooks.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_comm import CompressedOptimizer, LowRankCommError, PowerSGD
from tests.support.engines import Net, Setup, loss_of, plain_names, wrapped

FULL_RANK = PowerSGD(rank=64)
Ends = dict[str, torch.Tensor]


def ignored(
    rank: int, compressed: bool, held: bool, differ: bool, options: dict[str, Any]
) -> tuple[Ends, str]:
    """DDP that ignores the head's weight: parameters in the end, and the plan's line.

    held: whether the optimizer holds that parameter; differ: whether ranks start with
    values of their own for it.
    """
    model = Net()
    if differ:
        model.head.weight.data.add_(0.1 * rank)
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["head.weight"])
    wrapped = DistributedDataParallel(model)
    named = [(n, p) for n, p in model.named_parameters() if held or n != "head.weight"]
    optimizer: Any = torch.optim.SGD(named, lr=0.05)
    line = ""
    if compressed:
        optimizer = CompressedOptimizer(optimizer, FULL_RANK, min_compression_rate=0, **options)
        plan = str(optimizer.attach(wrapped))
        line = next(text for text in plan.splitlines() if "told to ignore" in text)
        assert "head.weight" not in optimizer.error_memory()
    for step in range(3):
        loss_of(wrapped, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
        wrapped.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, line


def refused(rank: int) -> list[str]:
    """What `attach` says of clipping with an ignored parameter, and of DDP's reducer in
    Python.
    """
    said = []
    for what in ("clipping", "python_reducer"):
        model, clip = Net(), None
        if what == "clipping":
            clip = 1.0
            names = ["head.weight"]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        wrapped = DistributedDataParallel(model)
        if what == "python_reducer":
            wrapped._use_python_reducer = True
        base = torch.optim.SGD(model.named_parameters(), lr=0.05)
        optimizer = CompressedOptimizer(base, FULL_RANK, max_grad_norm=clip)
        try:
            optimizer.attach(wrapped)
        except LowRankCommError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def hooked(rank: int, setup: Setup, compressed: bool, attach_first: bool) -> dict[str, Any]:
    """Users' hooks of every kind: how often each is called, and parameters in the end.

    The first layer, whose gradients arrive last, is frozen by zeroing them when they
    are there; the gradient of the head's weight is doubled before.
    """
    model, process_group = wrapped(setup)
    optimizer: Any = setup.base(plain_names(model).items())
    if compressed:
        optimizer = CompressedOptimizer(
            optimizer,
            FULL_RANK,
            min_compression_rate=0,
            process_group=process_group,
            shard_scope=setup.scope,
            **setup.options,
        )
        if attach_first:
            optimizer.attach(model)
    calls: Counter[str] = Counter()
    parameters = plain_names(model)
    frozen = [parameters["first.weight"], parameters["first.bias"]]
    start = [whole(p) for p in frozen]

    def zeroed(p: Any) -> None:
        calls["post-accumulate"] += 1
        p.grad.mul_(0.0)

    def double(grad: torch.Tensor) -> torch.Tensor:
        calls["tensor"] += 1
        return grad * 2.0

    for p in frozen:
        p.register_post_accumulate_grad_hook(zeroed)
    parameters["head.weight"].register_hook(double)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.register_full_backward_hook(lambda *_: calls.update(["module"]))
    if compressed and not attach_first:
        optimizer.attach(model)
    for step in range(4):
        loss_of(model, step, rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    ends = {name: whole(p) for name, p in parameters.items()}
    if compressed:
        optimizer.detach()
    moved = max(float((whole(p) - s).abs().max()) for p, s in zip(frozen, start, strict=True))
    return {"calls": dict(calls), "moved": moved, "ends": ends}


def whole(p: torch.Tensor) -> torch.Tensor:
    return (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
