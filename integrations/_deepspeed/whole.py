"""Where gradients wait whole: at stage 0, and with DeepSpeed's `BF16_Optimizer`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.errors import UnsupportedError
from lowrank_comm.integrations._deepspeed.internals import Gradients, GradientStore
from lowrank_comm.reduction.gradients import separate_from_parameters
from lowrank_comm.reduction.params import gradient_dtype


class PlainGradients(GradientStore):
    """Stage 0: `p.grad`, read by a torch optimizer or by DeepSpeed's fp16/bf16 wrapper
    of one.
    """

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        # The engine asks its optimizer for `overflow` after each step. A torch
        # optimizer has none, so an fp32 engine would never skip; with it, the engine
        # does the bookkeeping of a skipped step as at other stages.
        self._skips_by_itself = not isinstance(self.optimizer, torch.optim.Optimizer)
        if not self._skips_by_itself:
            self.optimizer.overflow = False

    def check_replicas(self, on_divergence: str) -> None:
        if self._skips_by_itself and on_divergence == "resync":
            raise UnsupportedError(
                f'lowrank_comm.on_divergence="resync": {type(self.optimizer).__name__} at stage 0'
                " keeps fp32 copies of the weights of its own, which would overwrite what was"
                ' copied; use ZeRO stage 1, or on_divergence="error".'
            )

    def dtype(self, parameter: Tensor) -> torch.dtype:
        return gradient_dtype(parameter)

    def gradients(self) -> Gradients:
        known = {id(p) for p in self.parameters}
        unknown = [
            name
            for name, p in self.engine.module.named_parameters()
            if p.grad is not None and p.requires_grad and id(p) not in known
        ]
        why = (
            "would not be averaged, since the parameter was frozen when deepspeed.initialize ran;"
            " unfreeze parameters before that"
        )
        # as other gradients that cannot be averaged, since not all ranks may have it
        self.refused = {0: f"{unknown[0]} {why}"} if unknown else {}
        separate_from_parameters(self.parameters, self.engine.module.parameters())
        return [p.grad for p in self.parameters]

    def hand_over(self, gradients: Gradients) -> None:
        for p, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is not None:
                p.grad = gradient
            elif p.requires_grad:
                # Zero, as with DeepSpeed: the step counts for a parameter without one,
                # too; but not for one that was frozen, which stands still.
                p.grad = torch.zeros_like(p, dtype=self.dtype(p))

    @contextlib.contextmanager
    def step(self, applied: bool) -> Iterator[None]:
        if not self._skips_by_itself:
            # it stays until the next step: Accelerate asks for it after this one
            self.optimizer.overflow = not applied
        if applied or self._skips_by_itself:
            yield
            return
        # a scheduler of torch sets it on the instance
        step, own = self.optimizer.step, "step" in vars(self.optimizer)
        self.optimizer.step = lambda *args, **kwargs: None
        try:
            yield
        finally:
            if own:
                self.optimizer.step = step
            else:
                del self.optimizer.step


class BF16Gradients(GradientStore):
    """`BF16_Optimizer` (stage 1, bfloat16, fp32 accumulation): 1-D views of a flat fp32
    buffer.
    """

    needs = (
        "bf16_groups",
        "clear_hp_grads",
        "fp32_groups_gradients",
        "fp32_groups_has_gradients",
        "set_gradient_accumulation_boundary",
    )
    groups = "bf16_groups"

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        place = {
            id(p): (i, j)
            for i, group in enumerate(self.optimizer.bf16_groups)
            for j, p in enumerate(group)
        }
        self._places = [place[id(p)] for p in self.parameters]

    def dtype(self, parameter: Tensor) -> torch.dtype:
        return self.optimizer.fp32_groups_gradients[0][0].dtype

    def drop(self) -> None:
        self.optimizer.clear_hp_grads()

    def collect(self, boundary: bool) -> None:
        self.optimizer.set_gradient_accumulation_boundary(boundary)

    def gradients(self) -> Gradients:
        views = self.optimizer.fp32_groups_gradients
        present = self.optimizer.fp32_groups_has_gradients
        return [
            views[i][j].view(p.shape) if present[i][j] else None
            for p, (i, j) in zip(self.parameters, self._places, strict=True)
        ]

    def hand_over(self, gradients: Gradients) -> None:
        for p, gradient, (i, j) in zip(self.parameters, gradients, self._places, strict=True):
            if gradient is None:
                continue
            view = self.optimizer.fp32_groups_gradients[i][j]
            if gradient.data_ptr() != view.data_ptr():
                view.copy_(gradient.reshape(-1))
            # The norm is taken over the flagged ones, so the flags must be the same on
            # all ranks.
            self.optimizer.fp32_groups_has_gradients[i][j] = True
            p._hp_grad = view  # type: ignore[attr-defined]
