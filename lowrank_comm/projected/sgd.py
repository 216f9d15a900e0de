"""SGD with momentum in the projected space of GaLore or GoLore.

refresh:  T = P_old^T P_new;  M <- M T
M <- momentum M + R
W <- W - lr scale M P^T - lr weight_decay W
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Unpack

import torch
from torch import Tensor

from lowrank_comm.projected.checks import BelowOne, check_number
from lowrank_comm.projected.optimizer import ProjectedOptimizer, SharedOptions
from lowrank_comm.projected.update import step_number


class ProjectedSGD(ProjectedOptimizer):
    """SGD whose momentum lives in the projected space, data-parallel by averaging
    projected gradients.

    M <- momentum M + R;  W <- W - lr scale M P^T - lr weight_decay W

    Args:
        params, lr, rank, restart_every, projection, galore_until, scale, side: see
            `ProjectedAdamW`.
        momentum: of M, in [0, 1).
        weight_decay: decoupled, of the weights before the step.
        max_grad_norm, free_gradients, process_group, wire_dtype, named_parameters,
            seed: see `ProjectedAdamW`.

    Raises:
        ConfigError: a value is out of range.
        UnsupportedError: sharded parameters.

    Example:
        >>> import torch
        >>> from lowrank_comm import ProjectedSGD
        >>> model = torch.nn.Linear(64, 32)
        >>> optimizer = ProjectedSGD(model.named_parameters(), lr=0.1, rank=4)
        >>> model(torch.ones(2, 64)).sum().backward()
        >>> optimizer.step()
        >>> sorted(optimizer.state[model.weight])
        ['momentum_buffer', 'projector', 'refreshed_at', 'step']

    Source: arXiv 2403.03507, arXiv 2410.11289 (MSGD with momentum re-projection).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int | None = 128,
        restart_every: int = 200,
        *,
        scale: float = 1.0,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        **shared: Unpack[SharedOptions],
    ) -> None:
        defaults: dict[str, Any] = {"lr": lr, "momentum": momentum}
        defaults |= {"weight_decay": weight_decay, "rank": rank, "scale": scale}
        super().__init__(params, SGDRule(), restart_every, defaults, **shared)


class SGDRule:
    """SGD with momentum on gradients or their coordinates."""

    def check_group(self, group: dict[str, Any]) -> None:
        check_number("ProjectedSGD: momentum", group["momentum"], BelowOne)

    def initial_state(self, like: Tensor) -> dict[str, Tensor]:
        return {
            "step": step_number(0),
            "momentum_buffer": torch.zeros_like(like),
        }

    def move(self, state: dict[str, Tensor], overlap: Tensor) -> None:
        state["momentum_buffer"] = state["momentum_buffer"] @ overlap

    def direction(
        self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> Tensor:
        state["step"] += 1
        moment: Tensor = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        return moment
