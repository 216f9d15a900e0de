"""The base optimizers of a comparison: AdamW, and Muon with AdamW for what Muon is not
made for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor
from torch.optim import AdamW, Muon, Optimizer

BaseName = Literal["adamw", "muon"]
MUON_MOMENTUM = 0.95


@dataclass(frozen=True)
class Base:
    """A base optimizer and its numbers.

    Attributes:
        name: "adamw", or "muon" for Muon on the hidden matrices and AdamW on the rest.
        rate: highest learning rate. Muon's update is scaled to the size of AdamW's
            (0.2 sqrt(max(m, n)) for each step of an orthonormal matrix), so that both
            have one rate.
        beta2: of AdamW; beta1 is 0.9.
        weight_decay: of both.
    """

    name: BaseName
    rate: float
    beta2: float = 0.999
    weight_decay: float = 0.0


class Together(Optimizer):
    """Steps several optimizers as one; their parameter groups are its own, so that one
    schedule serves them all.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


def is_hidden(name: str, parameter: Tensor) -> bool:
    """Return whether Muon is made for the parameter: a matrix, but neither the
    embeddings nor the head.
    """
    return parameter.dim() == 2 and "embed" not in name and "lm_head" not in name


def base_optimizer(parameters: Mapping[str, Tensor], base: Base) -> Optimizer:
    """Return the base optimizer over named parameters."""
    if base.name == "adamw":
        return adamw(list(parameters.values()), base)
    hidden = [tensor for name, tensor in parameters.items() if is_hidden(name, tensor)]
    rest = [tensor for name, tensor in parameters.items() if not is_hidden(name, tensor)]
    parts: list[Optimizer] = [muon(hidden, base, MUON_MOMENTUM)] if hidden else []
    return Together(*parts, *([adamw(rest, base)] if rest else []))


def adamw(parameters: list[Tensor], base: Base) -> AdamW:
    """Return AdamW with the numbers of a base."""
    return AdamW(parameters, lr=base.rate, betas=(0.9, base.beta2), weight_decay=base.weight_decay)


def muon(matrices: list[Tensor], base: Base, momentum: float) -> Muon:
    """Return Muon with the numbers of a base; with momentum 0 it orthogonalizes what
    it is given.
    """
    return Muon(
        matrices,
        lr=base.rate,
        weight_decay=base.weight_decay,
        momentum=momentum,
        nesterov=momentum > 0,
        adjust_lr_fn="match_rms_adamw",
    )
