"""How long the warm-up of a run is, and how it is sent; what a step of it does is told
in `compressors.warmup`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field

from lowrank_comm.communication.flat_buffers import wire_dtype_called
from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.quantization import FORMATS, Format
from lowrank_comm.options import Advice, PositiveInt, check

LEAST = 5
"""Steps of a warm-up that is asked for as a fraction of the run."""

Fraction = Annotated[float, Field(gt=0, lt=1)]
WarmupSteps = Annotated[
    Annotated[int, Field(ge=0)] | Fraction,
    Advice("it is a number of steps, or a fraction of the run below 1; 0 for none"),
]
WarmupWire = Annotated[
    Literal["bfloat16", "int8"] | None, Advice("null for that of the other steps")
]
KIND = "warmup"


@dataclass(frozen=True)
class Warmup:
    """The first k steps of a run, which average everything.

    Args:
        steps: k, or a fraction of `training_steps`: that part of it, rounded up, at
            least 5.
        wire: "bfloat16" or "int8" for what these steps send of matrices; None for the
            wire dtype of the others. What it rounds off stays in the error memory.
        training_steps: of the whole run, or None where nobody knows them.

    Raises:
        ConfigError: a value is out of range.
    """

    steps: int | float = 0
    wire: str | None = None
    training_steps: int | None = None

    def __post_init__(self) -> None:
        check("warmup_steps", self.steps, WarmupSteps, 0)
        check("warmup_wire", self.wire, WarmupWire)
        check("training_steps", self.training_steps, PositiveInt | None)
        if self.wire is not None and not self.steps:
            raise ConfigError(
                f"warmup_wire={self.wire!r} has no effect without a warm-up; give warmup_steps"
                " too, for example warmup_steps=0.03, or leave it out."
            )

    @property
    def length(self) -> int:
        """k.

        Raises:
            ConfigError: a fraction of a run whose length nobody knows.
        """
        if isinstance(self.steps, int):
            return self.steps
        if self.training_steps is None:
            raise ConfigError(
                f"warmup_steps={self.steps!r} is a fraction of the run, and nothing here tells how"
                " long that is; give training_steps (the optimizer steps of the whole run) beside"
                " it, or a whole number such as warmup_steps=100."
            )
        return min(self.training_steps, max(LEAST, math.ceil(self.steps * self.training_steps)))

    @property
    def format(self) -> Format | None:
        """In which matrices are sent quantized; None if they are not."""
        return FORMATS.get(self.wire or "")

    def bytes(self, numel: int, itemsize: int) -> int:
        """Count the bytes of a matrix of so many numbers; itemsize: of one of them on
        the wire, where they are not quantized.
        """
        return self.format.bytes(numel) if self.format else numel * itemsize

    @property
    def dtype(self) -> torch.dtype | None:
        """On the wire; None for that of the other steps."""
        return None if self.format else wire_dtype_called(self.wire)
