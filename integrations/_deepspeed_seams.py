"""The one place that touches DeepSpeed's private surface: where gradients wait, and how reduced ones are handed over.

DeepSpeed averages gradients in different ways at each ZeRO stage. All of them start at one method, which the engine calls
at the end of every backward, whether that was `engine.backward(loss)` or `loss.backward()`:

    engine.allreduce_gradients()    replaced: does nothing but collect before the accumulation boundary, and there hands
                                    all local gradients to the reducer at once, then the result to DeepSpeed

ZeRO also averages earlier, from hooks on single parameters. DeepSpeed has a switch that keeps these hooks still, made
for its `coalesce_grad_reduction()`; it stays on, so full local gradients wait on the parameters until the boundary.
Everything that DeepSpeed would average with otherwise is replaced by a function that raises, so that nothing is reduced
twice and nothing is silently left unreduced.

A `Seam` is one kind of optimizer wrapper. It is chosen by what the wrapper can do, not by the stage's number: ZeRO-1 in
bfloat16 with fp32 accumulation is no ZeRO optimizer, for example.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import deepspeed
import deepspeed.runtime.utils
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from lowrank_comm.errors import UnsupportedError

TESTED = "0.19.8"
"""Versions of DeepSpeed that the tests ran with."""

_ENGINE = (
    "allreduce_gradients",
    "buffered_allreduce_fallback",
    "is_gradient_accumulation_boundary",
    "load_checkpoint",
    "save_checkpoint",
    "zero_optimization_stage",
    "_flush_coalesced_reduction_zero12",
    "_flush_coalesced_reduction_zero3",
    "_take_model_step",
)
_ENGINE_STATE = ("module", "optimizer", "global_steps", "seq_data_parallel_group", "_config", "_step_applied")

Gradients = list[Tensor | None]

_NO_MICRO_STEP = -1  # ZeRO-1/2's count of micro-steps before the first


def check(owner: Any, names: Sequence[str], what: str) -> None:
    """UnsupportedError naming the version if `owner` lacks one of the attributes."""
    # An engine passes unknown names on to the user's model, so what counts is its class and its own dictionary.
    missing = [name for name in names if not hasattr(type(owner), name) and name not in vars(owner)]
    if missing:
        raise UnsupportedError(
            f"lowrank_comm: {what} of DeepSpeed {deepspeed.__version__} has no {', '.join(missing)}, which the adapter "
            f"needs. It is tested with DeepSpeed {TESTED}; install that, or remove the 'lowrank_comm' section."
        )


def does_not_train(engine: Any) -> bool:
    """Whether an engine has no optimizer."""
    optimizer = engine.optimizer
    without = ("DummyOptim", "DeepSpeedZeRoOffload")
    return optimizer is None or type(optimizer).__name__ in without or not getattr(optimizer, "using_real_optimizer", True)


def choose(engine: Any) -> Seam | None:
    """The seam of a live engine; None for an engine that does not train (no optimizer)."""
    optimizer = engine.optimizer
    if does_not_train(engine):
        return None
    check(engine, (*_ENGINE, *_ENGINE_STATE), "the engine")
    # Before this function existed, ZeRO in fp32 and stage 3 in any dtype applied steps whose gradients were NaN.
    check(deepspeed.runtime.utils, ("is_invalid_grad_norm",), "deepspeed.runtime.utils")
    if hasattr(optimizer, "fp32_groups_gradients"):
        return FloatViews(engine)
    if hasattr(optimizer, "gradient_reduction_w_predivide"):
        return PartitionedGradients(engine)
    if hasattr(optimizer, "partition_grads"):
        return PartitionedParameters(engine)
    if int(engine.zero_optimization_stage()) == 0:
        return PlainGradients(engine)
    raise UnsupportedError(
        f"lowrank_comm: DeepSpeed {deepspeed.__version__} uses {type(optimizer).__name__} here, which the adapter does "
        f"not know. It is tested with DeepSpeed {TESTED}; remove the 'lowrank_comm' section, or use another stage."
    )


def process_group(engine: Any) -> Any:
    """The workers whose gradients DeepSpeed averages."""
    return engine.seq_data_parallel_group


class Seam(ABC):
    """One kind of optimizer wrapper: where its gradients wait, and how reduced ones are handed over.

    Attributes:
        names, parameters: of everything that is trained, in the same order on all ranks.
        needs: names that the optimizer must have.
        skips_by_itself: DeepSpeed's own step finds NaN in the gradients and skips.
    """

    needs: tuple[str, ...] = ()
    skips_by_itself = True

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        check(self.optimizer, self.needs, type(self.optimizer).__name__)
        trained = self._trained()
        named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad and numel(p) > 0]
        if trained is not None:
            named = [(name, p) for name, p in named if id(p) in trained]
        self.names = [name for name, _ in named]
        self.parameters: list[Tensor] = [p for _, p in named]

    @property
    def description(self) -> str:
        """For the report at the start."""
        return f"ZeRO stage {int(self.engine.zero_optimization_stage())} ({type(self.optimizer).__name__})"

    @property
    def device(self) -> torch.device:
        """Where gradients are computed; parameters may be elsewhere."""
        return torch.device(get_accelerator().current_device_name())

    @property
    def loss_scale(self) -> float:
        """What the gradients are multiplied by at this moment; changes over time in fp16."""
        return float(getattr(self.optimizer, "loss_scale", 1.0) or 1.0)

    def dtype(self, parameter: Tensor) -> torch.dtype:
        """Dtype in which this parameter's gradient is accumulated."""
        return parameter.dtype

    def install(self, end_of_backward: Callable[..., None], reduce: Callable[..., None]) -> None:
        """Put our functions in the place of DeepSpeed's on this engine.

        Args:
            end_of_backward: called after each backward.
            reduce: called where DeepSpeed wants the reduction now, whatever the micro-step.
        """
        self.engine.allreduce_gradients = end_of_backward
        self.engine.buffered_allreduce_fallback = unreduced

    def collect(self, boundary: bool) -> None:  # noqa: B027 - most seams have nothing to do here
        """After each backward: take note of the boundary, and accumulate what DeepSpeed leaves to its hooks."""

    @abstractmethod
    def gradients(self) -> Gradients:
        """Local gradients, accumulated over the micro-steps, one for each parameter; None where there is none."""

    @abstractmethod
    def hand_over(self, gradients: Gradients) -> None:
        """Give the reduced gradients to DeepSpeed; None means that no worker had one."""

    @abstractmethod
    def _trained(self) -> set[int] | None:
        """Ids of the parameters whose gradients DeepSpeed would average; None for all that require a gradient."""

    def drop(self) -> None:  # noqa: B027 - where gradients are on the parameters only, they are dropped there
        """The user has dropped the gradients: forget what was collected of them."""

    def before_step(self) -> None:  # noqa: B027 - most seams have nothing to do here
        """Before each step of the engine."""

    def skipped_step(self) -> contextlib.AbstractContextManager[None]:
        """Inside, `_take_model_step` leaves the parameters as they are and counts a skipped step."""
        return contextlib.nullcontext()


