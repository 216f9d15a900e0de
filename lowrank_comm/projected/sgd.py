"""SGD with momentum in the projected space of GaLore or GoLore: M <- momentum M T at a
refresh, M <- momentum M + R.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.projected.optimizer import ProjectedOptimizer, check_number


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
        projection: str = "galore",
        galore_until: int = 0,
        scale: float = 1.0,
        side: str = "short",
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        max_grad_norm: float | None = None,
        free_gradients: bool = False,
        process_group: Any = None,
        wire_dtype: str | None = None,
        named_parameters: Iterable[tuple[str, Tensor]] | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "momentum": momentum,
                "weight_decay": weight_decay,
                "rank": rank,
                "scale": scale,
            },
            restart_every=restart_every,
            projection=projection,
            galore_until=galore_until,
            side=side,
            max_grad_norm=max_grad_norm,
            free_gradients=free_gradients,
            process_group=process_group,
            wire_dtype=wire_dtype,
            named_parameters=named_parameters,
            seed=seed,
        )

    def check_group(self, group: dict[str, Any]) -> None:
        """Also the keys of this rule."""
        super().check_group(group)
        check_number("ProjectedSGD", "momentum", group["momentum"], below=1.0)

    def initial_state(self, like: Tensor) -> dict[str, Any]:
        """Zero moments."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device="cpu"),
            "momentum_buffer": torch.zeros_like(like),
        }

    def move(self, state: dict[str, Any], overlap: Tensor) -> None:
        """See the module's text."""
        state["momentum_buffer"] = state["momentum_buffer"] @ overlap

    def direction(self, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
        """See the module's text."""
        state["step"] += 1
        moment: Tensor = state["momentum_buffer"].mul_(group["momentum"]).add_(gradient)
        return moment
