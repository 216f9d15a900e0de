"""Where gradients wait under ZeRO, stages 1 to 3.

Until the accumulation boundary they are whole, on the parameters. The averaged ones are
given to the method by which DeepSpeed itself ends its reduction, from which each rank
takes the part that it owns.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from lowrank_comm.integrations._deepspeed.internals import (
    Gradients,
    GradientStore,
    shape,
    unreduced,
)
from lowrank_comm.reduction.divergence import Replicas

# ZeRO-1/2's count of micro-steps before the first
_NO_MICRO_STEP = -1


class ZeroGradients(GradientStore):
    """What the ZeRO optimizers of stages 1 to 3 share: hooks kept still, and
    accumulation in a wider dtype if asked for.
    """

    needs: tuple[str, ...] = (
        "_coalesce_grad_reduction",
        "set_gradient_accumulation_boundary",
        "gradient_accumulation_dtype",
    )

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        # DeepSpeed adds reduced micro-step gradients in this dtype. Here they are added
        # before the reduction, and p.grad has the parameter's dtype, so a wider sum
        # needs a place of its own.
        wide = self.optimizer.gradient_accumulation_dtype
        needed = wide == torch.float32 and any(p.dtype != wide for p in self.parameters)
        self._wide = wide if needed else None
        self._sums: dict[int, Tensor] = {}

    def dtype(self, parameter: Tensor) -> torch.dtype:
        return self._wide or parameter.dtype

    def install(self, end_of_backward: Callable[..., None], reduce: Callable[..., None]) -> None:
        super().install(end_of_backward, reduce)
        self.optimizer._coalesce_grad_reduction = True
        # The end of a user's own `with engine.coalesce_grad_reduction()`, and of a step
        # with caller-owned boundaries.
        self.engine._flush_coalesced_reduction_zero12 = (
            self.engine._flush_coalesced_reduction_zero3
        ) = reduce
        if hasattr(self.optimizer, "finalize_gradient_accumulation_boundary"):
            self.optimizer.finalize_gradient_accumulation_boundary = reduce

    def drop(self) -> None:
        self._sums.clear()

    def collect(self, boundary: bool) -> None:
        self.optimizer.set_gradient_accumulation_boundary(boundary)
        if self._wide is None:
            return
        for k, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            if k in self._sums:
                self._sums[k].add_(p.grad)
            else:
                self._sums[k] = p.grad.to(self._wide)
            p.grad = None

    def gradients(self) -> Gradients:
        self.collect(True)
        if self._wide is not None:
            return [self._sums.get(k) for k in range(len(self.parameters))]
        return [p.grad for p in self.parameters]


class PartitionedGradients(ZeroGradients):
    """Stages 1 and 2: DeepSpeed's flush copies gradients into buckets, from which each
    rank cuts what it owns.
    """

    needs = (
        *ZeroGradients.needs,
        "all_grad_tensors",
        "averaged_gradients",
        "bit16_groups",
        "cpu_offload",
        "fill_grad_accum_attribute",
        "gradient_reduction_w_predivide",
        "ipg_buckets",
        "micro_step_id",
        "reduce_scatter",
        "use_grad_accum_attribute",
        "zero_grad",
    )
    groups = "bit16_groups"

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        # stage 1: wide sums are in p.grad_accum
        self._own_attribute = self.optimizer.use_grad_accum_attribute
        if self._own_attribute:
            self._wide = None
        self._reduced: dict[int, Tensor] = {}
        self._handing_over = False

    def dtype(self, parameter: Tensor) -> torch.dtype:
        own = self.optimizer.gradient_accumulation_dtype if self._own_attribute else None
        return own or super().dtype(parameter)

    def install(self, end_of_backward: Callable[..., None], reduce: Callable[..., None]) -> None:
        self._flush = self.engine._flush_coalesced_reduction_zero12
        super().install(end_of_backward, reduce)
        # the way of whole buckets, which passes through the next line
        self.optimizer.reduce_scatter = False
        self.optimizer.gradient_reduction_w_predivide = self._reduced_bucket

    def collect(self, boundary: bool) -> None:
        super().collect(boundary)
        if self._own_attribute:
            self.optimizer.fill_grad_accum_attribute()

    def gradients(self) -> Gradients:
        gradients = super().gradients()
        return [p.grad_accum for p in self.parameters] if self._own_attribute else gradients  # type: ignore[attr-defined]

    def hand_over(self, gradients: Gradients) -> None:
        for p, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                if not self.optimizer.cpu_offload:
                    continue
                # DeepSpeed leaves the last step's gradient in its buffer on the CPU
                # where there is none now, NaN of a skipped step included, and applies
                # it again. Zero is what the other stages use.
                gradient = torch.zeros(p.shape, dtype=self.dtype(p), device=self.device)
            if self._own_attribute:
                p.grad_accum = gradient  # type: ignore[attr-defined]
            elif self._wide is not None:
                self._reduced[id(p)], p.grad = gradient, gradient.to(p.dtype)
            else:
                p.grad = gradient
        self._sums.clear()
        # Overwrite also what is left of gradients that were dropped: the micro-steps
        # are summed already.
        self.optimizer.micro_step_id = _NO_MICRO_STEP
        for kept in (self.optimizer.averaged_gradients, self.optimizer.all_grad_tensors):
            kept.update(dict.fromkeys(kept))
        self._handing_over, self.optimizer._coalesce_grad_reduction = True, False
        try:
            self._flush(self.optimizer)
        finally:
            self._handing_over, self.optimizer._coalesce_grad_reduction = False, True
            self._reduced.clear()

    def _reduced_bucket(self, tensor: Tensor, communication_data_type: torch.dtype) -> Tensor:
        """Take the place of the all-reduce of a bucket. What is returned goes into the
        fp32 partition, if there is one.
        """
        if not self._handing_over:
            unreduced()
        if self._wide is None:
            return tensor
        groups = self.optimizer.bit16_groups
        bucket = self.optimizer.ipg_buckets[communication_data_type]
        return torch.cat([self._reduced[id(groups[i][j])].reshape(-1) for i, j, _ in bucket.params])


class PartitionedParameters(ZeroGradients):
    """Stage 3: each rank gets its part of every gradient through the method that ends
    DeepSpeed's own reduction.
    """

    needs = (
        *ZeroGradients.needs,
        "fp16_groups",
        "independent_gradient_partition_epilogue",
        "micro_step_id",
        "partition_grads",
        "reduce_and_partition_stream",
        "zero_grad",
        "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads",
        "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads",
        "_get_param_partition_rank",
        "_get_param_partition_world_size",
    )
    groups = "fp16_groups"

    def replicas(self) -> Replicas:
        # every rank holds other parts
        return dataclasses.replace(super().replicas(), parameters={}, state={})

    def install(self, end_of_backward: Callable[..., None], reduce: Callable[..., None]) -> None:
        super().install(end_of_backward, reduce)
        self.optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = unreduced
        self.optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads = unreduced

    def hand_over(self, gradients: Gradients) -> None:
        optimizer, accelerator = self.optimizer, get_accelerator()
        # overwrite the partitions: the micro-steps are summed already
        optimizer.micro_step_id = 0
        parts = [
            self._part(p, gradient) for p, gradient in zip(self.parameters, gradients, strict=True)
        ]
        if not accelerator.resolves_data_dependency():
            optimizer.reduce_and_partition_stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(optimizer.reduce_and_partition_stream):
            optimizer.partition_grads(self.parameters, parts)
        # waits for that stream
        optimizer.independent_gradient_partition_epilogue()
        # the end of a user's own coalesce_grad_reduction() has cleared it
        optimizer._coalesce_grad_reduction = True
        self._sums.clear()

    def _part(self, parameter: Tensor, gradient: Tensor | None) -> Tensor:
        """Return this rank's part of a gradient: ceil(numel / world) elements, fewer or
        none at the end.

        DeepSpeed keeps the last step's part where a parameter has no gradient now; zero
        is what stages 0 to 2 use.
        """
        world = self.optimizer._get_param_partition_world_size(parameter)
        numel = math.prod(shape(parameter))
        size = math.ceil(numel / world)
        start = min(self.optimizer._get_param_partition_rank(parameter) * size, numel)
        stop = min(start + size, numel)
        if gradient is None:
            return torch.zeros(stop - start, dtype=self.dtype(parameter), device=self.device)
        return gradient.reshape(-1)[start:stop]