class PlainGradients(Seam):
    """Stage 0: `p.grad`, read by a torch optimizer or by DeepSpeed's fp16/bf16 wrapper of one."""

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        # The engine asks its optimizer for `overflow` after each step. A torch optimizer has none, so an fp32 engine would
        # never skip; with it, the engine does the bookkeeping of a skipped step as at other stages.
        self.skips_by_itself = not isinstance(self.optimizer, torch.optim.Optimizer)
        self.before_step()

    def _trained(self) -> None:
        return None

    def before_step(self) -> None:
        if not self.skips_by_itself:
            self.optimizer.overflow = False

    def gradients(self) -> Gradients:
        known = {id(p) for p in self.parameters}
        for name, p in self.engine.module.named_parameters():
            if p.grad is not None and p.requires_grad and id(p) not in known:
                raise UnsupportedError(
                    f"lowrank_comm: parameter {name!r} was frozen when deepspeed.initialize ran and has a gradient now, "
                    "which nobody would average. Unfreeze parameters before deepspeed.initialize."
                )
        return [p.grad for p in self.parameters]

    def hand_over(self, gradients: Gradients) -> None:
        for p, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:
                p.grad = torch.zeros_like(p)  # as DeepSpeed does: the optimizer's step counts for this parameter too
            elif gradient is not p.grad:
                p.grad = gradient

    @contextlib.contextmanager
    def skipped_step(self) -> Iterator[None]:
        step, own = self.optimizer.step, "step" in vars(self.optimizer)  # a scheduler of torch sets it on the instance
        self.optimizer.overflow, self.optimizer.step = True, lambda *args, **kwargs: None
        try:
            yield
        finally:  # `overflow` stays until the next step: Accelerate asks for it after this one
            if own:
                self.optimizer.step = step
            else:
                del self.optimizer.step


