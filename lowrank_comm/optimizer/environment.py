"""What an optimizer asks of the program around it: which libraries are in use."""

from __future__ import annotations

import sys


def transformers_uses_deepspeed() -> bool:
    """Whether `TrainingArguments(deepspeed=...)` or Accelerate's DeepSpeed plugin is
    alive in this process.

    Trainer then drops the optimizer that it is given, without a word, and makes one of
    its own.
    """
    module = sys.modules.get("transformers.integrations.deepspeed")
    reference = getattr(module, "_hf_deepspeed_config_weak_ref", None)
    return reference is not None and reference() is not None
