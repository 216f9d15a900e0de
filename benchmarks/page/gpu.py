"""The section of `benchmarks.gpu_check`: what was found on a GPU."""

from __future__ import annotations

from typing import Any

from benchmarks.page.tables import listed, median, ratio, table

TIMES = """\
A step beside PyTorch's `powerSGD_hook` (`batch_tensors_with_same_shape`) on equal gradients, in
turns, and a copy of as many bytes as the gradients have. Medians; of ratios with quartiles.
Below 1, this library is faster. In a restart all matrices restart.
"""
REST = """\
All other checks, by the ranks that made them; times in them are for information.
"""


def section(evidence: dict[str, Any]) -> str:
    """Return the section of a run's JSON file."""
    results = evidence["results"]
    checks = results["checks"]
    statuses = [check["status"] for check in checks]
    counts = [f"{statuses.count(one)} {one}" for one in ("passed", "failed", "skipped")]
    timed = [check for check in checks if "milliseconds" in check["figures"]]
    text = ["## On a GPU\n", f"{_hardware(results['gpu'])}Of the checks {listed(counts)}.\n"]
    if timed:
        heads = ["", "parameters", "ours ms", "hook ms", "copy ms", "ours / hook", "ours / copy"]
        text += [TIMES, table(heads, [_times(check) for check in timed]), _lost(timed)]
    rest = [
        [check["check"], check["part"], check["status"], check["text"].replace("|", "\\|")]
        for check in checks
        if check not in timed
    ]
    return "\n".join([*text, REST, table(["check", "ranks", "result", "found"], rest)])


def _hardware(gpu: dict[str, Any] | None) -> str:
    if gpu is None:
        return "No GPU: this run only tried the checks, on CPU tensors. "
    return (
        f"{gpu['count']} x {gpu['name']} with {gpu['memory'] / 2**30:.0f} GiB, CUDA {gpu['cuda']},"
        f" NCCL {gpu['nccl']}. "
    )


def _times(check: dict[str, Any]) -> list[str]:
    figures = check["figures"]
    cells = [check["check"], f"{figures['parameters'] / 1e6:.0f}M"]
    if "ratios" not in figures:
        return [*cells, median(figures["milliseconds"]), *[""] * 4]
    times, ratios = figures["milliseconds"], figures["ratios"]
    cells += [median(times[side]) for side in ("ours", "hook", "copy")]
    return cells + [ratio(ratios[key]) for key in ("over_hook", "over_copy")]


def _lost(timed: list[dict[str, Any]]) -> str:
    lost = [
        check["check"]
        for check in timed
        if check["figures"].get("ratios", {"over_hook": {"median": 0}})["over_hook"]["median"] > 1
    ]
    return f"The hook is faster: {'; '.join(lost)}.\n" if lost else "The hook is faster nowhere.\n"
