"""Quantized: what stays dense is sent quantized, with error feedback.

    sent_i  = decode(encode(Delta_i)),  e_i <- Delta_i - sent_i
    applied = decode(encode(mean of sent_i))

No subspace and no state: one average of the whole matrix, in int8, int4 or signs (see
`numerics.quantization`). Without it, embeddings and other parameters that do not go
low-rank would set the ceiling of the whole model's compression ratio.
"""

from __future__ import annotations

from dataclasses import dataclass

from lowrank_comm.compressors.base import Compressor, Context, Delta, Result, State, Steps
from lowrank_comm.compressors.requests import Mean
from lowrank_comm.numerics.quantization import FormatName


@dataclass(frozen=True)
class Quantized(Compressor):
    """The mean of the matrices, quantized.

    sent_i = decode(encode(Delta_i)),  applied = decode(encode(mean(sent_i)))

    Args:
        rank: has no effect.
        codes: "int8", "int4" or "sign".
    """

    codes: FormatName = "int8"

    json_name = "quantized"
    linear = False

    def elements(self, m: int, n: int, r: int) -> int:
        return m * n

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        mean, own = yield Mean(delta.tensor, "dense", codes=self.codes)
        return Result(applied=mean, sent=own, state={})
