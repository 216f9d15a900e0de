"""What an optimizer asks of the program around it: who calls its step, and which
libraries are alive.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any


def only_initialises_state(param_groups: Sequence[Mapping[str, Any]]) -> bool:
    """Whether torch.distributed.checkpoint is making an optimizer create its state.

    It does so by a step with lr 0 and zero gradients, perhaps on one rank alone. That
    is no step of the compressor: it would take the error memory and apply it with lr 0.
    Who calls is looked up, since a worker's gradients may be zero in a real step too,
    and then it must take part.
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
    """Whether `TrainingArguments(deepspeed=...)` or Accelerate's DeepSpeed plugin is
    alive in this process.

    Trainer then drops the optimizer that it is given, without a word, and makes one of
    its own.
    """
    module = sys.modules.get("transformers.integrations.deepspeed")
    reference = getattr(module, "_hf_deepspeed_config_weak_ref", None)
    return reference is not None and reference() is not None
