"""The parts of the check: which ranks, over which backend, make which checks, and the
share of the time that each may take.
"""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu import correctness, costs, speed
from benchmarks.gpu.outcome import Check


@dataclass(frozen=True)
class Part:
    """Checks that are made by one set of processes.

    Attributes:
        name: of its checks (`checks_of`), and heading in the table.
        backend: of torch.distributed.
        ranks: how many processes.
        share: of the whole time, in parts of the sum over all parts; what a part leaves
            over, those after it have.
    """

    name: str
    backend: str
    ranks: int
    share: int


ONE, SEVERAL, EACH, COSTS, TIMES = "one rank", "several ranks", "a rank a GPU", "costs", "times"


def checks_of(part: str) -> tuple[Check, ...]:
    """Return the checks of a part."""
    if part == COSTS:
        return costs.CHECKS
    if part == TIMES:
        return speed.CHECKS
    return correctness.CHECKS


def parts(kind: str, gpus: int) -> list[Part]:
    """Return the parts of the check on a machine.

    NCCL refuses two ranks on one GPU, and gloo carries tensors of a GPU by way of the
    CPU: so several ranks of one GPU use gloo.
    """
    alone = "nccl" if kind == "cuda" else "gloo"
    chosen = [Part(ONE, alone, 1, 8), Part(SEVERAL, "gloo", 4, 14)]
    if gpus > 1:
        chosen.append(Part(EACH, "nccl", gpus, 10))
    return [*chosen, Part(COSTS, alone, 1, 8), Part(TIMES, alone, 1, 22)]
