"""Which faults there are: engines x kinds x seeds, and what a seed makes of a cell."""

from __future__ import annotations

import random
from dataclasses import dataclass

from tests.faults.injectors import DAMAGES, KINDS, Fault
from tests.faults.worker import ENGINES, WORLD

STEPS, EVERY = 12, 3
SEEDS = 4
"""Seeds of a cell: 7 engines x 8 kinds x 4 seeds are 224 faults."""
IMPOSSIBLE: dict[tuple[str, str], str] = {}
"""Cells that cannot exist, and why. There is none: every engine here has processes, a
network, a disk and files."""


@dataclass(frozen=True)
class Planned:
    """A fault of the campaign.

    timeout: of the process group. damage, where: what is done to the file, for "damaged
    file"; file: which of the state's files, as a fraction of their number.
    """

    engine: str
    kind: str
    seed: int
    fault: Fault
    timeout: float = 60.0
    damage: str = ""
    where: float = 0.0
    file: float = 0.0

    @property
    def key(self) -> str:
        """The fault's name in the rows."""
        return f"{self.engine}/{self.kind}/{self.seed}"


@dataclass(frozen=True)
class Measured:
    """What the uninterrupted run has shown of its saves: seconds, a rank's changes of
    files, and bytes of a checkpoint.
    """

    seconds: float
    events: list[int]
    bytes: int


def cells() -> list[tuple[str, str]]:
    """Engine and kind of every cell that can exist."""
    return [
        (engine, kind) for kind in KINDS for engine in ENGINES if (engine, kind) not in IMPOSSIBLE
    ]


def plan(engine: str, kind: str, seed: int, measured: Measured) -> Planned:
    """Draw a fault: rank, moment and measure, all from cell and seed."""
    draw = random.Random(f"{engine}/{kind}/{seed}")
    rank, save = draw.randrange(WORLD[engine]), EVERY * draw.randrange(1, STEPS // EVERY + 1)
    step, point = draw.randrange(2, STEPS + 1), draw.choice(["step", "between"])
    where, file, left = draw.random(), draw.random(), draw.random()
    if kind == "SIGKILL":
        # a seed in four each: in a step, before a change of a file, at any time in a
        # save, between a save and the next step
        if seed % 4 == 1:
            rank = measured.events.index(max(measured.events))
            event = 1 + int(where * measured.events[rank])
            return Planned(engine, kind, seed, Fault(kind, rank, "save", save, event=event))
        if seed % 4 == 2:
            delay = 1e-4 + where * 1.2 * measured.seconds
            return Planned(engine, kind, seed, Fault(kind, rank, "save", save, delay=delay))
        if seed % 4 == 3:
            return Planned(engine, kind, seed, Fault(kind, rank, "saved", save))
        return Planned(engine, kind, seed, Fault(kind, rank, point, step))
    if kind in ("SIGSTOP", "link down"):
        # every second time longer than the group waits, so that the run must stop
        seconds = 30.0 if kind == "SIGSTOP" else 10.0
        timeout = seconds / 2 if seed % 2 else 90.0
        point = draw.choice([point, "save"])
        fault = Fault(kind, rank, point, save if point == "save" else step, seconds=seconds)
        return Planned(engine, kind, seed, fault, timeout)
    if kind in ("exception", "exit 0"):
        point = draw.choice([point, "save"])
        return Planned(
            engine, kind, seed, Fault(kind, rank, point, save if point == "save" else step)
        )
    if kind in ("full disk", "read-only disk"):
        # before any step whose interval has a save
        kept = int(left * measured.bytes)
        return Planned(engine, kind, seed, Fault(kind, rank, "step", step, left=kept))
    # the run has ended right after a save, whose file is damaged before the next start
    fault = Fault(kind, rank, "saved", EVERY * draw.randrange(2, STEPS // EVERY + 1))
    return Planned(engine, kind, seed, fault, 60.0, draw.choice(DAMAGES), where, file)
