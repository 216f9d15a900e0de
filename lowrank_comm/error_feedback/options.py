"""The options of error feedback: its form, and how the error memory is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch

from lowrank_comm.compressors.base import Compressor, Form
from lowrank_comm.errors import ConfigError
from lowrank_comm.options import Advice, PositiveInt, Share, check_options

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
_OVERFLOWS = Advice(
    "float16 overflows at 65504, and the memory is a sum", when=lambda value: value == "float16"
)


@dataclass(frozen=True)
class ErrorFeedback:
    """What happens to the part of a gradient that was not sent.

    Args:
        form: "ef14" (the gradient plus the error memory is compressed; the papers'
            form), "ef21", "ef21_sgdm", "none", or null for the compressor's own.
        momentum: a of "ef21_sgdm", in (0, 1]; no other form has one.
        rounds: how often a step compresses what it has left.
        dtype: of the error memory of "ef14"; null for the wider of float32 and the
            parameter's dtype.
        rounding: of the error memory, "stochastic" for bfloat16 only.
        offload: keep the error memory on the CPU; it is copied to the device for each
            step and back.

    Raises:
        ConfigError: a value is unknown, or options contradict one another.
    """

    dtype: Annotated[Literal["float32", "float64", "bfloat16"] | None, _OVERFLOWS] = None
    rounding: Literal["nearest", "stochastic"] = "nearest"
    offload: bool = False
    form: Form | None = None
    momentum: Share = 0.1
    rounds: PositiveInt = 1

    def __post_init__(self) -> None:
        check_options(self, "error_feedback.")
        if self.momentum != 0.1 and self.form != "ef21_sgdm":
            raise ConfigError(
                f'error_feedback.momentum={self.momentum!r} has a meaning for form="ef21_sgdm"'
                f" only, not for {self.form!r}; leave it out (the momentum of SGD is the base"
                " optimizer's)."
            )
        of_memory = {"dtype": None, "rounding": "nearest", "offload": False}
        for key, default in of_memory.items():
            if getattr(self, key) != default and self.form not in (None, "ef14"):
                raise ConfigError(
                    f"error_feedback.{key}={getattr(self, key)!r} is about the error memory, which"
                    f' form="{self.form}" does not have; leave it out, or use form="ef14".'
                )
        if self.rounding == "stochastic" and self.dtype != "bfloat16":
            raise ConfigError(
                'error_feedback.rounding="stochastic" needs error_feedback.dtype="bfloat16", got'
                f" {self.dtype!r}."
            )

    def for_compressor(self, compressor: Compressor) -> ErrorFeedback:
        """Return the same options with the form resolved, if it suits the compressor.

        Raises:
            ConfigError: the compressor is not contractive, and the form needs that.
        """
        form = self.form or compressor.feedback
        name = compressor.json_name
        if not compressor.contractive and (form != "none" or self.rounds > 1):
            key, value = ("form", form) if form != "none" else ("rounds", self.rounds)
            raise ConfigError(
                f"error_feedback.{key}={value!r} needs a contractive compressor, and {name} as it"
                f" is set ({compressor.describe()}) is an unbiased one whose error may be longer"
                ' than what it is given; use its contractive form, or error_feedback.form="none"'
                " and rounds=1."
            )
        return replace(self, form=form)

    @property
    def keeps_errors(self) -> bool:
        """Whether there is an error memory: "ef14", or the form is not resolved."""
        return self.form in (None, "ef14")

    def stored_as(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype of the error memory of what is computed in `dtype`."""
        return DTYPES[self.dtype] if self.dtype else dtype

    @property
    def memory(self) -> str:
        """What a parameter's compression keeps of earlier gradients, in words."""
        kept = {
            "ef21": "EF21 memory (y)",
            "ef21_sgdm": "EF21 memory (y, v)",
            "none": "state of the compressor",
        }
        return kept.get(self.form or "", "error memory")
