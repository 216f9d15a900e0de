"""PyTorch DDP: `optimizer.attach(ddp_model)`.

DDP keeps everything but the all-reduce. A communication hook hands each bucket back at
once, without a collective; so gradients stay this worker's own, while DDP rebuilds
buckets, finds unused parameters, broadcasts buffers and learns a static graph as
before. The reduction runs over `p.grad` when DDP has finished the backward pass: a
callback that is queued from within a callback comes after DDP's own, which copies the
buckets back.

Accumulation: a backward pass whose forward ran within `ddp.no_sync()` only accumulates.
`ddp.join()` works: a rank whose data are exhausted is asked by DDP to run the hook on
zeros, and takes part in the reduction without gradients.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.debugging_hooks import noop_hook
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel
from typing_extensions import override

from lowrank_comm.communication.topology import covered_ranks
from lowrank_comm.errors import ConfigError, UnsupportedError
from lowrank_comm.optimizer.engine import Engine, kept_local

# Not on the model, which people copy and pickle.
_hooks: weakref.WeakKeyDictionary[DistributedDataParallel, _Hook] = weakref.WeakKeyDictionary()

_MAP = "_match_unused_params_allreduce"
_TELLS = "_lowrank_comm"


class DDPEngine(Engine):
    """A model wrapped by DistributedDataParallel.

    Args:
        ddp: the wrapper.
        process_group: the workers; None for DDP's own group.
        shard_scope: see `Engine`.

    Raises:
        UnsupportedError: DDP has a communication hook already, or its own mixed
            precision.
    """

    name = "DDP"
    reduces_at = "backward"
    accumulates_by = "with model.no_sync(): loss = model(inputs); loss.backward()"

    def __init__(self, ddp: DistributedDataParallel, process_group: Any, shard_scope: str) -> None:
        super().__init__(ddp.process_group if process_group is None else process_group, shard_scope)
        self._ddp, self._syncs = ddp, True
        self.kept_local = kept_local(ddp)
        self._on_join: Callable[[], Callable[[], None] | None] = lambda: None
        self._forward = ddp.register_forward_pre_hook(_BeforeForward(self))
        # With find_unused_parameters a joined rank has one collective more after its
        # buckets, DDP's map of used parameters; other ranks have that during backward,
        # hence before our pass.
        self._after_the_map = ddp.find_unused_parameters and hasattr(ddp, _MAP)
        if self._after_the_map:
            _tell_of_the_map()
        _hook_of(ddp).engine = weakref.ref(self)

    def before_forward(self) -> None:
        """Remember whether DDP reduces in the next backward pass, which it decides
        now.
        """
        if torch.is_grad_enabled():
            self._syncs = bool(self._ddp.require_backward_grad_sync)

    def map_is_done(self) -> None:
        """Take part after DDP's collective of the map of used parameters."""
        if self._after_the_map:
            self._take_part()

    @override
    def is_last_backward(self) -> bool:
        return self._syncs

    @property
    @override
    def begins_early(self) -> bool:
        # it all-reduces which parameters were used, during backward
        return not self._ddp.find_unused_parameters

    @override
    def on_join(self, take_part: weakref.WeakMethod[Callable[[], None]]) -> None:
        self._on_join = take_part

    def _take_part(self) -> None:
        take_part = self._on_join()
        if take_part is not None:
            take_part()

    def bucket(self, bucket: dist.GradBucket) -> None:
        """Note that DDP is done with a bucket. Outside of a backward pass this rank has
        joined, and takes part in the reduction now.
        """
        if torch._C._current_graph_task_id() != -1 or not bucket.is_last() or self._after_the_map:
            return
        if self._ddp.find_unused_parameters:
            raise UnsupportedError(
                f"join() with find_unused_parameters=True: DDP of torch {torch.__version__} does"
                " not tell when a joined rank may take part. It is tested with torch 2.13; leave"
                " one of the two out."
            )
        self._take_part()

    @override
    def release(self) -> None:
        """Let DDP reduce by itself again."""
        self._forward.remove()
        _hook_of(self._ddp).engine = None

    @override
    def notes(self) -> list[str]:
        notes = [
            "DDP: its own all-reduce is off; gradients are averaged when the backward pass has"
            " ended"
        ]
        if self.kept_local:
            notes.append(
                f"{len(self.kept_local)} parameters that DDP was told to ignore keep each rank's"
                " own gradients"
            )
        if not self.begins_early:
            notes.append(
                "find_unused_parameters=True has a collective during backward: overlap=True starts"
                " nothing early"
            )
        return notes


