"""Rehearses steps of a reducer, to know how much memory they need before the first one.

The reducer's own code runs, on tensors without numbers (`numerics.shapes_only`) and
with workers of whom nothing comes: a step that restarts all matrices, as the first
does; two ordinary ones, the second of which begins with what the first leaves; a save,
and a load; and a step of the warm-up, if there is one. So whatever a step does, its
memory is known, and no formula has to follow the code.

What is rehearsed goes well: every gradient is there, no basis has lost a direction, no
worker vetoes. Counted is what this library holds on one rank beside the error memory:
bases, Delta, packets, decoded blocks, workspaces. Not counted are parameters,
gradients, the base optimizer, and what a communication backend takes for itself.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.communication.group import PretendedGroup
from lowrank_comm.communication.intra_node import IntraNodeGroup
from lowrank_comm.communication.workers import Workers
from lowrank_comm.numerics.device import as_if_on_accelerator, on_accelerator
from lowrank_comm.numerics.shapes_only import META, ShapesOnly
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.row_scatter import RowScatter


@dataclass(frozen=True)
class Needs:
    """Bytes that this library holds at most on a rank, beside the error memory.

    Attributes:
        between: steps, at all times: bases, and on a CPU room for Delta.
        step: in an ordinary step.
        restart: in a step that restarts all matrices.
        warmup: in a step of the warm-up; 0 without one.
        save: while the state is consolidated, and its tensors are taken one by one.
        load: while the state is restored, beside what is read.
    """

    between: int
    step: int
    restart: int
    warmup: int
    save: int
    load: int

    @property
    def most(self) -> int:
        """In whatever needs most."""
        return max(self.step, self.restart, self.warmup, self.save, self.load)


@dataclass(frozen=True)
class Checkpoints:
    """What a checkpoint does with a reducer beside consolidating it.

    Attributes:
        save: takes its tensors one by one.
        read: returns what a load has read.
        load: gives that to the reducer.
    """

    save: Callable[[Any], None] = lambda reducer: None
    read: Callable[[Any], Mapping[str, Mapping[str, Tensor]]] = lambda reducer: {}
    load: Callable[[Any, Mapping[str, Mapping[str, Tensor]]], None] = lambda reducer, read: None


class _NoOthersInTheNode(IntraNodeGroup):
    """A node of which only this rank is there."""

    def __init__(self, size: int, rank: int, scope: str) -> None:
        super().__init__(None, scope)
        self.size, self.rank = size, rank

    def alone(self) -> IntraNodeGroup:
        return _NoOthersInTheNode(1, 0, "shard")

    def run(self, collective: Callable[..., Any], *tensors: Tensor) -> None:
        pass

    def read(self, numbers: Tensor, hoped: Sequence[float]) -> list[float]:
        return list(hoped)


class Rehearsal:
    """Steps, a save and a load of a run that has not begun.

    Args:
        make: returns a reducer of the run's settings, given slots, `group` and
            `intra_node`.
        slots: of the reducer.
        workers: who takes part.
        rows: what cuts whole gradients into the slots' blocks; None where the engine
            does.
        checkpoints: what they do.
        warmup: options of `make` for one step of the warm-up; none without one.
    """

    def __init__(
        self,
        make: Callable[..., Any],
        slots: Sequence[ParamInfo],
        workers: Workers,
        rows: RowScatter | None,
        checkpoints: Checkpoints,
        warmup: Mapping[str, Any],
    ) -> None:
        self._warmup = warmup
        group, node = workers.group, workers.intra_node
        self._make, self._checkpoints = make, checkpoints
        self._group = PretendedGroup(group.size, group.rank)
        self._node = _NoOthersInTheNode(node.size, node.rank, node.scope)
        self._accelerator = bool(slots) and on_accelerator(slots[0].device)
        self._slots = [replace(slot, device=META) for slot in slots]
        self._whole = None if rows is None else [replace(s, device=META) for s in rows.whole]

    @functools.cached_property
    def needs(self) -> Needs:
        """What they need; found when this is first asked."""
        with (
            torch.inference_mode(False),
            ShapesOnly() as meter,
            as_if_on_accelerator(self._accelerator),
            torch.no_grad(),
        ):
            return self._run(meter)

    def _run(self, meter: ShapesOnly) -> Needs:
        make = functools.partial(self._make, self._slots, group=self._group, intra_node=self._node)
        reducer, checkpoints = make(), self._checkpoints
        state = reducer.state
        cut = None if self._whole is None else RowScatter(self._whole, self._node)
        whole = self._slots if self._whole is None else self._whole
        gradients = [torch.empty(slot.shape, dtype=slot.dtype) for slot in whole]
        not_ours = state.error_bytes + sum(gradient.nbytes for gradient in gradients)

        def step(reducer: Any) -> int:
            meter.start()
            # nobody is asked
            reducer.workers.agreed = True
            if cut is None:
                reducer.reduce(gradients)
            else:
                blocks = cut.scatter(gradients)
                cut.gather(reducer.reduce(blocks).grads, gradients)
                del blocks
            reducer.commit()
            return meter.peak - not_ours

        restart = step(reducer)
        state.restarts.schedule = None
        step(reducer)
        ordinary = step(reducer)
        between = meter.start() - not_ours
        # of the error memory, before it changes
        state.last_report()
        if self._group.size > 1 and state.keeps_private_state:
            state.average_errors(lambda tensor: tensor, True, reducer.piece_bytes)
        checkpoints.save(reducer)
        save = meter.peak - not_ours
        read = checkpoints.read(reducer)
        read_bytes = sum(tensor.nbytes for parts in read.values() for tensor in parts.values())
        meter.start()
        checkpoints.load(reducer, read)
        load = meter.peak - not_ours - read_bytes
        warmup = 0
        if self._warmup:
            del reducer, state, read
            warmup = step(make(**self._warmup))
        return Needs(between, ordinary, restart, warmup, save, load)

    def __getstate__(self) -> dict[str, Needs]:
        """Take what was found along, and not the run."""
        return {"needs": self.needs}
