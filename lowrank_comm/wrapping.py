"""An optimizer around another one that owns nothing: whatever the base owns is the base's, so nothing can drift apart.

And what an optimizer may want to know of whoever is around it: who calls its step, whether its neighbours are like it.
"""

from __future__ import annotations

import hashlib
import sys
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.optim import Optimizer

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class OptimizerAroundAnother(Optimizer):
    """A `torch.optim.Optimizer` whose `param_groups`, `state` and `defaults` are those of `base`.

    Hooks are its own: those registered here run around this optimizer's step, the base's around the base's.

    Args:
        base: the optimizer that steps.
    """

    def __init__(self, base: Optimizer) -> None:  # Optimizer.__init__ would make groups and state of its own
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
        """Add a group to the base; its parameters take part from the next step on, on all workers."""
        self.base.add_param_group(param_group)

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "CompressedOptimizer cannot be pickled or deep-copied: it belongs to a process group. Use state_dict()."
        )


def only_initialises_state(param_groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether torch.distributed.checkpoint is making an optimizer create its state.

    It does so by a step with lr 0 and zero gradients, perhaps on one rank alone. That is no step of the compressor: it would
    take the error memory and apply it with lr 0. Who calls is looked up, since a worker's gradients may be zero in a real
    step too, and then it must take part.
    """
    if any(float(group.get("lr", 1.0)) != 0.0 for group in param_groups):
        return False
    frame: FrameType | None = sys._getframe(1)
    for _ in range(8):
        if frame is None:
            return False
        if frame.f_code.co_name == "_init_optim_state":
            return True
        frame = frame.f_back
    return False


def transformers_uses_deepspeed() -> bool:
    """Whether `TrainingArguments(deepspeed=...)` or Accelerate's DeepSpeed plugin is alive in this process.

    Trainer then drops the optimizer that it is given, without a word, and makes one of its own.
    """
    module = sys.modules.get("transformers.integrations.deepspeed")
    reference = getattr(module, "_hf_deepspeed_config_weak_ref", None)
    return reference is not None and reference() is not None


def fingerprint(parameters: Sequence[Tensor]) -> str:
    """A short text that two workers share if their parameters are equal, whatever their devices: the bits of each parameter
    are added up as integers, whose sum does not depend on the order."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [p.detach().contiguous().view(integers[p.itemsize]).sum(dtype=torch.int64) for p in parameters]
    numbers = torch.stack([one.to(sums[0].device) for one in sums]).tolist() if sums else []
    return hashlib.sha256(repr(numbers).encode()).hexdigest()[:16]