class _BeforeForward:
    """The hook before DDP's forward. A copy of the model has one without an engine.

    A strong reference would let the model keep the engine alive, and DDP would never
    reduce again.
    """

    def __init__(self, engine: DDPEngine | None = None) -> None:
        self._engine = weakref.ref(engine) if engine is not None else lambda: None

    def __call__(self, *_: Any) -> None:
        engine = self._engine()
        if engine is not None:
            engine.before_forward()

    def __reduce__(self) -> tuple[type[_BeforeForward], tuple[()]]:
        return type(self), ()


class _Hook:
    """The communication hook of one DDP model, which stays registered: DDP takes one
    hook only. Without an engine it averages as DDP does. DDP also keeps it in a list
    that a copy of the model gets, but does not use.
    """

    def __init__(self, group: Any = None) -> None:
        self.engine: weakref.ref[DDPEngine] | None = None
        self._group = group

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return type(self), ()

    @property
    def in_use_by(self) -> DDPEngine | None:
        """The engine that takes the gradients, while there is one."""
        return self.engine() if self.engine is not None else None

    def __call__(self, bucket: dist.GradBucket) -> Future[Tensor]:
        engine = self.in_use_by
        if engine is None:
            # None is the default group to it
            return allreduce_hook(self._group, bucket)  # type: ignore[arg-type]
        engine.bucket(bucket)
        return noop_hook(None, bucket)


def _lowrank_comm_hook(state: _Hook, bucket: dist.GradBucket) -> Future[Tensor]:
    return state(bucket)


# DDP asks for this very annotation, as an object and not as text.
_lowrank_comm_hook.__annotations__ = {"bucket": dist.GradBucket, "return": Future[Tensor]}


def _hook_of(ddp: DistributedDataParallel) -> _Hook:
    """Return our hook on a DDP model; the first call registers it."""
    hook = _hooks.get(ddp)
    if hook is None:
        hook = _Hook(ddp.process_group)
        try:
            ddp.register_comm_hook(hook, _lowrank_comm_hook)
        except RuntimeError as error:
            raise UnsupportedError(
                f"attach: this DistributedDataParallel has a communication hook already ({error});"
                " remove register_comm_hook, or wrap the model again."
            ) from None
        _hooks[ddp] = hook
    return hook


def _tell_of_the_map() -> None:
    """Let DDP tell an engine when its collective of the map of used parameters is done;
    once for all models, and not on one of them, which people copy and pickle.
    """
    original = getattr(DistributedDataParallel, _MAP)
    if hasattr(original, _TELLS):
        return

    @functools.wraps(original)
    def match(ddp: DistributedDataParallel) -> None:
        original(ddp)
        hook = _hooks.get(ddp)
        engine = hook.in_use_by if hook is not None else None
        if engine is not None:
            engine.map_is_done()

    setattr(match, _TELLS, True)
    setattr(DistributedDataParallel, _MAP, match)


def connect(model: nn.Module, process_group: Any, shard_scope: str) -> Engine:
    """Return the engine of a model that is, or holds, a DistributedDataParallel.

    Raises:
        UnsupportedError: it holds several, or something of it that cannot go with
            compression.
        ConfigError: process_group has other ranks than DDP.
    """
    found = [module for module in model.modules() if isinstance(module, DistributedDataParallel)]
    if len(found) > 1:
        raise UnsupportedError(
            f"attach: the model holds {len(found)} DistributedDataParallel modules; wrap the whole"
            " model once."
        )
    ddp = found[0]
    ours = dist.get_process_group_ranks(ddp.process_group)
    if process_group is not None and sorted(covered_ranks(process_group)) != sorted(ours):
        raise ConfigError(
            f"attach: process_group covers the ranks {covered_ranks(process_group)},"
            f" DistributedDataParallel the ranks {ours}: the others would train on by themselves."
            " Leave process_group out, or give the whole 2-D mesh for two levels."
        )
    if getattr(ddp, "mixed_precision", None) is not None:
        raise UnsupportedError(
            "attach: DistributedDataParallel(mixed_precision=...) reduces in a hook of its own; use"
            " torch.autocast."
        )
    if getattr(ddp, "_use_python_reducer", False):
        raise UnsupportedError(
            'attach: torch._dynamo.config.optimize_ddp="python_reducer" makes'
            " DistributedDataParallel average each gradient by itself, in compiled autograd, past"
            ' a communication hook. Leave it at its default, "ddp_optimizer", and wrap the model'
            " again."
        )
    return DDPEngine(ddp, process_group, shard_scope)
