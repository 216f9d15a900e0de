"""What an optimizer asks of the program around it: which libraries are in use, and
which of its lines a warning is about.
"""

from __future__ import annotations

import sys
import warnings


def transformers_uses_deepspeed() -> bool:
    """Return whether `TrainingArguments(deepspeed=...)` or Accelerate's DeepSpeed
    plugin is alive in this process.

    Trainer then drops the optimizer that it is given, without a word, and makes one of
    its own.
    """
    module = sys.modules.get("transformers.integrations.deepspeed")
    reference = getattr(module, "_hf_deepspeed_config_weak_ref", None)
    return reference is not None and reference() is not None


def warn_user(message: str) -> None:
    """Warn of the line of the program that called into this library, or torch."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__", "")).startswith(
        ("lowrank_comm", "torch")
    ):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
