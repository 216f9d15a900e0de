"""DeepSpeed's private surface: the names that the adapter needs, and where gradients
wait.

DeepSpeed averages gradients in different ways at each ZeRO stage. All of them start at
one method, `engine.allreduce_gradients()`, which the engine calls at the end of every
backward, whether that was `engine.backward(loss)` or `loss.backward()`. It is replaced:
before the accumulation boundary it only accumulates; there it hands all local gradients
to the reducer at once, and then the result to DeepSpeed.

ZeRO also averages earlier, from hooks on single parameters. DeepSpeed has a switch that
keeps these hooks still, made for its `coalesce_grad_reduction()`; it stays on, so full
local gradients wait on the parameters until the boundary. Everything that DeepSpeed
would average with otherwise is replaced by a function that raises, so that nothing is
reduced twice and nothing is silently left unreduced.

A `GradientStore` does this for one kind of optimizer wrapper: `whole` has those of
wrappers with whole gradients, `zero` those of ZeRO. Private names of DeepSpeed are
touched in these three files only, and by `adapter` and `initialization` on the engine;
`check` looks for all of them when an engine is attached.
"""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from torch import Tensor

from lowrank_comm.errors import UnsupportedError
from lowrank_comm.reduction.divergence import Replicas

TESTED = "0.19.8"
"""Version of DeepSpeed that the tests ran with."""

# methods of the engine that are called or replaced, and attributes that are read
ENGINE = (
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
ENGINE_STATE = (
    "module",
    "optimizer",
    "global_steps",
    "seq_data_parallel_group",
    "_config",
    "_step_applied",
)

Gradients = list[Tensor | None]


def check(owner: Any, names: Sequence[str], what: str) -> None:
    """Raise UnsupportedError, with the version, if `owner` lacks one of the names."""
    # An engine passes unknown names on to the user's model, so what counts is its class
    # and its own dictionary.
    missing = [name for name in names if not hasattr(type(owner), name) and name not in vars(owner)]
    if missing:
        raise UnsupportedError(
            f"lowrank_comm: {what} of DeepSpeed {deepspeed.__version__} has no"
            f" {', '.join(missing)}, which the adapter needs. It is tested with DeepSpeed {TESTED};"
            " install that, or remove the 'lowrank_comm' section."
        )


def does_not_train(engine: Any) -> bool:
    """Return whether an engine has no optimizer."""
    optimizer = engine.optimizer
    without = ("DummyOptim", "DeepSpeedZeRoOffload")
    return (
        optimizer is None
        or type(optimizer).__name__ in without
        or not getattr(optimizer, "using_real_optimizer", True)
    )


def shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter; under ZeRO-3 the tensor itself may be
    empty.
    """
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def unreduced(*args: Any, **kwargs: Any) -> NoReturn:
    """Raise: this stands where DeepSpeed would average gradients by itself."""
    raise UnsupportedError(
        "lowrank_comm: DeepSpeed was about to average gradients by itself, past the compressed"
        " reduction, which runs at the end of the last backward before engine.step(). Use"
        " engine.backward(loss), or loss.backward() on what the engine's forward returned, and then"
        " engine.step()."
    )


class GradientStore(ABC):
    """Where the gradients of one kind of optimizer wrapper wait, and how the averaged
    ones are handed over.

    Attributes:
        named, parameters: all trained parameters, with names and without, in the same
            order on all ranks.
        needs: names that the optimizer must have.
        groups: the one of them that holds the groups of parameters whose gradients
            DeepSpeed would average; None for all that require a gradient.
        refused: of what `gradients` has found, place of a parameter -> what cannot be
            averaged; see `RowScatter`.
    """

    refused: Mapping[int, str] = MappingProxyType({})
    needs: tuple[str, ...] = ()
    groups: str | None = None

    def __init__(self, engine: Any) -> None:
        self.engine, self.optimizer = engine, engine.optimizer
        check(self.optimizer, self.needs, type(self.optimizer).__name__)
        self.named: list[tuple[str, Tensor]] = [
            (name, p)
            for name, p in engine.module.named_parameters()
            if p.requires_grad and math.prod(shape(p)) > 0
        ]
        if self.groups is not None:
            trained = {id(p) for group in getattr(self.optimizer, self.groups) for p in group}
            self.named = [(name, p) for name, p in self.named if id(p) in trained]
        self.parameters = [p for _, p in self.named]

    @property
    def device(self) -> torch.device:
        """Where gradients are computed; parameters may be elsewhere."""
        return torch.device(get_accelerator().current_device_name())

    @property
    def loss_scale(self) -> float:
        """Factor that the gradients carry now; it changes over time in fp16."""
        return float(getattr(self.optimizer, "loss_scale", 1.0) or 1.0)

    def replicas(self) -> Replicas:
        """Return the parameters that every rank holds, and the optimizer's state of
        them where every rank holds that, too: not the parts of ZeRO.
        """
        by_torch = isinstance(self.optimizer, torch.optim.Optimizer)
        state = self.optimizer.state if by_torch else {}
        return Replicas(
            dict(self.named),
            True,
            self.optimizer.param_groups,
            {name: state[p] for name, p in self.named if p in state},
        )

    def check_replicas(self, on_divergence: str) -> None:  # noqa: B027 - nothing to refuse
        """Refuse an `on_divergence` that cannot be carried out."""

    def dtype(self, parameter: Tensor) -> torch.dtype:
        """Return the dtype in which this parameter's gradient is accumulated."""
        return parameter.dtype

    def install(self, end_of_backward: Callable[..., None], reduce: Callable[..., None]) -> None:
        """Put our functions in the place of DeepSpeed's on this engine.

        Args:
            end_of_backward: called after each backward.
            reduce: called where DeepSpeed wants the reduction now, at any micro-step.
        """
        self.engine.allreduce_gradients = end_of_backward
        self.engine.buffered_allreduce_fallback = unreduced

    def collect(self, boundary: bool) -> None:  # noqa: B027 - most have nothing to do here
        """Note the boundary after each backward, and accumulate what DeepSpeed leaves
        to its hooks.
        """

    @abstractmethod
    def gradients(self) -> Gradients:
        """Return the local gradients, accumulated over the micro-steps, one for each
        parameter; None where there is none.
        """

    @abstractmethod
    def hand_over(self, gradients: Gradients) -> None:
        """Give the averaged gradients to DeepSpeed; None where no worker had one."""

    def drop(self) -> None:  # noqa: B027 - gradients on the parameters only are dropped there
        """Forget what was collected: the user has dropped the gradients."""

    def step(self, applied: bool) -> contextlib.AbstractContextManager[None]:
        """Let `_take_model_step`, called inside the block, leave the parameters as they
        are and count a skipped step, unless the pass was applied. Most wrappers find
        the NaN of a veto and do that by themselves.
        """
        return contextlib.nullcontext()
