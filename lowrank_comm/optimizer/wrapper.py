"""An optimizer around another one that owns nothing: whatever the base owns is the
base's, so nothing can drift apart.

And what an optimizer may want to know of whoever is around it: who calls its step,
whether its neighbours are like it.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, NoReturn

from torch.optim import Optimizer

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class OptimizerWrapper(Optimizer):
    """A `torch.optim.Optimizer` whose `param_groups`, `state` and `defaults` are those
    of `base`.

    Hooks are its own: those registered here run around this optimizer's step, the
    base's around the base's.

    Args:
        base: the optimizer that steps.
    """

    # Optimizer.__init__ would make groups and state of its own
    def __init__(self, base: Optimizer) -> None:
        self.base = base
        for hooks in _HOOKS:
            setattr(self, hooks, OrderedDict())
        self._patch_step_function()

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base's."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.base.param_groups = value

    @property
    def state(self) -> Any:  # type: ignore[override]
        """The base's."""
        return self.base.state

    @state.setter
    def state(self, value: Any) -> None:
        self.base.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The base's."""
        return self.base.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.base.defaults = value

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; its parameters take part from the next step on, on
        all workers.
        """
        self.base.add_param_group(param_group)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "CompressedOptimizer cannot be pickled or deep-copied: it belongs to a process group."
            " Use state_dict()."
        )
