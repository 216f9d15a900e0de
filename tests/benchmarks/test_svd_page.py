"""The section of the page that tells what an SVD restart costs, from a small file."""

from __future__ import annotations

from benchmarks.evidence import summary
from benchmarks.page.svd import section

TIMES = [
    {"m": 40, "n": 30, "rank": 4, "krylov": summary([1.0, 2.0, 3.0]), "exact": summary([20.0])},
    {"m": 4096, "n": 14336, "rank": 4, "krylov": summary([2.5]), "exact": None},
]
ENERGIES = [
    {"rank": 4, "kind": kind, "captured": share}
    for kind, share in (("gap", 0.9999), ("gap", 0.9991), ("flat", 0.9812))
]


def test_times_and_the_least_that_was_captured() -> None:
    text = section({"results": {"times": TIMES, "energies": ENERGIES}})
    assert "| 40 x 30 | 4 | 2 (1.5-2.5) | 20 |" in text
    assert "| 4096 x 14336 | 4 | 2.5 | not timed |" in text
    assert "| 4 | 0.9991 | 0.9812 |" in text
