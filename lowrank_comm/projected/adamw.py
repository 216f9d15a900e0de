"""AdamW whose moments live in the projected space of GaLore or GoLore.

Source: GaLore (Zhao et al.; arXiv 2403.03507), GoLore (He, Li, Hu et al.; arXiv
2410.11289). With P on the side of the columns and R the mean over the workers of g_i P
(l x r), step k is

    refresh:  T = P_old^T P_new;  M and S are carried over as told below
    M  <- b1 M + (1 - b1) R
    S  <- b2 S + (1 - b2) R^2
    M^ =  M / (1 - b1^k);  S^ = S / (1 - b2^k)
    W  <- W - lr alpha [ M^ / (sqrt(S^) + eps) ] P^T - lr wd W

M are coordinates of a matrix in the full space, M P_old^T, and M T are those of the
nearest matrix in the new subspace: `first_moment="rotate"`, M <- M T. With "keep" M
stays as it is, by position: numbers of the old columns of P count for the new ones.

The variances S do not transform like that. `second_moment` says what becomes of them at
a refresh:

    "rotate"  S_j <- sum_i S_i T_ij^2 + (1 - sum_i T_ij^2) mean_i S_i. This is exact if
              the coordinates are uncorrelated; the share of a new direction that lies
              outside of the old subspace gets the row's mean. S stays >= 0.
    "keep"    S stays as it is, by position.
    "reset"   S <- 0, with its own count of steps for the bias correction. The updates
              grow to full size over WARM_UP steps, since a quotient by a single R^2 is
              noise.

GaLore's published optimizer (galore_torch's `AdamW`, github.com/jiaweizzhao/GaLore) is
`first_moment="keep", second_moment="keep"`, but for two conventions: it adds eps to the
root of S before the bias correction and not after it, and takes the decay of the
weights after the step. docs/memory_efficient.md has its settings beside those here.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Unpack

import torch
from torch import Tensor

from lowrank_comm.errors import ConfigError
from lowrank_comm.options import check_options
from lowrank_comm.projected.checks import BelowOne, NonNegative, check_number
from lowrank_comm.projected.optimizer import ProjectedOptimizer, SharedOptions
from lowrank_comm.projected.update import step_number

FirstMoment = Literal["rotate", "keep"]
SecondMoment = Literal["rotate", "keep", "reset"]
WARM_UP = 10


class ProjectedAdamW(ProjectedOptimizer):
    """AdamW with state in the projected space, data-parallel by averaging projected
    gradients.

    W <- W - lr scale [ M^ / (sqrt(S^) + eps) ] P^T - lr weight_decay W

    M and S are of size l x r.

    Args:
        params: parameters, (name, parameter) pairs, or groups of them; a group may have
            its own lr, betas, eps, weight_decay, rank and scale. `rank=None` in a group
            is plain AdamW for it.
        lr: learning rate.
        rank: r >= 1. A 2-D parameter with min(m, n) > r is projected; all others have
            plain AdamW.
        restart_every: tau in steps; the first step is a refresh.
        projection: "galore" (singular vectors of the mean gradient) or "golore"
            (random, no bytes).
        galore_until: for "golore", in steps: refreshes before it are GaLore's.
        first_moment: "rotate" or "keep", see the module's text.
        second_moment: "rotate", "keep" or "reset"; see there.
        scale: alpha, of projected updates; GaLore's recipes have 0.25.
        side: of P, "short" (the papers' code) or "long" (fewer bytes, less state, a
            smaller share for random subspaces).
        betas, eps, weight_decay: as in torch's AdamW; the decay is decoupled and of the
            weights before the step.
        max_grad_norm: clip the averaged gradients, projected where they are, to this
            norm.
        free_gradients: add a gradient to R as soon as it is there and drop it, in steps
            without a refresh.
        process_group: the workers, None for the default group.
        wire_dtype: on the wire, such as "bfloat16"; None for the wider of float32 and
            the parameter's.
        named_parameters: names, where `params` has none; random subspaces depend on
            them.
        seed: of random subspaces, equal on all workers.

    Raises:
        ConfigError: a value is out of range.
        UnsupportedError: sharded parameters.

    Example:
        >>> import torch
        >>> from lowrank_comm import ProjectedAdamW
        >>> model = torch.nn.Linear(64, 32)
        >>> named = model.named_parameters()
        >>> optimizer = ProjectedAdamW(named, lr=1e-3, rank=4, projection="golore")
        >>> model(torch.ones(2, 64)).sum().backward()
        >>> optimizer.step()
        >>> tuple(optimizer.state[model.weight]["exp_avg"].shape)
        (64, 4)

    Source: arXiv 2403.03507, arXiv 2410.11289.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        rank: int | None = 128,
        restart_every: int = 200,
        *,
        first_moment: FirstMoment = "rotate",
        second_moment: SecondMoment = "rotate",
        scale: float = 1.0,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        **shared: Unpack[SharedOptions],
    ) -> None:
        rule = AdamWRule(first_moment, second_moment)
        defaults: dict[str, Any] = {"lr": lr, "betas": betas, "eps": eps}
        defaults |= {"weight_decay": weight_decay, "rank": rank, "scale": scale}
        super().__init__(params, rule, restart_every, defaults, **shared)


@dataclass(frozen=True)
class AdamWRule:
    """AdamW on gradients or their coordinates; see the module's text.

    Args:
        first_moment, second_moment: see `ProjectedAdamW`.
    """

    first_moment: FirstMoment = "rotate"
    second_moment: SecondMoment = "rotate"

    def __post_init__(self) -> None:
        check_options(self, "ProjectedAdamW: ")

    def check_group(self, group: dict[str, Any]) -> None:
        betas = group["betas"]
        if not isinstance(betas, tuple | list) or len(betas) != 2:
            raise ConfigError(
                f"ProjectedAdamW: betas must be two numbers such as (0.9, 0.999), got {betas!r}."
            )
        for beta in betas:
            check_number("ProjectedAdamW: betas", beta, BelowOne)
        check_number("ProjectedAdamW: eps", group["eps"], NonNegative)

    def initial_state(self, like: Tensor) -> dict[str, Tensor]:
        return {
            "step": step_number(0),
            # since the last reset of exp_avg_sq
            "second_step": step_number(0),
            "exp_avg": torch.zeros_like(like),
            "exp_avg_sq": torch.zeros_like(like),
        }

    def move(self, state: dict[str, Tensor], overlap: Tensor) -> None:
        if self.first_moment == "rotate":
            state["exp_avg"] = state["exp_avg"] @ overlap
        if self.second_moment == "rotate":
            shares, old = overlap.square(), state["exp_avg_sq"]
            outside = (1.0 - shares.sum(dim=0)).clamp_(min=0.0)
            state["exp_avg_sq"] = old @ shares + old.mean(dim=1, keepdim=True) * outside
        elif self.second_moment == "reset":
            state["exp_avg_sq"].zero_()
            state["second_step"].zero_()

    def direction(
        self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> Tensor:
        b1, b2 = map(float, group["betas"])
        state["step"] += 1
        state["second_step"] += 1
        step, second_step = float(state["step"]), float(state["second_step"])
        first = state["exp_avg"].mul_(b1).add_(gradient, alpha=1 - b1)
        second = state["exp_avg_sq"].mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
        warm_up = min(1.0, second_step / WARM_UP) if second_step < step else 1.0
        divisor = (second / (1 - b2**second_step)).sqrt_().add_(group["eps"])
        return (first * (warm_up / (1 - b1**step))).div_(divisor)
