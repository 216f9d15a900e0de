"""The options of error feedback: its form, and how the error memory is kept."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from lowrank_comm.compressors.base import Compressor
from lowrank_comm.errors import ConfigError

FORMS = ("ef14", "ef21", "ef21_sgdm", "none")


DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ErrorFeedback:
    """What happens to what was not sent, and how it is kept; see `feedback` for the
    forms.

    Args:
        form: "ef14" (g + e is compressed; the papers' form), "ef21", "ef21_sgdm",
            "none", or None for the compressor's own.
        momentum: a of "ef21_sgdm", in (0, 1]; no other form has one.
        rounds: how often a step compresses what it left, >= 1.
        dtype: of the error memory of "ef14": None for the wider of float32 and the
            parameter's dtype, or "bfloat16", "float32", "float64".
        rounding: "nearest", or "stochastic" (bfloat16 only).
        offload: keep the memory on the CPU; it is copied to the device for each step
            and back.

    Raises:
        ConfigError: a value is unknown, or stochastic rounding is asked of a dtype that
            does not need it.
    """

    dtype: str | None = None
    rounding: str = "nearest"
    offload: bool = False
    form: str | None = None
    momentum: float = 0.1
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.form is not None and self.form not in FORMS:
            raise ConfigError(
                f"error_feedback.form={self.form!r} is unknown; use null or one of"
                f" {', '.join(map(repr, FORMS))}."
            )
        number = isinstance(self.momentum, int | float) and not isinstance(self.momentum, bool)
        if not number or not 0 < self.momentum <= 1:
            raise ConfigError(
                f"error_feedback.momentum must be above 0 and at most 1, got {self.momentum!r}."
            )
        if self.momentum != 0.1 and self.form != "ef21_sgdm":
            raise ConfigError(
                f'error_feedback.momentum={self.momentum!r} has a meaning for form="ef21_sgdm"'
                f" only, not for {self.form!r}; leave it out (the momentum of SGD is the base"
                " optimizer's)."
            )
        if isinstance(self.rounds, bool) or not isinstance(self.rounds, int) or self.rounds < 1:
            raise ConfigError(
                f"error_feedback.rounds must be an integer of at least 1, got {self.rounds!r}."
            )
        plain = {"dtype": None, "rounding": "nearest", "offload": False}
        memory = [key for key, value in plain.items() if getattr(self, key) != value]
        if memory and self.form not in (None, "ef14"):
            raise ConfigError(
                f"error_feedback.{memory[0]}={getattr(self, memory[0])!r} is about the error"
                " memory, which "
                f'form="{self.form}" does not have; leave it out, or use form="ef14".'
            )
        if self.dtype is not None and self.dtype not in DTYPES:
            why = (
                " (float16 overflows at 65504, and the memory is a sum)"
                if self.dtype == "float16"
                else ""
            )
            raise ConfigError(
                f"error_feedback.dtype={self.dtype!r} is not possible{why}; use null,"
                f" {', '.join(map(repr, DTYPES))}."
            )
        if self.rounding not in ("nearest", "stochastic"):
            raise ConfigError(
                f'error_feedback.rounding={self.rounding!r} is unknown; use "nearest" or'
                ' "stochastic".'
            )
        if self.rounding == "stochastic" and self.dtype != "bfloat16":
            raise ConfigError(
                'error_feedback.rounding="stochastic" needs error_feedback.dtype="bfloat16", got'
                f" {self.dtype!r}."
            )
        if not isinstance(self.offload, bool):
            raise ConfigError(
                f"error_feedback.offload must be true or false, got {self.offload!r}."
            )

    def describe(self) -> dict[str, Any]:
        """Plain settings by name."""
        return {option.name: getattr(self, option.name) for option in fields(self)}

    def for_compressor(self, compressor: Compressor) -> ErrorFeedback:
        """The same with its form resolved, if it suits the compressor.

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
        """Whether there is an error memory, as there is unless another form is asked
        for.
        """
        return self.form in (None, "ef14")

    @property
    def memory(self) -> str:
        """What is kept of earlier gradients, in words."""
        kept = {
            "ef21": "EF21 memory (y)",
            "ef21_sgdm": "EF21 memory (y, v)",
            "none": "state of the compressor",
        }
        return kept.get(self.form or "", "error memory")
