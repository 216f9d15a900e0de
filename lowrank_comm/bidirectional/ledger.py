"""What went over the busiest link between a worker and the server, and on the simulated
clock how long that took.

A link carries K_up numbers to the server and K_down numbers back; links of different
workers are taken to work side by side. In a star of real machines the server's own port
carries the sum over the workers in both directions: n - 1 times as much.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class LinkLedger:
    """Totals over a run, of the busiest link; the same on all parties.

    Attributes:
        coordinates: kind -> numbers carried. "uplink" and "downlink" are compressed
            messages, "uplink_dense" and "downlink_dense" whole vectors.
        bytes: kind -> bytes; beside the kinds above "control" (a flag up, the verdict
            down), "start" (the comparison of settings, the state after a load) and
            "asked" (x, sent because `server_parameters` asked for it).
        steps: steps that were applied.
        vetoed: steps that were not.
    """

    coordinates: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    steps: int = 0
    vetoed: int = 0

    def enter(self, kind: str, numbers: int, itemsize: int) -> None:
        """Add a message of so many numbers of `itemsize` bytes."""
        self.coordinates[kind] += numbers
        self.bytes[kind] += numbers * itemsize

    def close(self, applied: bool) -> None:
        """Count a step that has ended, as applied or as vetoed."""
        self.steps += applied
        self.vetoed += not applied

    @property
    def up(self) -> int:
        """Numbers sent up by the busiest link, K_up summed over the steps."""
        return self.coordinates["uplink"] + self.coordinates["uplink_dense"]

    @property
    def down(self) -> int:
        """Numbers sent down the busiest link, K_down summed over the steps."""
        return self.coordinates["downlink"] + self.coordinates["downlink_dense"]

    @property
    def total_bytes(self) -> int:
        """Sum of the bytes of all kinds."""
        return sum(self.bytes.values())


@dataclass
class Clock:
    """The simulated clock: a step takes h B + kappa (K_up + K_down) seconds.

    Args:
        h: seconds for one stochastic gradient.
        kappa: seconds for one coordinate on a link.
        seconds: so far.
    """

    h: float = 1.0
    kappa: float = 0.0
    seconds: float = 0.0

    def step(self, batch: int, coordinates: int) -> None:
        """Add a step in which every worker computed `batch` gradients and the busiest
        link carried `coordinates`.
        """
        self.seconds += self.h * batch + self.kappa * coordinates