class FloatViews(Seam):
    """`BF16_Optimizer` (stage 1, bfloat16, fp32 accumulation): 1-D views of a flat fp32 buffer."""

    needs = (
        "bf16_groups", "fp32_groups_gradients", "fp32_groups_has_gradients", "set_gradient_accumulation_boundary",
        "clear_hp_grads",
    )  # fmt: skip

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        place = {id(p): (i, j) for i, group in enumerate(self.optimizer.bf16_groups) for j, p in enumerate(group)}
        self._places = [place[id(p)] for p in self.parameters]

    def _trained(self) -> set[int]:
        return {id(p) for group in self.optimizer.bf16_groups for p in group}

    def dtype(self, parameter: Tensor) -> torch.dtype:
        return self.optimizer.fp32_groups_gradients[0][0].dtype

    def drop(self) -> None:
        self.optimizer.clear_hp_grads()

    def collect(self, boundary: bool) -> None:
        self.optimizer.set_gradient_accumulation_boundary(boundary)

    def gradients(self) -> Gradients:
        views, present = self.optimizer.fp32_groups_gradients, self.optimizer.fp32_groups_has_gradients
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
            # The norm is taken over the flagged ones, so the flags must be the same on all ranks.
            self.optimizer.fp32_groups_has_gradients[i][j] = True
            p._hp_grad = view  # type: ignore[attr-defined]


class ZeroSeam(Seam):
    """What the ZeRO optimizers of stages 1 to 3 share: hooks kept still, and accumulation in a wider dtype if asked for."""

    needs: tuple[str, ...] = (
        "_coalesce_grad_reduction",
        "set_gradient_accumulation_boundary",
        "gradient_accumulation_dtype",
    )

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        wide = self.optimizer.gradient_accumulation_dtype
        # DeepSpeed adds reduced micro-step gradients in this dtype. Here they are added before the reduction, and p.grad
        # has the parameter's dtype, so a wider sum needs a place of its own.
        self._wide = wide if wide == torch.float32 and any(p.dtype != wide for p in self.parameters) else None
        self._sums: dict[int, Tensor] = {}

    def dtype(self, parameter: Tensor) -> torch.dtype:
        return self._wide or parameter.dtype

    def install(self, end_of_backward: Callable[..., None], reduce: Callable[..., None]) -> None:
        super().install(end_of_backward, reduce)
        self.optimizer._coalesce_grad_reduction = True
        # The end of a user's own `with engine.coalesce_grad_reduction()`, and of a step with caller-owned boundaries.
        self.engine._flush_coalesced_reduction_zero12 = self.engine._flush_coalesced_reduction_zero3 = reduce
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


class PartitionedGradients(ZeroSeam):
    """Stages 1 and 2: DeepSpeed's flush copies gradients into buckets, from which each rank cuts what it owns."""

    needs = (
        *ZeroSeam.needs, "bit16_groups", "ipg_buckets", "reduce_scatter", "use_grad_accum_attribute",
        "fill_grad_accum_attribute", "gradient_reduction_w_predivide", "zero_grad", "micro_step_id", "averaged_gradients",
        "all_grad_tensors", "cpu_offload",
    )  # fmt: skip

    def __init__(self, engine: Any) -> None:
        super().__init__(engine)
        self._own_attribute = self.optimizer.use_grad_accum_attribute  # stage 1: wide sums are in p.grad_accum
        if self._own_attribute:
            self._wide = None
        self._reduced: dict[int, Tensor] = {}
        self._handing_over = False

    def _trained(self) -> set[int]:
        return {id(p) for group in self.optimizer.bit16_groups for p in group}

    def dtype(self, parameter: Tensor) -> torch.dtype:
        return self.optimizer.gradient_accumulation_dtype if self._own_attribute else super().dtype(parameter)

    def install(self, end_of_backward: Callable[..., None], reduce: Callable[..., None]) -> None:
        self._flush = self.engine._flush_coalesced_reduction_zero12
        super().install(end_of_backward, reduce)
        self.optimizer.reduce_scatter = False  # the way of whole buckets, which passes through the next line
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
                # DeepSpeed leaves the last step's gradient in its buffer on the CPU where there is none now, NaN of a
                # skipped step included, and applies it again. Zero is what the other stages use.
                gradient = torch.zeros(p.shape, dtype=self.dtype(p), device=self.device)
            if self._own_attribute:
                p.grad_accum = gradient  # type: ignore[attr-defined]
            elif self._wide is not None:
                self._reduced[id(p)], p.grad = gradient, gradient.to(p.dtype)
            elif gradient is not p.grad:
                p.grad = gradient
        self._sums.clear()
        # Overwrite, whatever is left of gradients that were dropped: the micro-steps are summed already.
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
        """In place of the all-reduce of a bucket. What is returned goes into the fp32 partition, if there is one."""
        if not self._handing_over:
            unreduced()
        if self._wide is None:
            return tensor
        groups, bucket = self.optimizer.bit16_groups, self.optimizer.ipg_buckets[communication_data_type]
        return torch.cat([self._reduced[id(groups[i][j])].reshape(-1) for i, j, _ in bucket.params])


