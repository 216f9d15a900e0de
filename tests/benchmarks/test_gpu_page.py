"""The section of the page that tells what was found on a GPU, from a small file."""

from __future__ import annotations

from typing import Any

from benchmarks.page.gpu import section


def timed(name: str, over_hook: float) -> dict[str, Any]:
    """A check that timed a step."""
    milliseconds = {side: {"median": 12.34} for side in ("ours", "hook", "copy")}
    ratios = {
        key: {"median": value, "low": value, "high": value}
        for key, value in (("over_hook", over_hook), ("over_copy", 3.0))
    }
    figures = {"milliseconds": milliseconds, "ratios": ratios, "parameters": 350_000_000}
    return {"part": "times", "check": name, "status": "passed", "text": "", "figures": figures}


CHECKS = [
    timed("time of a step, 20M", 1.5),
    timed("time of a step, 350M", 0.5),
    {
        "part": "times",
        "check": "with svd restarts",
        "status": "passed",
        "text": "",
        "figures": {"milliseconds": {"median": 99.0}, "parameters": 350_000_000},
    },
    {"part": "costs", "check": "waits", "status": "failed", "text": "a | b", "figures": {}},
]
GPU = {"name": "X", "count": 1, "memory": 80 * 2**30, "cuda": "12.9", "nccl": "2.27.3"}


def test_what_was_found_and_what_was_lost() -> None:
    text = section({"results": {"gpu": GPU, "checks": CHECKS}})
    assert "1 x X with 80 GiB, CUDA 12.9, NCCL 2.27.3." in text
    assert "Of the checks 3 passed, 1 failed and 0 skipped." in text
    assert "| time of a step, 350M | 350M | 12.3 | 12.3 | 12.3 | 0.50 (0.50-0.50) | 3.00" in text
    assert "| with svd restarts | 350M | 99 |" in text
    assert "The hook is faster: time of a step, 20M.\n" in text
    assert "| waits | costs | failed | a \\| b |" in text


def test_a_run_without_a_gpu_says_so() -> None:
    text = section({"results": {"gpu": None, "checks": CHECKS[1:]}})
    assert "No GPU" in text
    assert "The hook is faster nowhere.\n" in text
