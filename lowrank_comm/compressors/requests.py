"""What a compressor may ask for: the requests that its generator yields, and what it is
sent back for each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """Average `tensor` over the workers.

    Sent back: (mean, own), both in tensor's shape and dtype. `own` is this worker's
    contribution as it was sent; it equals `tensor` unless the wire dtype is narrower.
    Error feedback must subtract `own`, so that what rounding took away stays in the
    error memory.

    Attributes:
        tensor: any shape.
        kind: of the ledger.
        over_rows: the tensor contracts over the rows of the matrices; both answers are
            then of all rows.
        codes: the format of `quantization` in which it is sent, in the place of the one
            that is set for its kind.
    """

    tensor: Tensor
    kind: str = "factors"
    over_rows: bool = False
    codes: str | None = None


@dataclass(frozen=True)
class ComputeOnce:
    """Compute something from each matrix on one worker, for results that equal input
    does not determine bit by bit, such as singular vectors.

    Sent back: (B, rows, columns), the rows of the results that this rank holds; the
    same bits on all workers.

    Attributes:
        matrices: (B, rows, n), equal on all workers; of blocks, this rank's rows.
        m: rows of the whole matrices.
        columns: of a result.
        of: takes this worker's share of the matrices, whole, (b, m, n), and their
            places in the batch, for draws by name; returns (b, m, columns).
        kind: of the ledger.
    """

    matrices: Tensor
    m: int
    columns: int
    of: Callable[[Tensor, list[int]], Tensor]
    kind: str = "broadcast"


@dataclass(frozen=True)
class Gather:
    """Gather every worker's `tensor`, which has one shape on all of them.

    Sent back: (N, *shape) in the order of the workers, as they were sent; this worker's
    own part is number `Context.worker` of it.

    An all-gather: each worker receives N - 1 of these, where an average costs about
    two for every N.
    """

    tensor: Tensor
    kind: str = "gather"


@dataclass(frozen=True)
class Decide:
    """Tell the host whether all numbers of `tensor` are above `limit`; NaN is not. They
    must be equal on all workers.

    Sent back: bool.

    Attributes:
        tensor: on the device.
        limit: a number of the host.
    """

    tensor: Tensor
    limit: float


@dataclass(frozen=True)
class Read:
    """Tell the host the numbers of the 1-D `tensor`, which must be equal on all
    workers; not for compressors that are given blocks of rows.

    Sent back: a list of floats (whole numbers below 2^24 are exact).
    """

    tensor: Tensor


@dataclass(frozen=True)
class SumOverRows:
    """Sum `tensor` over the blocks of rows in which a node holds its matrices.

    Sent back: the sum, the same bits on all nodes; `tensor` itself where matrices are
    whole.
    """

    tensor: Tensor


@dataclass(frozen=True)
class WholeRows:
    """Fetch all rows of `tensor`, (B, own rows, k).

    Sent back: (B, m, k); `tensor` itself where matrices are whole.
    """

    tensor: Tensor
    m: int


@dataclass(frozen=True)
class InverseFactor:
    """Factorise Gram matrices, in float64, together with those of all batches that ask
    at the same time: however many shapes there are, that is one factorisation.

    Sent back: (W, pivot), see `numerics.linalg.inverse_factor`.

    Attributes:
        gram: (B, r, r), equal on all workers.
        dtype: of W.
        pivot: (B,), of the pass before, or None.
    """

    gram: Tensor
    dtype: torch.dtype
    pivot: Tensor | None = None


Request = Mean | ComputeOnce | Gather | Decide | Read | SumOverRows | WholeRows | InverseFactor
