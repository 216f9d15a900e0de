"""The base class of the optimizers of this library that wrap another one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NoReturn

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


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters of all groups, in their order."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def _of_the_base(name: str) -> Any:
    """Return a property that reads and sets the base's attribute of this name."""
    return property(
        lambda self: getattr(self.base, name), lambda self, value: setattr(self.base, name, value)
    )


class OptimizerWrapper(Optimizer):
    """Wraps a base optimizer; delegates `param_groups`, `state` and `defaults` to it,
    so that they cannot differ from the base's.

    Hooks are its own: those registered here run around this optimizer's methods, the
    base's around the base's.

    Args:
        base: the optimizer that steps.
        argument: what the caller calls it, for messages.

    Raises:
        ConfigError: it is none, a wrapper itself, or LBFGS.
    """

    param_groups: list[dict[str, Any]] = _of_the_base("param_groups")
    state: Any = _of_the_base("state")
    defaults: dict[str, Any] = _of_the_base("defaults")

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
        self.base = base
        for hooks in _HOOKS:
            setattr(self, hooks, OrderedDict())
        self._patch_step_function()

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
