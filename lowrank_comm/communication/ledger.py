"""The byte ledger: what a worker handed to the collectives, by kind, counted where the
buffers are packed.

Counted is the payload: elements times bytes of the wire dtype, or the bytes of
quantized blocks. A ring all-reduce carries 2 (N - 1) / N times that over each worker's
link, compressed or not, and so do a quantized mean's two legs, or its gather between
two workers; so ratios are ratios of traffic too. A gather carries N - 1 times its
payload, N / 2 times what an all-reduce does: its surplus, (N / 2 - 1) times its
payload, is kept apart and counts in the ratios. So is what fills up the shares of a
quantized mean of two legs, less than a block a worker.

Kinds: "factors" (P and Q), "warmup" (whole matrices of the first steps), "restart" (the
whole matrix of an SVD restart, or the
factors of a randomized one), "broadcast" (singular vectors computed on one worker),
"scores" (by which GreedyLore chooses), "gather" (of ATOMO), "rows" (which rows of an
embedding are sent), "dense" (what is not compressed), "control" (one finite flag and
the mask of missing gradients), "fingerprint" (once, at the start), "consolidation"
(error memory averaged for a checkpoint). Where ranks of a node share a worker's
matrices, what goes between them is counted apart, by its own kinds: "gradients" (the
exact mean inside the node), "results" (the way back), "sums" (P^T P, Delta^T P),
"rows", "shares", "control". A process without a process group counts what it would hand
over, and no collectives.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from functools import partial


@dataclass
class PassStats:
    """What one pass sent and took; filled while it runs, vetoed or not.

    Attributes:
        bytes: kind -> bytes handed to collectives by this worker.
        inside: kind -> bytes that this rank handed to collectives between the ranks of
            its node.
        collectives: number of collectives.
        surplus: bytes that gathers carry beyond an all-reduce of the same payload, and
            the filling of quantized shares.
        spared: bytes that the same packets would have had more without quantization.
        seconds: phase -> host seconds; see `reduction.report.StepReport`.
    """

    bytes: Counter[str] = field(default_factory=Counter)
    inside: Counter[str] = field(default_factory=Counter)
    collectives: int = 0
    surplus: float = 0.0
    spared: float = 0
    seconds: defaultdict[str, float] = field(default_factory=partial(defaultdict, float))

    def add(self, other: PassStats) -> None:
        """Add the counts of another pass."""
        self.bytes.update(other.bytes)
        self.inside.update(other.inside)
        self.collectives += other.collectives
        self.surplus += other.surplus
        self.spared += other.spared
        for phase, spent in other.seconds.items():
            self.seconds[phase] += spent


@dataclass
class Ledger(PassStats):
    """The totals over a run: the sums of the stats of all its passes, and the counts
    below.

    Attributes:
        uncompressed_bytes: what the same steps would have carried uncompressed, in the
            gradients' own dtypes.
        steps: compressed passes, vetoed ones included.
        vetoed: passes that some worker vetoed.
        restarts: matrices restarted, in steps that were committed.
    """

    uncompressed_bytes: int = 0
    steps: int = 0
    vetoed: int = 0
    restarts: int = 0

    def enter(self, stats: PassStats, uncompressed_bytes: int, applied: bool) -> None:
        """Add one pass, what it sent inside the node and its host seconds included."""
        self.add(stats)
        self.uncompressed_bytes += uncompressed_bytes
        self.steps += 1
        self.vetoed += not applied

    @property
    def total_bytes(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes.values())

    @property
    def ratio(self) -> float:
        """Uncompressed bytes over bytes sent, with the surplus of gathers; 1.0 before
        the first step.
        """
        return ratio_of(self.uncompressed_bytes, self.total_bytes, self.surplus)

    @property
    def ratio_without_codes(self) -> float:
        """What `ratio` would be if nothing were sent quantized: the whole model's
        before quantization.
        """
        further = self.surplus + self.spared
        return ratio_of(self.uncompressed_bytes, self.total_bytes, further)


def ratio_of(uncompressed: int, sent: int, further: float) -> float:
    """Return uncompressed bytes over bytes sent and what counts beside them; 1.0 where
    nothing was sent.
    """
    return uncompressed / (sent + further) if sent else 1.0
