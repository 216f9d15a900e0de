"""RowSparse: an embedding's gradient has few rows that are not zero, and only these are
sent. Nothing is lost.

    1. Every worker counts its rows with a number that is not zero; the counts are
       gathered (one number a matrix).
    2. k is the largest of them. Each worker's row numbers, filled up to k, are
       gathered: the union U of all is known to all.
    3. The rows in U are averaged over the workers, divided by N and not by the number
       of workers that touched the row.

Where the union could hold more than half of the rows (N k > m / 2), the whole matrix is
averaged instead, and step 2 is left out. So a step takes up to three collectives, and
two small transfers to the host, since no worker knows beforehand what the others will
touch. Gradients of an output head are dense: for these it is no gain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from lowrank_comm.compressors.base import Compressor, Context, Delta, Form, Result, State, Steps
from lowrank_comm.compressors.requests import Gather, Mean, Read


@dataclass(frozen=True)
class RowSparse(Compressor):
    """The exact mean of matrices with few rows that are not zero.

    applied = mean(Delta_i),  sent_i = Delta_i

    Args:
        rank: has no effect.
    """

    json_name = "row_sparse"
    warms_up = False
    feedback: ClassVar[Form] = "none"  # type: ignore[misc]

    def elements(self, m: int, n: int, r: int) -> int:
        """Return the most that is sent: it depends on the rows that were touched."""
        return m * n + 1

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        matrices = delta.tensor
        count, m, _ = matrices.shape
        # A number that is not finite is not zero: its row is sent, and vetoes the step.
        touched = (matrices != 0).any(dim=2)
        counts = yield Gather(touched.sum(dim=1).to(torch.int32), "rows")
        k = int(max((yield Read(counts.flatten())), default=0))
        if 2 * context.workers * k > m:
            mean, own = yield Mean(matrices, "dense")
            return Result(applied=mean, sent=own, state={})
        applied, sent = torch.zeros_like(matrices), torch.zeros_like(matrices)
        if not k:
            return Result(applied=applied, sent=sent, state={})
        # Numbers of the touched rows first, then m as a filling; ascending, so that no
        # sort need be stable.
        numbers = torch.where(touched, torch.arange(m, device=matrices.device), m)
        numbers = numbers.sort(dim=1).values[:, :k]
        everyone = yield Gather(numbers.to(torch.int32), "rows")
        union = torch.zeros(count, m + 1, dtype=torch.bool, device=matrices.device)
        for one in everyone.long():
            union.scatter_(1, one, True)
        places = union[:, :m]
        # Each matrix has its own union; rows of all of them are averaged as one tensor,
        # in one order on all workers.
        mean, own = yield Mean(matrices[places], "dense")
        applied[places], sent[places] = mean, own
        return Result(applied=applied, sent=sent, state={})
