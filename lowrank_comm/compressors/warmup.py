"""A step of the warm-up: matrices are averaged whole, and bases follow the means.

In the first steps of a run gradients turn fast and no basis is known yet. So they are
averaged as without compression,

    applied = mean of Delta_i       Delta_i = g_i, since no error is left

and meanwhile each compressor with a warm start makes its own step on that mean, which
all workers know by then: what it would average is the mean already, so that it sends
nothing. Compression then begins with a basis that has followed the gradient for k
steps, and needs no restart. A compressor without a warm start restarts in its first
compressed step (`Compressor.follows_means`).

Where the warm-up is sent in fewer bits, e <- Delta_i - what was sent of it, as ever.
"""

from __future__ import annotations

from lowrank_comm.compressors.base import Compressor, Context, Delta, Result, State, Steps
from lowrank_comm.compressors.requests import Mean
from lowrank_comm.numerics.linalg import norm


def warmup_step(compressor: Compressor, delta: Delta, state: State, context: Context) -> Steps:
    """Average a batch whole, and let its bases follow; m n elements a matrix.

    Args:
        compressor: with all that is around it.
        delta: (B, m, n), or the rows of it that this rank holds. Its place is used for
            what is left of it: there are models for which another copy is too much.
        state: of the compressor.
        context: of the batch.
    """
    matrices = delta.tensor
    mean, own = yield Mean(matrices, "warmup")
    after = yield from compressor.follow(mean, own, state, context)
    given = norm(matrices)
    if own is matrices:
        # all of it has arrived
        nothing = matrices.new_zeros(()).expand(matrices.shape)
        return Result(matrices.copy_(mean), None, after, nothing, (given, given))
    return Result(mean, None, after, matrices.sub_(own), (norm(own), given))
