"""The messages of a step between workers and server; `base` has their order."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from lowrank_comm.bidirectional.ledger import LinkLedger
from lowrank_comm.bidirectional.permk import Blocks
from lowrank_comm.bidirectional.randk import RandK
from lowrank_comm.numerics.randomness import stream


@dataclass(frozen=True)
class Context:
    """What a method knows beside its numbers.

    Attributes:
        seed: of the run, equal everywhere.
        t: step, from 0.
        n: number of workers in all.
        d: length of the vectors.
        workers: numbers of this party's workers, in the order of the rows of its (W, d)
            tensors.
    """

    seed: int
    t: int
    n: int
    d: int
    workers: tuple[int, ...]

    @property
    def serves(self) -> bool:
        """Whether the server is here: it is where worker 0 is."""
        return 0 in self.workers

    def coin(self, purpose: str, p: float) -> bool:
        """Return True with probability p; the same on all parties."""
        if p >= 1.0:
            return True
        drawn = stream(self.seed, "bidirectional", self.t, purpose)
        return bool(torch.rand((), generator=drawn, dtype=torch.float32, device="cpu") < p)


@dataclass(frozen=True)
class Sent:
    """What an uplink returns.

    Attributes:
        own: C_i(v_i) of this party's workers, (W, d).
        mean: mean of C_i(v_i) over all n workers, (d,); None where there is no server.
    """

    own: Tensor
    mean: Tensor | None


Uplink = Callable[[Tensor, RandK], Sent]
"""Sends C_i(vectors_i) of this party's workers, (W, d), to the server."""


class Vetoed(Exception):
    """Raised by `Transport.serve`, on all parties, to end a step."""


_RAISED = -1.0
"""The verdict where the server's optimizer has raised."""


class Transport:
    """Carries the messages of a step between parties. This one is for a single party of
    all workers and the server.

    Args:
        ledger: where the traffic of the busiest link is entered.
    """

    def __init__(self, ledger: LinkLedger) -> None:
        self.ledger = ledger
        # of the uplink of this step; known where the server is
        self._sound = False

    def up(self, context: Context, finite: bool, vectors: Tensor, compressor: RandK) -> Sent:
        """Send C_i(vectors_i), (W, d), of this party's workers to the server.

        Args:
            context: of the step.
            finite: whether this party's gradients are.
            vectors: (W, d).
            compressor: C.
        """
        d, n = context.d, context.n
        indices = compressor.indices(context.seed, context.t, n, context.workers, d)
        values = compressor.compress(vectors, indices)
        kind = "uplink_dense" if indices is None else "uplink"
        self.ledger.enter(kind, values.shape[1], values.itemsize)
        mean = None
        gathered = self._gather(values, finite)
        if gathered is not None:
            messages, sound = gathered
            everyones = indices
            if len(context.workers) < n:
                everyones = compressor.indices(context.seed, context.t, n, range(n), d)
            mean = compressor.mean(messages, everyones, d)
            self._sound = sound and bool(torch.isfinite(mean).all())
        return Sent(compressor.decompress(values, indices, d), mean)

    def serve(
        self, estimate: Tensor | None, descend: Callable[[Tensor], Tensor], like: Tensor
    ) -> Tensor | None:
        """Let the server step, unless what came up vetoes it, and tell all parties.

        Args:
            estimate: (d,); None on a party without the server.
            descend: the server's step, estimate (d,) -> x+ (d,).
            like: has dtype and device of the vectors.

        Returns:
            x+, (d,); None on a party without the server.

        Raises:
            Vetoed: on all parties, if some worker's numbers or the mean are not finite.
            LowRankCommError: on the other parties, if the server's step has raised;
                what it has raised, where the server is.
        """
        x_next, error = None, None
        if estimate is not None and self._sound:
            try:
                x_next = descend(estimate)
            except Exception as raised:
                error = raised
        verdict = self._verdict(_RAISED if error is not None else float(self._sound), like)
        if verdict < 0:
            self._tell(error, like)
        if not verdict > 0:
            raise Vetoed
        return x_next

    def down(self, context: Context, change: Tensor | None, blocks: Blocks, like: Tensor) -> Tensor:
        """Send Q_i(change) from the server to worker i.

        Args:
            context: of the step.
            change: (d,); None on a party without the server.
            blocks: the draw that defines Q_i.
            like: has dtype and device of the vectors.

        Returns:
            Q_i(change) of this party's workers, (W, d).
        """
        assert change is not None
        self.ledger.enter("downlink", blocks.length(), like.itemsize)
        return blocks.restrict(change, context.workers)

    def broadcast(self, vector: Tensor | None, like: Tensor) -> Tensor:
        """Send the server's vector, None on a party without the server, whole to every
        party; `like` has its shape and dtype.
        """
        self.ledger.enter("downlink_dense", like.numel(), like.itemsize)
        return self._from_server(torch.empty_like(like) if vector is None else vector)

    def _gather(self, values: Tensor, finite: bool) -> tuple[Tensor, bool] | None:
        """Return all workers' messages, (n, K), and whether all numbers are finite;
        None where there is no server.
        """
        return values, finite

    def _verdict(self, verdict: float, like: Tensor) -> float:
        """Return what the server found; `like` has dtype and device of a message."""
        return verdict

    def _tell(self, error: Exception | None, like: Tensor) -> NoReturn:
        """Raise on all parties; `error` is there where the server is."""
        assert error is not None
        raise error

    def _from_server(self, tensor: Tensor) -> Tensor:
        """Return the server's tensor on every party; elsewhere it is overwritten."""
        return tensor
