"""Quantized formats, int8, int4 and sign, for factors and for what stays dense.

A matrix is quantized in blocks of its own numbers, each with a scale in float32, so
that the result for a matrix does not depend on its neighbours. A matrix whose size is
no multiple of the block is filled up with zeros, which are sent and count.

    format  numbers a block   code of a number             scale           bytes a block
    int8    256               -127 .. 127, a byte          max|x| / 127    260
    int4    64                -7 .. 7, two in a byte       max|x| / 7      36
    sign    1024              1 for x >= 0 or 0, a bit     mean|x|         132

Rounding is to the nearest code, which is biased and needs error feedback; or stochastic
(int8 and int4), which is right in expectation. sign is contractive with
delta = ||x||_1^2 / (d ||x||_2^2) in each block of d numbers, and needs error feedback.
What is sent is what the codes decode to, so that the rounding error stays in the error
memory: sent + kept = given, exactly.

How the mean is formed (see `communication.quantized_mean`): two workers gather each
other's codes and average them. Among more, the blocks are dealt out; each worker
receives its share of every worker's codes (all-to-all), averages them, rounds the mean
to codes again, and all receive those (all-gather). So 2 (N - 1) / N times the codes go
over each link, as in an all-reduce, where gathering them all would take N - 1 times.
The second rounding is made by one worker for all, which books N times what it took off
as its own: the mean of what the workers sent is then what all apply.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.linalg import largest_magnitudes
from lowrank_comm.options import check_options

_SCALE_BYTES = 4


@dataclass(frozen=True)
class Format:
    """One way of writing numbers as bytes.

    Attributes:
        name: in configuration files.
        bits: of a code.
        block: numbers that share a scale; a multiple of 8.
        top: largest code; 0 for sign.
    """

    name: str
    bits: int
    block: int
    top: int

    @property
    def block_bytes(self) -> int:
        """Bytes of a block: codes and scale."""
        return self.block * self.bits // 8 + _SCALE_BYTES

    def blocks(self, numel: int) -> int:
        """Count the blocks of a matrix of so many numbers."""
        return -(-numel // self.block)

    def bytes(self, numel: int) -> int:
        """Count the bytes of a matrix of so many numbers."""
        return self.blocks(numel) * self.block_bytes

    @property
    def averages(self) -> bool:
        """Whether a block's scale is a mean, for which it matters how many of its
        numbers are filling.
        """
        return not self.top

    def encode(
        self, x: Tensor, counts: Tensor | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Quantize blocks of numbers to bytes.

        Args:
            x: (k, block), float32 or float64, zeros behind the first `counts` numbers
                of each block.
            counts: (k,) in x's dtype: how many of a block's numbers are no filling; of
                a format that averages, else None will do.
            noise: (k, block) uniform in [0, 1) for stochastic rounding, or None for the
                nearest code.

        Returns:
            (k, block_bytes) uint8. A block with a number that is not finite decodes to
            numbers that are not finite.
        """
        if self.averages:
            assert counts is not None
            scale = (x.abs().sum(dim=1) / counts.clamp(min=1)).to(torch.float32)
            codes = _packed((x >= 0).to(torch.uint8), 1)
        else:
            scale = (largest_magnitudes(x) / self.top).to(torch.float32)
            # NaN in a block of zeros, infinite where a scale is below float32's range:
            # whatever their code is, it decodes to zero
            codes = x / scale.to(x.dtype).unsqueeze(1)
            codes = codes.round_() if noise is None else codes.add_(noise).floor_()
            codes = codes.nan_to_num_().clamp_(-self.top, self.top)
            codes = _in_bytes(codes, self.bits)
        return torch.cat([codes, scale.unsqueeze(1).view(torch.uint8)], dim=1)

    def decode(self, written: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode bytes (k, block_bytes) to numbers (k, block)."""
        codes, scales = written[:, :-_SCALE_BYTES], _scales(written).to(dtype)
        if self.averages:
            return _unpacked(codes, 1).to(dtype).mul_(2).sub_(1).mul_(scales)
        return _from_bytes(codes, self.bits, dtype).mul_(scales)

    def largest(self, written: Tensor) -> Tensor:
        """Return the size that the largest code of each block decodes to: (k, 1)
        float32, not finite where a number of the block was not.
        """
        return _scales(written) * max(self.top, 1)


def _scales(written: Tensor) -> Tensor:
    """Return the scales of blocks in bytes, as a view: (k, 1) float32. All formats'
    block bytes are multiples of a scale's.
    """
    return written.view(torch.float32)[:, -1:]


def _in_bytes(codes: Tensor, bits: int) -> Tensor:
    """Return whole numbers, (k, block) from -2^(bits - 1) upwards, in bytes: those of 8
    bits as they are, smaller ones without a sign.
    """
    if bits == 8:
        return codes.to(torch.int8).view(torch.uint8)
    return _packed((codes + (1 << (bits - 1))).to(torch.uint8), bits)


def _from_bytes(written: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Return the whole numbers that `_in_bytes` wrote."""
    if bits == 8:
        return written.view(torch.int8).to(dtype)
    return _unpacked(written, bits).to(dtype).sub_(1 << (bits - 1))


def _packed(codes: Tensor, bits: int) -> Tensor:
    """Pack (k, block) codes below 2^bits into bytes, the first in the lowest bits."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    groups = codes.view(codes.shape[0], codes.shape[1] * bits // 8, 8 // bits)
    return (groups << shifts).sum(dim=2, dtype=torch.uint8)


def _unpacked(codes: Tensor, bits: int) -> Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    groups = (codes.unsqueeze(2) >> shifts) & ((1 << bits) - 1)
    return groups.view(codes.shape[0], codes.shape[1] * 8 // bits)


FORMATS = {
    one.name: one
    for one in (Format("int8", 8, 256, 127), Format("int4", 4, 64, 7), Format("sign", 1, 1024, 0))
}
FormatName = Literal["int8", "int4", "sign"]


@dataclass(frozen=True)
class Quantization:
    """What is sent quantized, and in which format; None is the wire dtype.

    Args:
        factors: format of what compressors average in ordinary steps (P and Q); null
            for the wire dtype.
        restart: the same for what restarts average (a whole matrix, or factors).
        dense: the same for parameters that are not compressed, where it is shorter;
            they then have an error memory.
        rounding: "stochastic" for int8 and int4 only. Its draws follow from the seed,
            the step and the place in a buffer, so another bucket size draws others.

    Raises:
        ConfigError: an unknown format or rounding, or stochastic rounding of signs.

    Example:
        >>> Quantization(factors="int8").formats["factors"].bits
        8
    """

    factors: FormatName | None = None
    restart: FormatName | None = None
    dense: FormatName | None = None
    rounding: Literal["nearest", "stochastic"] = "nearest"

    def __post_init__(self) -> None:
        check_options(self, "quantization.")
        for key in ("factors", "restart", "dense"):
            if self.rounding == "stochastic" and getattr(self, key) == "sign":
                raise ConfigError(
                    'quantization.rounding="stochastic" is not possible with'
                    f' quantization.{key}="sign", which has no codes between which to choose; use'
                    ' "int8", "int4", or rounding="nearest".'
                )

    @property
    def formats(self) -> dict[str, Format]:
        """Kind of the ledger -> format in which its averages are sent quantized."""
        named = {"factors": self.factors, "restart": self.restart}
        return {kind: FORMATS[name] for kind, name in named.items() if name}

    @property
    def of_compressors(self) -> bool:
        """Whether something that compressors average is quantized."""
        return self.factors is not None or self.restart is not None
