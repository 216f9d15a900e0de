"""What of an optimizer's parameters and of its base's state other ranks hold, too."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.optim import Optimizer

from lowrank_comm.optimizer.engine import Engine
from lowrank_comm.reduction.divergence import Replicas


def replicas_of(
    named: Mapping[str, Tensor], base: Optimizer, engine: Engine, stale: bool = False
) -> Replicas:
    """Return the parameters, frozen ones included, as this rank holds them, without
    those whose gradients are not averaged: they differ between ranks.

    Args:
        named: all parameters of the base by name.
        base: the optimizer that steps.
        engine: knows which ranks hold the same: with a copy of the whole model on every
            rank all, with shards those at the same place of other nodes.
        stale: see `Replicas`.
    """
    held = {
        name: p
        for name, p in named.items()
        if engine.compares_values and id(p) not in engine.kept_local
    }
    return Replicas(
        {name: engine.local(parameter) for name, parameter in held.items()},
        engine.saves_whole,
        base.param_groups,
        {name: base.state[p] for name, p in held.items() if p in base.state},
        engine.local,
        stale,
    )
