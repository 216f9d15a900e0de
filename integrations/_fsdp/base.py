"""What the engines of flat and of hybrid sharding share: gradients are DTensors, of
which this rank holds a shard.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from typing_extensions import override

from lowrank_comm.communication import Group, IntraNodeGroup
from lowrank_comm.integrations._fsdp import internals
from lowrank_comm.optimizer.engine import Engine


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def placed_like(parameter: Tensor, held: Tensor) -> Tensor:
    """Return a gradient like `parameter`, of which this rank holds `held`."""
    assert isinstance(parameter, DTensor)
    return DTensor.from_local(
        held.view(local(parameter).shape),
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def shard_dim(parameter: Tensor) -> int:
    """Return the dimension along which a parameter is cut."""
    assert isinstance(parameter, DTensor)
    place = parameter.placements[-1]
    assert isinstance(place, Shard)
    return place.dim


def padded(parameter: Tensor, ranks: int) -> int:
    """Return the bytes of a gradient in a reduce-scatter, whose blocks are all as long
    as the first.
    """
    m, *rest = parameter.shape
    return -(-m // ranks) * ranks * math.prod(rest) * parameter.dtype.itemsize


class FSDPEngine(Engine):
    """What both kinds share: gradients are DTensors, placed like their parameters."""

    reduces_at = "backward"

    def __init__(self, model: nn.Module, group: Group, intra_node: IntraNodeGroup) -> None:
        self.group, self.intra_node = group, intra_node
        self._model, self._groups = model, internals.param_groups(model)
        # what undoes our changes to FSDP
        self._give_back: list[Callable[[], None]] = []

    @property
    @override
    def rows(self) -> None:
        return None

    @property
    @override
    def can_overlap(self) -> bool:
        # FSDP's last reduce-scatters and the copies into p.grad end with the backward
        # pass
        return False

    @override
    def collect(self, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        return [None if p.grad is None else local(p.grad) for p in parameters]

    @override
    def deliver(self, parameters: Sequence[Tensor], results: Sequence[Tensor | None]) -> None:
        for parameter, result in zip(parameters, results, strict=True):
            if result is None:
                continue
            if parameter.grad is None or local(parameter.grad).data_ptr() != result.data_ptr():
                parameter.grad = placed_like(parameter, result)

    @override
    def release(self) -> None:
        for give_back in self._give_back:
            give_back()

    @override
    def local(self, tensor: Tensor) -> Tensor:
        return local(tensor)

    @override
    def is_last_backward(self) -> bool:
        return internals.is_last_backward(self._model)
