"""Connecting an optimizer to whatever runs the model, and giving the model back."""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lowrank_comm.compressors.base import Compressor
from lowrank_comm.errors import ConfigError
from lowrank_comm.optimizer.backward_hooks import BackwardWatch
from lowrank_comm.optimizer.engine import Engine, connect, wrapper_of
from lowrank_comm.optimizer.grad_scaler import LossScaling
from lowrank_comm.optimizer.lazy_reducer import LazyReducer
from lowrank_comm.optimizer.parameter_names import Namer
from lowrank_comm.reduction.plan import Plan

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = (
    weakref.WeakKeyDictionary()
)
"""Wrapped model -> the optimizer that it is attached to."""
AVERAGES = "_lowrank_comm_averages"
"""Attribute of the base: the optimizer that averages its gradients at the end of
backward. Whoever holds the base alone, as some engines do, keeps both, or the workers
would drift apart without a word; and who holds neither, keeps nothing.
"""


class Attachment(LazyReducer):
    """An optimizer whose gradients come from an engine: that of a plain model, until
    `attach` finds another.

    Args:
        base, compressor, namer, options, bucket_bytes: see `LazyReducer`.
        process_group, shard_scope: of the engine, as the user gave them.
    """

    def __init__(
        self,
        base: Optimizer,
        compressor: Compressor,
        process_group: Any,
        shard_scope: str,
        namer: Namer,
        options: dict[str, Any],
        bucket_bytes: int | None,
    ) -> None:
        super().__init__(
            base, compressor, Engine(process_group, shard_scope), namer, options, bucket_bytes
        )
        self._process_group, self._shard_scope = process_group, shard_scope
        self._scaling = LossScaling(id(self))
        self._watch: BackwardWatch | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None
        self._detached = False
        self._told_last: Callable[[], bool] | None = None
        self._asked_reduce_at: str | None = None

    @abstractmethod
    def _take_part_without_gradients(self) -> None:
        """A pass of the other workers, when this one's data are exhausted."""

    def attach(
        self,
        model: nn.Module,
        scaler: Any = None,
        is_last_backward: Callable[[], bool] | None = None,
    ) -> Plan:
        """Connect to whatever runs the model, take the parameters' names from it, and
        tell the plan; rank 0 prints it.

        Under DDP and FSDP2 the engine's own averaging of gradients (under HSDP that
        between nodes) is switched off, and ours takes its place. For a plain model this
        is optional.

        Args:
            model: the one whose parameters the base optimizes, wrapped as it is
                trained.
            scaler: a `torch.amp.GradScaler`, so that an overflow on one worker lowers
                the scale on all.
            is_last_backward: for loops that accumulate gradients and know by themselves
                which backward pass is the last of a step, such as Accelerate's and
                Trainer's: called at the end of each. Gradients are then averaged at the
                end of the last one, for a plain model too.

        Returns:
            What was found, what goes low-rank and what dense, bytes a step, memory.

        Raises:
            UnsupportedError: the model is wrapped in a way that cannot be compressed;
                the message names the way out.
            ConfigError: the optimizer and the model do not hold the same parameters, or
                groups do not fit.
        """
        if is_last_backward is not None and self._asked_reduce_at == "step":
            raise ConfigError(
                'attach: reduce_at="step" averages gradients after whoever clips them before'
                " step(), as Accelerate and Trainer do; leave reduce_at out. (is_last_backward says"
                " when a backward pass is the last one of its step.)"
            )
        wrapper = wrapper_of(model)
        self._check_parameters(model, wrapper)
        self._told_last = is_last_backward
        if wrapper is not None:
            self._connect(wrapper, model)
        else:
            # watched anew, since it may have been said only now that gradients are
            # averaged at the end of backward
            is_plain = type(self._engine) is Engine and not self._detached
            self._stop_watching()
            self._take(
                self._engine if is_plain else Engine(self._process_group, self._shard_scope), model
            )
        self._namer.learn(model.named_parameters())
        self._scaling.attach(scaler)
        plan = self.plan
        if self.reducer.workers.is_writer:
            print(plan, flush=True)
        return plan

    def _connect(self, wrapper: str, model: nn.Module) -> None:
        """Let the engine of a wrapped model take the place of that of a plain one."""
        if self._reducer is not None and self._reducer.state.has_passed:
            raise ConfigError(
                "attach: the optimizer has made steps already; call attach(model) before the first"
                " one."
            )
        if self._reducer is not None and self._reducer.step > 0:
            raise ConfigError(
                "attach: a state was loaded into the optimizer already, and its error memory would"
                " be lost; load the state dict after attach (with Accelerate and Trainer, after"
                " prepare: load_state, resume_from_checkpoint)."
            )
        other = _attached[model]() if model in _attached else None
        if other is not None and other is not self:
            raise ConfigError(
                "attach: this model is attached to another CompressedOptimizer already, and would"
                " be given back when one of them is detached. Use parameter groups of one"
                " optimizer, or call detach() on the other one first."
            )
        # first: what an earlier engine gives back must not be what the next one has
        # taken
        self.detach()
        engine = connect(wrapper, model, self._process_group, self._shard_scope)
        if self._bucket_bytes is not None and not engine.can_overlap:
            engine.release()
            raise ConfigError(f"overlap=True is not possible with {engine.name}; leave it out.")
        self._reducer, _attached[model] = None, weakref.ref(self)
        self._take(engine, model)
        engine.on_join(weakref.WeakMethod(self._take_part_without_gradients))
        # an optimizer that is gone leaves the model to its engine
        self._finalizer = weakref.finalize(self, engine.release)
        self._finalizer.atexit = False

    def _take(self, engine: Engine, model: nn.Module) -> None:
        """From now on gradients come from this engine."""
        self._detached, self._engine, self._model = False, engine, weakref.ref(model)
        self._watch_backward()

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        if vars(self.base).get(AVERAGES) is self:
            del vars(self.base)[AVERAGES]

    def is_attached_to(self, model: nn.Module) -> bool:
        """Whether `attach` was called with this very model, and `detach` not since."""
        return not self._detached and self._model is not None and self._model() is model

    def detach(self) -> None:
        """Take the hooks off the parameters, for another optimizer to hold them, and
        give the model back to its engine: nothing is averaged at the end of backward
        any more, only in `step()` and `reduce_gradients()`.
        """
        self._stop_watching()
        if self._finalizer is not None:
            self._finalizer()
            self._finalizer = None
        model = self._model() if self._model is not None else None
        if model is not None and model in _attached and _attached[model]() is self:
            del _attached[model]
        self._detached = True
