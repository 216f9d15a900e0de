"""Collectives that not all ranks reach: what is told, and that no process aborts."""

from __future__ import annotations

import datetime
import logging
import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from lowrank_comm import LowRankCommError, PowerSGD, checkpoint
from lowrank_comm.bidirectional import BidirectionalOptimizer
from lowrank_comm.communication import failures
from tests.support.gloo import CaseFailed, GlooPool
from tests.support.networks import compressed, loss_of, network

SECONDS = 2


def impatient(size: int = 2) -> Any:
    """A group that waits for SECONDS only."""
    return dist.new_group(list(range(size)), timeout=datetime.timedelta(seconds=SECONDS))


def left_out(rank: int, call: str, folder: str) -> tuple[str, str, float]:
    """Rank 0 makes a call alone; the other goes on to its next step. What each is told,
    and after how long.
    """
    model = network()
    group = impatient()
    optimizer = compressed(model, compressor=PowerSGD(1), process_group=group)
    state: dict[str, Any] = {}

    def step(t: int) -> None:
        optimizer.zero_grad()
        loss_of(model, t, rank).backward()
        optimizer.step()

    for t in range(3):
        step(t)
    optimizer.consolidate_error_memory()
    state = optimizer.state_dict()
    clock = time.monotonic()
    try:
        if rank == 0:
            {
                "consolidate": optimizer.consolidate_error_memory,
                "save": lambda: checkpoint.save(optimizer.reducer, folder),
                "load": lambda: checkpoint.load(optimizer.reducer, folder),
                "load_state_dict": lambda: optimizer.load_state_dict(state),
            }[call]()
        step(3)
    except LowRankCommError as error:
        told, cause = str(error), type(error.__cause__).__name__
    return told, cause, time.monotonic() - clock


CALLS = {
    "consolidate": "CompressedOptimizer.consolidate_error_memory()",
    "save": "save()",
    "load": "load()",
    "load_state_dict": "CompressedOptimizer.load_state_dict()",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_of_one_rank_alone_asks_whether_all_made_it(
    gloo: GlooPool, tmp_path: Any, call: str
) -> None:
    """Both end by an error of ours with torch's as its cause, within the group's
    timeout; gloo aborts the process of the smaller all-reduce when two meet.
    """
    one, other = gloo.run(left_out, 2, call, str(tmp_path))
    assert one[0].startswith(f"lowrank_comm: {CALLS[call]} could not go on with the other ranks")
    assert other[0].startswith("lowrank_comm: CompressedOptimizer.step() could not go on")
    for told, cause, seconds in (one, other):
        assert "Did all ranks make this call" in told
        # the line above that makes it
        assert "test_failures.py, line " in told
        assert cause in ("RuntimeError", "DistBackendError", "DistNetworkError")
        assert seconds < 4 * SECONDS


def first_step(rank: int, kind: str) -> str:
    """Rank 1 never makes its first step."""
    model, group = network(), impatient()
    if kind == "bidirectional":
        base = torch.optim.SGD(model.named_parameters(), lr=0.1)
        optimizer: Any = BidirectionalOptimizer.from_config(
            base, {"compressor": "m4"}, process_group=group
        )
    else:
        optimizer = compressed(model, process_group=group)
    if rank == 1:
        time.sleep(SECONDS + 1)
        return ""
    loss_of(model, 0, rank).backward()
    try:
        optimizer.step()
    except LowRankCommError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("kind", ["gradients", "bidirectional"])
def test_a_first_step_of_one_rank_alone(gloo: GlooPool, kind: str) -> None:
    assert "Did all ranks make this call" in gloo.run(first_step, 2, kind)[0]


def in_backward(rank: int, engine: str) -> str:
    """Rank 0 alone ends a backward pass, at whose end gradients are averaged."""
    model, group = network(), impatient()
    optimizer = compressed(model, process_group=group, reduce_at="backward")
    ddp = DistributedDataParallel(model) if engine == "DDP" else model
    if engine == "DDP":
        optimizer.attach(ddp)
    loss_of(ddp, 0, rank).backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 1:
        time.sleep(SECONDS + 1)
        return ""
    try:
        loss_of(ddp.module if engine == "DDP" else ddp, 1, rank).backward()
    except LowRankCommError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("engine", ["plain", "DDP"])
def test_what_fails_in_backward_is_called_backward(gloo: GlooPool, engine: str) -> None:
    told = gloo.run(in_backward, 2, engine)[0]
    assert told.startswith("lowrank_comm: backward() could not go on with the other ranks")
    assert "test_failures.py, line " in told


def test_memory_that_runs_out_in_a_collective_is_told_as_it_is() -> None:
    error = torch.OutOfMemoryError("out of memory")
    with pytest.raises(torch.OutOfMemoryError) as told:
        raise failures.collective_failed(error) from error
    assert told.value is error


def unlike_steps(rank: int) -> str:
    """Rank 0 consolidates a step early, where rank 1 does so for another reason."""
    model = network()
    optimizer = compressed(model)
    loss_of(model, 0, rank).backward()
    optimizer.step()
    optimizer.reducer.state.step += rank
    try:
        optimizer.consolidate_error_memory()
    except LowRankCommError as error:
        return str(error)
    return "no error"


def test_consolidation_after_unlike_numbers_of_steps(gloo: GlooPool) -> None:
    for told in gloo.run(unlike_steps, 2):
        assert "unlike numbers of steps: 1 on rank 0, 2 on rank 1" in told


def dies(rank: int) -> None:
    """Rank 1 ends after a step; the group's timeout is the default one."""
    model = network()
    optimizer = compressed(model)
    for t in range(3):
        optimizer.zero_grad()
        loss_of(model, t, rank).backward()
        optimizer.step()
        if rank:
            os._exit(1)


def test_the_death_of_a_rank_ends_the_others_at_once() -> None:
    pool = GlooPool(2)
    clock = time.monotonic()
    try:
        with pytest.raises(CaseFailed, match="a rank has ended or cannot be reached"):
            pool.run(dies, 2, timeout=60.0)
    finally:
        pool.close()
    assert time.monotonic() - clock < 45


def slow(rank: int) -> list[str]:
    """Rank 1 comes late to a consolidation."""
    failures.PATIENCE = 0.3  # type: ignore[misc]
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lowrank_comm").addHandler(handler)
    model = network()
    optimizer = compressed(model)
    try:
        loss_of(model, 0, rank).backward()
        optimizer.step()
        optimizer.consolidate_error_memory()
        if rank:
            time.sleep(1.0)
        optimizer.consolidate_error_memory()
    finally:
        logging.getLogger("lowrank_comm").removeHandler(handler)
        failures.PATIENCE = 30.0  # type: ignore[misc]
    return lines


def test_a_rank_that_waits_long_in_a_consolidation_says_so(gloo: GlooPool) -> None:
    one, other = gloo.run(slow, 2)
    (line,) = one
    assert "consolidate_error_memory() has waited for the other ranks" in line
    assert other == []
