"""How one parameter is updated from its averaged gradient.

With R the averaged gradient in coordinates of P:

    at a refresh   the rule carries its state over by T = P_old^T P_new
    direction = rule(R)
    W <- W - lr weight_decay W - lr scale direction P^T

A parameter that is not projected has W <- W - lr weight_decay W - lr rule(gradient).
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from lowrank_comm.projected.averaging import Averaged, Entry
from lowrank_comm.projected.projection import Projection, computation_dtype


class UpdateRule(Protocol):
    """An update such as AdamW's, on gradients or their coordinates alike. Its
    attributes must be equal on all workers, as the parameter groups must.
    """

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise ConfigError for a bad value of the rule's own keys in a group."""

    def initial_state(self, like: Tensor) -> dict[str, Tensor]:
        """Return the state before the first step, for gradients of that shape and
        dtype.
        """

    def move(self, state: dict[str, Tensor], overlap: Tensor) -> None:
        """Carry the state over to a new subspace by T = P_old^T P_new, (r, r)."""

    def direction(
        self, gradient: Tensor, state: dict[str, Tensor], group: dict[str, Any]
    ) -> Tensor:
        """Take a gradient into the state and return the update without its lr."""


def clip_factor(gradients: list[Tensor], max_norm: float, device: torch.device) -> Tensor:
    """Return the factor that clips the gradients to a norm, on the device."""
    norms = [
        torch.linalg.vector_norm(gradient).to(device=device, dtype=torch.float32)
        for gradient in gradients
    ]
    total = torch.linalg.vector_norm(torch.stack(norms))
    return (max_norm / (total + 1e-6)).clamp_(max=1.0)


def update(
    entry: Entry,
    averaged: Averaged,
    state: dict[str, Tensor],
    rule: UpdateRule,
    projection: Projection,
    t: int,
    clip: Tensor | None,
) -> None:
    """Update a parameter and its state in place.

    Args:
        entry: the parameter.
        averaged: its averaged gradient.
        state: of the optimizer, for this parameter; empty before its first step.
        rule: of the update.
        projection: says on which side P is.
        t: step.
        clip: factor of the gradient, or None.
    """
    parameter, group = entry.parameter, entry.group
    gradient, basis = averaged.gradient, averaged.basis
    if clip is not None:
        gradient = gradient * clip.to(gradient)
    if not state:
        state.update(rule.initial_state(gradient))
    elif averaged.refreshed and basis is not None:
        rule.move(state, state["projector"].mT @ basis)
    if basis is not None and (averaged.refreshed or "projector" not in state):
        # the averaged basis is a view into a packet, and would keep all of it
        state["projector"] = basis.clone()
        state["refreshed_at"] = step_number(t)
    direction = rule.direction(gradient, state, group)
    lr = float(group["lr"])
    if group["weight_decay"]:
        parameter.mul_(1.0 - lr * float(group["weight_decay"]))
    if basis is None:
        parameter.add_(direction.to(parameter.dtype), alpha=-lr)
        return
    p, q = (basis, direction) if projection.on_rows(parameter) else (direction, basis)
    if parameter.dtype == direction.dtype:
        parameter.addmm_(p, q.mT, alpha=-lr * group["scale"])
    else:
        parameter.add_((p @ q.mT).to(parameter.dtype), alpha=-lr * group["scale"])


def initial_state(entry: Entry, rule: UpdateRule, projection: Projection) -> dict[str, Tensor]:
    """Make a parameter's whole state without a step; no communication."""
    parameter, dtype = entry.parameter, computation_dtype(entry.parameter)
    if entry.rank is None:
        return rule.initial_state(torch.zeros_like(parameter, dtype=dtype))
    free = parameter.numel() // projection.length(parameter)
    like = torch.zeros(free, entry.rank, dtype=dtype, device=parameter.device)
    return {
        **rule.initial_state(like),
        "projector": projection.initial_basis(entry.name, parameter, entry.rank),
        "refreshed_at": step_number(-1),
    }


def last_refresh(state: dict[str, Tensor]) -> int | None:
    """Return the step of a parameter's last refresh: -1 before the first, None in
    states that were saved without it.
    """
    if not state:
        return -1
    return int(state["refreshed_at"]) if "refreshed_at" in state else None


def step_number(t: int) -> Tensor:
    """Return a step as state dicts keep it, on the CPU as torch's own optimizers do."""
    return torch.tensor(float(t), dtype=torch.float32, device="cpu")
