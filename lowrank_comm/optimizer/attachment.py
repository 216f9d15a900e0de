"""Connects an optimizer to the engine that runs its model, and gives the model back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from lowrank_comm.errors import ConfigError
from lowrank_comm.optimizer.backward_hooks import BackwardWatch
from lowrank_comm.optimizer.engine import Engine, connect, kept_local
from lowrank_comm.optimizer.grad_scaler import LossScaling
from lowrank_comm.optimizer.wrapper import OptimizerWrapper, parameters_of
from lowrank_comm.reduction.reducer import Reducer

_attached: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Attachment]] = (
    weakref.WeakKeyDictionary()
)
"""Wrapped model -> the attachment of the optimizer that it is attached to."""
AVERAGES = "_lowrank_comm_averages"
"""Attribute of the base: the optimizer that averages its gradients at the end of
backward. So the base keeps that optimizer alive: some engines hold the base alone, and
without averaging the workers would drift apart silently. When neither is held, both go.
"""


def _attachment_of(model: nn.Module) -> Attachment | None:
    there = _attached.get(model)
    return there() if there is not None else None


class Attachment:
    """Which engine an optimizer's gradients come from: that of a plain model, until a
    wrapped one is connected.

    Args:
        owner: the optimizer.
        process_group, shard_scope: of the engine, as the user gave them.

    Attributes:
        engine: where gradients come from now.
        scaling: what is known of a GradScaler.
        detached: whether the model was given back.
        in_use: whether the loop that the optimizer belongs to still trains; where it
            has ended, another optimizer may take the model over.
    """

    def __init__(self, owner: OptimizerWrapper, process_group: Any, shard_scope: str) -> None:
        self._owner, self._process_group, self._shard_scope = owner, process_group, shard_scope
        self.engine = Engine(process_group, shard_scope)
        self.scaling = LossScaling(id(owner))
        self.detached = False
        self.in_use: Callable[[], bool] = lambda: True
        # the model that was connected last, while it exists
        self._model: Callable[[], nn.Module | None] = lambda: None
        # gives it back to its engine; once
        self._release: Callable[[], object] = lambda: None
        self._watch: BackwardWatch | None = None

    @property
    def is_plain(self) -> bool:
        """Whether no engine but this library averages gradients."""
        return type(self.engine) is Engine

    def is_of(self, model: nn.Module) -> bool:
        """Return whether this very model was connected, and not given back since."""
        return not self.detached and self._model() is model

    def was_of(self, model: nn.Module) -> bool:
        """Return whether this very model was connected last, and given back since."""
        return self.detached and self._model() is model

    # ---------------------------------------------------------------- engines

    def to_plain(self, model: nn.Module) -> None:
        """Take the gradients of a plain model from `p.grad`."""
        if not self.is_plain or self.detached:
            self.engine = Engine(self._process_group, self._shard_scope)
        # Watched again from scratch, since it may have been said only now that
        # gradients are averaged at the end of backward.
        self._stop_watching()
        self.detached, self._model = False, weakref.ref(model)

    def to_wrapped(
        self,
        wrapper: str,
        model: nn.Module,
        reducer: Reducer | None,
        take_part: Callable[[], None],
        overlap: bool,
    ) -> None:
        """Let the engine of a wrapped model take the place of the present one.

        Args:
            wrapper: class of the wrapper, by name.
            model: the wrapped model.
            reducer: the optimizer's, if it has one; it must not have been used, unless
                this very model was connected before.
            take_part: a pass of the other workers when this one's data are exhausted; a
                method.
            overlap: whether buckets are to start during the backward pass.

        Raises:
            ConfigError: the optimizer has made steps, the model belongs to another
                optimizer, or the engine does not fit.
            UnsupportedError: the engine cannot work with this model.
        """
        if self.was_of(model):
            reducer = None
        if reducer is not None and reducer.state.last_pass is not None:
            raise ConfigError(
                "attach: the optimizer has made steps already; call attach(model) before the first"
                " one."
            )
        if reducer is not None and reducer.step > 0:
            raise ConfigError(
                "attach: a state was loaded into the optimizer already, and its error memory would"
                " be lost; load the state dict after attach (with Accelerate and Trainer, after"
                " prepare: load_state, resume_from_checkpoint)."
            )
        other = _attachment_of(model)
        if other is not None and other is not self and not other.give_way():
            raise ConfigError(
                "attach: this model is attached to another CompressedOptimizer already, and would"
                " be given back when one of them is detached. Use parameter groups of one"
                " optimizer, or call detach() on the other one first."
            )
        # first: what an earlier engine gives back must not be what the next one has
        # taken
        self.detach()
        engine = connect(wrapper, model, self._process_group, self._shard_scope)
        if overlap and not engine.can_overlap:
            engine.release()
            raise ConfigError(f"overlap=True is not possible with {engine.name}; leave it out.")
        self.detached, self.engine, self._model = False, engine, weakref.ref(model)
        _attached[model] = weakref.ref(self)
        engine.on_join(weakref.WeakMethod(take_part))
        # an optimizer that is gone leaves the model to its engine
        self._release = release = weakref.finalize(self, engine.release)
        release.atexit = False

    def detach(self) -> None:
        """Take the hooks off the parameters, and give the model back to its engine."""
        self._stop_watching()
        self._release()
        model = self._model()
        if model is not None and _attachment_of(model) is self:
            del _attached[model]
        self.detached = True

    def give_way(self) -> bool:
        """Give the model back for another optimizer, unless it is in use; return
        whether that was done.
        """
        if self.in_use():
            return False
        self.detach()
        return True

    # ---------------------------------------------------------------- backward passes

    def watch(
        self, on_gradient: Callable[[Tensor], None], at_end: Callable[[], None] | None
    ) -> None:
        """Watch the backward passes of the optimizer's trainable parameters; those that
        are watched already stay as they are.

        Args:
            on_gradient, at_end: see `BackwardWatch`; methods.
        """
        local = self.engine.kept_local
        parameters = [
            p for p in parameters_of(self._owner) if p.requires_grad and id(p) not in local
        ]
        if self._watch is not None:
            self._watch.add(parameters)
            return
        self._watch = self.engine.watch(parameters, on_gradient, at_end)
        me = weakref.ref(self)
        self._watch.give_way = lambda: (there := me()) is not None and there.give_way()
        if at_end is not None:
            vars(self._owner.base)[AVERAGES] = self._owner

    def watch_last(self, parameter: Tensor) -> None:
        """Let our hook of a parameter that is watched run after its other hooks."""
        assert self._watch is not None
        self._watch.move_to_the_end(parameter)

    def _stop_watching(self) -> None:
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        if vars(self._owner.base).get(AVERAGES) is self._owner:
            del vars(self._owner.base)[AVERAGES]

    # ---------------------------------------------------------------- checks

    def check_model(self, model: nn.Module, wrapper: str | None) -> list[str]:
        """Refuse a model that does not hold the optimizer's parameters: the optimizer
        was built from another one, or before the model's parameters were replaced.

        Returns:
            Names of the trainable parameters of a plain model that the optimizer does
            not hold.

        Raises:
            ConfigError: parameters are not the model's, or, if it is wrapped, trainable
                ones of the model are missing in the optimizer.
        """
        held = {id(p) for p in model.parameters()}
        everything = parameters_of(self._owner)
        foreign = [p for p in everything if id(p) not in held]
        has_none = len(foreign) == len(everything)
        if has_none or (wrapper is not None and foreign):
            of_them = "none" if has_none else f"all but {len(foreign)}"
            raise ConfigError(
                f"attach: the optimizer holds {of_them} of this model's parameters: of"
                f" {len(everything)} parameters of the optimizer {len(foreign)} are not the"
                " model's. Build it from this model, after fully_shard and the like, which replace"
                " the parameters."
            )
        holds = {id(p) for p in everything}
        holds |= kept_local(model)
        left_out = [
            name for name, p in model.named_parameters() if p.requires_grad and id(p) not in holds
        ]
        if wrapper is not None and left_out:
            raise ConfigError(
                f"attach: the model has {len(left_out)} trainable parameters that the optimizer"
                f" does not hold (the first: {left_out[0]}), and nobody would average their"
                " gradients any more. Give them to this optimizer, as a parameter group of its own"
                " if they need other settings, or freeze them."
            )
        return left_out

    def check_added(self, taking_part: Sequence[tuple[str, Tensor]]) -> None:
        """Refuse a parameter that the engine of the attached model has never seen.

        Raises:
            ConfigError: it is not one of the model's.
        """
        model = self._model()
        if model is None or self.is_plain:
            return
        held = {id(p) for p in model.parameters()}
        added = [name for name, p in taking_part if id(p) not in held]
        if added:
            raise ConfigError(
                f"parameter {added[0]!r} was added to the optimizer after attach, and is not one of"
                f" the attached model, so {self.engine.name} knows nothing of it. Add it to the"
                " model before it is wrapped, and attach then."
            )
