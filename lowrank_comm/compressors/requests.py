"""What a compressor may ask for: the requests that its generator yields, and what it is
sent back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """Request: average `tensor` over the workers. Answer: (mean, own), both in tensor's
    shape and dtype.

    `own` is this worker's contribution as it went on the wire. It equals `tensor`
    unless the wire dtype is narrower; error feedback must subtract `own`, so that what
    rounding took away stays in the error memory. With `over_rows` the tensor contracts
    over the rows of the matrices, and both answers are of all rows. `codes`: it travels
    in this format of `quantization`, whatever is set for its kind.
    """

    tensor: Tensor
    kind: str = "factors"
    over_rows: bool = False
    codes: str | None = None


@dataclass(frozen=True)
class ComputeOnce:
    """Request: compute something from each of the (B, rows, n) `matrices`, which are
    equal on all workers, on one worker, and give it to everyone. Answer: (B, rows,
    columns), the rows of it that this rank holds.

    `compute(matrices)` takes (b, m, n) of whole matrices and returns (b, m, columns).
    It is called with this worker's share only. For results that equal input does not
    determine bit by bit, such as singular vectors. With `indexed`, it is called as
    `compute(matrices, indices)`, with their places in the batch, for draws by name.
    """

    matrices: Tensor
    m: int
    columns: int
    compute: Callable[..., Tensor]
    kind: str = "broadcast"
    indexed: bool = False

    def of(self, matrices: Tensor, indices: list[int]) -> Tensor:
        """The result for those of the matrices that have these places."""
        result: Tensor = self.compute(matrices, indices) if self.indexed else self.compute(matrices)
        return result


@dataclass(frozen=True)
class Gather:
    """Request: every worker's `tensor`, which has one shape on all of them. Answer: (N,
    *shape) in the order of the workers, as it went on the wire; this worker's own part
    is number `Context.worker` of it.

    An all-gather: each worker receives N - 1 of these, where an average costs about
    two, whatever N.
    """

    tensor: Tensor
    kind: str = "gather"


@dataclass(frozen=True)
class Decide:
    """Request: tell the host whether all of `flag` (bool, on the device) is true. Must
    be equal on all workers.
    """

    flag: Tensor


@dataclass(frozen=True)
class Read:
    """Request: tell the host the numbers of the 1-D `tensor`, as a list of floats
    (whole numbers below 2^24 are exact). Must be equal on all workers; not for
    compressors that are given blocks of rows.
    """

    tensor: Tensor


@dataclass(frozen=True)
class SumOverRows:
    """Request: the sum of `tensor` over the blocks of rows; itself, where matrices are
    whole.
    """

    tensor: Tensor


@dataclass(frozen=True)
class WholeRows:
    """Request: all rows of `tensor` (B, own rows, k), as (B, m, k); itself, where
    matrices are whole.
    """

    tensor: Tensor
    m: int


Request = Mean | ComputeOnce | Gather | Decide | Read | SumOverRows | WholeRows
