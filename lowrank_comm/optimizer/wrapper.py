"""The base class of the optimizers of this library that wrap another one."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_comm.errors import ConfigError

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)

_FROM_A_SCALER = ("found_inf", "grad_scale")
"""What a GradScaler sets on an optimizer for one step, and deletes again."""


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups, in their order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def refuse_meta(named: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse parameters without values, before a step.

    Raises:
        ConfigError: one is on the meta device.
    """
    for name, parameter in named:
        if parameter.is_meta:
            raise ConfigError(
                f"parameter {name!r} is on the meta device and has no values. Give the model some"
                " before the first step: model.to_empty(device=...), then initialise or load it."
            )


def _property_of_the_base(name: str) -> Any:
    """Return a property that reads and sets the base's attribute of this name."""
    return property(
        lambda self: getattr(self.base, name), lambda self, value: setattr(self.base, name, value)
    )


def _needs_closure(base: Optimizer) -> bool:
    """Return whether `base.step()` cannot be called without a closure."""
    try:
        closure = inspect.signature(base.step).parameters.get("closure")
    except (TypeError, ValueError):
        return False
    return closure is not None and closure.default is inspect.Parameter.empty


def _closure_needed(base: Optimizer) -> str:
    name = type(base).__name__
    return (
        f"{name}.step() needs a closure, by which it computes gradients again at other weights, and"
        " those would not be averaged over the workers. An optimizer that is made around another"
        " one, as SAM is, goes outside:"
        f' {name}(...) around CompressedOptimizer(torch.optim.SGD(...), ..., reduce_at="backward"),'
        " whose step() it calls."
    )


@contextlib.contextmanager
def _no_global_hooks() -> Iterator[None]:
    """Let no global optimizer hook of torch run inside the block: they run around the
    step of the wrapper, in which the block is. Does nothing where there are none.
    """
    # torch.optim does not show it as an attribute
    module = sys.modules[Optimizer.__module__]
    names = ("_global_optimizer_pre_hooks", "_global_optimizer_post_hooks")
    kept = {name: hooks for name in names if (hooks := getattr(module, name))}
    for name in kept:
        setattr(module, name, OrderedDict())
    try:
        yield
    finally:
        for name, hooks in kept.items():
            setattr(module, name, hooks)


class OptimizerWrapper(Optimizer):
    """Wraps a base optimizer; delegates `param_groups`, `state` and `defaults` to it,
    so that they cannot differ from the base's.

    An attribute that the wrapper does not have is the base's, so that `hasattr` answers
    for the base: `train()` and `eval()` of schedule-free optimizers, `_get_lr` of
    transformers' Adafactor. A public attribute that only the base has is set there.

    Hooks are its own: those registered here run around this optimizer's methods, the
    base's around the base's. torch's global optimizer hooks run around this one's step
    only, hence once a step.

    Args:
        base: the optimizer that steps.
        argument: what the caller calls it, for messages.

    Raises:
        ConfigError: it is none, a wrapper itself, LBFGS, or its step cannot do without
            a closure.
    """

    param_groups: list[dict[str, Any]] = _property_of_the_base("param_groups")
    state: Any = _property_of_the_base("state")
    defaults: dict[str, Any] = _property_of_the_base("defaults")

    # Optimizer.__init__ would make groups and state of its own
    def __init__(self, base: Optimizer, argument: str) -> None:
        if not isinstance(base, Optimizer) or isinstance(base, OptimizerWrapper):
            raise ConfigError(
                f"{argument} must be a plain torch.optim.Optimizer, got {type(base).__name__}."
            )
        if isinstance(base, torch.optim.LBFGS):
            raise ConfigError(
                f"{argument}=LBFGS evaluates the loss several times a step; use SGD, Adam, or"
                " another that does not."
            )
        if _needs_closure(base):
            raise ConfigError(_closure_needed(base))
        self.base = base
        for hooks in _HOOKS:
            setattr(self, hooks, OrderedDict())
        self._patch_step_function()

    # mypy would take any attribute for granted
    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """Return an attribute of the base that this optimizer does not have."""
            # while it is being made; special methods are looked for in the class
            if name == "base" or name.startswith("__"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            base = self.base
            try:
                value = getattr(base, name)
            except AttributeError:
                raise AttributeError(
                    f"{type(self).__name__!r} object has no attribute {name!r}, nor has its base"
                    f" {type(base).__name__}"
                ) from None
            return self._of_the_base(name, value)

        def __setattr__(self, name: str, value: Any) -> None:
            """Set an attribute; a public one that only the base has, there."""
            base = vars(self).get("base")
            if (
                base is None
                or name.startswith("_")
                or name in _FROM_A_SCALER
                or name in vars(self)
                or hasattr(type(self), name)
                or not hasattr(base, name)
            ):
                super().__setattr__(name, value)
            else:
                setattr(base, name, value)

    def _of_the_base(self, name: str, value: Any) -> Any:
        """Return what `getattr` gives for an attribute that only the base has."""
        return value

    def _step_base(self) -> None:
        """Step the base, with the gradients as they are.

        Raises:
            ConfigError: it needs a closure.
        """
        try:
            with _no_global_hooks():
                self.base.step()
        except Exception as error:
            if "closure" not in str(error).lower():
                raise
            raise ConfigError(_closure_needed(self.base)) from error

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; its parameters take part from the next step on, on
        all workers.
        """
        self.base.add_param_group(param_group)

    def _state_dict_with_hooks(self, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the state dict that `make` returns, between the hooks for saving."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        result = make()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, result)
            result = result if changed is None else changed
        return result

    def _load_with_hooks(
        self, state_dict: dict[str, Any], load: Callable[[dict[str, Any]], None]
    ) -> None:
        """Call `load` with the state dict, between the hooks for loading."""
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__} cannot be pickled or deep-copied: it belongs to a process"
            " group. Use state_dict()."
        )