class PartitionedParameters(ZeroSeam):
    """Stage 3: each rank gets its part of every gradient through the method that ends DeepSpeed's own reduction."""

    needs = (
        *ZeroSeam.needs, "fp16_groups", "partition_grads", "independent_gradient_partition_epilogue", "micro_step_id",
        "reduce_and_partition_stream", "zero_grad", "_get_param_partition_rank", "_get_param_partition_world_size",
        "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads", "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads",
    )  # fmt: skip

    def _trained(self) -> set[int]:
        return {id(p) for group in self.optimizer.fp16_groups for p in group}

    def install(self, end_of_backward: Callable[..., None], reduce: Callable[..., None]) -> None:
        super().install(end_of_backward, reduce)
        self.optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads = unreduced
        self.optimizer._DeepSpeedZeroOptimizer_Stage3__avg_scatter_contiguous_grads = unreduced

    def hand_over(self, gradients: Gradients) -> None:
        optimizer, accelerator = self.optimizer, get_accelerator()
        optimizer.micro_step_id = 0  # overwrite the partitions: the micro-steps are summed already
        parts = [self._part(p, gradient) for p, gradient in zip(self.parameters, gradients, strict=True)]
        if not accelerator.resolves_data_dependency():
            optimizer.reduce_and_partition_stream.wait_stream(accelerator.current_stream())
        with accelerator.stream(optimizer.reduce_and_partition_stream):
            optimizer.partition_grads(self.parameters, parts)
        optimizer.independent_gradient_partition_epilogue()  # waits for that stream
        optimizer._coalesce_grad_reduction = True  # the end of a user's own coalesce_grad_reduction() has cleared it
        self._sums.clear()

    def _part(self, parameter: Tensor, gradient: Tensor | None) -> Tensor:
        """This rank's part of a gradient: ceil(numel / world) elements, fewer or none at the end.

        DeepSpeed keeps the last step's part where a parameter has no gradient now; zero is what stages 0 to 2 use.
        """
        world = self.optimizer._get_param_partition_world_size(parameter)
        size = math.ceil(numel(parameter) / world)
        start = min(self.optimizer._get_param_partition_rank(parameter) * size, numel(parameter))
        stop = min(start + size, numel(parameter))
        if gradient is None:
            return torch.zeros(stop - start, dtype=self.dtype(parameter), device=self.device)
        return gradient.reshape(-1)[start:stop]


def numel(parameter: Tensor) -> int:
    """Elements of the whole parameter; under ZeRO-3 the tensor itself may be empty."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def shape(parameter: Tensor) -> tuple[int, ...]:
    """Shape of the whole parameter."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def unreduced(*args: Any, **kwargs: Any) -> NoReturn:
    """Stands where DeepSpeed would average gradients by itself."""
    raise UnsupportedError(
        "lowrank_comm: DeepSpeed was about to average gradients by itself, past the compressed reduction, which runs at "
        "the end of the last backward before engine.step(). Use engine.backward(loss), or loss.backward() on what the "
        "engine's forward returned, and then engine.step()."
    )
