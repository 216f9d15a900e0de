"""The figures of a cell (a method on a model and a network), from the rows of a run."""

from __future__ import annotations

import math
import statistics
from typing import Any

from benchmarks.evidence import paired, summary
from benchmarks.network.methods import BASELINE, DEFAULT, METHODS, RESTART_EVERY
from benchmarks.network.traffic import Sent


def seconds(rounds: dict[int, dict[str, Any]], method: str) -> list[float]:
    """Return a step's seconds in each round: those of the host that took longest."""
    return [max(of[method]["seconds"]) for _, of in sorted(rounds.items())]


def _median(rounds: dict[int, dict[str, Any]], method: str, column: str) -> float:
    """Return the median over rounds of the mean over hosts."""
    return statistics.median(statistics.fmean(of[method][column]) for of in rounds.values())


def expected(about: dict[str, Any], ledger: float) -> float:
    """Return the bytes that a step should put on a host's link, by the ledger (by
    counted collectives for a peer), with the allowance of `traffic`; the barrier that
    ends a repetition is part of what the kernel counts.
    """
    payload = about["counted_payload"]
    if not math.isnan(ledger):
        payload = about["ring"] * ledger + about["payload_beside_the_ledger"]
    return Sent(payload, about["messages"]).on_the_wire() + about["barrier"] / about["steps"]


def verdict(rounds: dict[int, dict[str, Any]], method: str) -> dict[str, Any] | None:
    """Return how a method of ours stands against the peer that does best against it:
    "lost" or "won" where the quartiles of the paired ratios agree, else "level"; None
    for a peer.
    """
    there = next(iter(rounds.values()))
    mine = seconds(rounds, method)
    ratios = {
        peer: paired(mine, seconds(rounds, peer)) for peer in METHODS[method].peers if peer in there
    }
    if not ratios:
        return None
    peer = max(ratios, key=lambda one: ratios[one]["median"])
    ratio = ratios[peer]
    word = "lost" if ratio["low"] > 1 else "won" if ratio["high"] < 1 else "level"
    return {"verdict": word, "peer": peer, "ratio": ratio}


def cell(rounds: dict[int, dict[str, Any]], about: dict[str, Any], method: str) -> dict[str, Any]:
    """Return what the JSON file holds of a method that ran."""
    taken = seconds(rounds, method)
    sent = _median(rounds, method, "sent")
    ledger = _median(rounds, method, "ledger")
    should = expected(about, ledger)
    found: dict[str, Any] = {
        "steps_of_a_repetition": about["steps"],
        "seconds": summary(taken),
        "sent_bytes": sent,
        "received_bytes": _median(rounds, method, "received"),
        "expected_bytes": should,
        "kernel_over_expected": sent / should,
        "ledger_bytes": None if math.isnan(ledger) else ledger,
        "against_peers": verdict(rounds, method),
    }
    if BASELINE in next(iter(rounds.values())):
        found["over_ddp"] = paired(taken, seconds(rounds, BASELINE))
    if method == DEFAULT:
        # its first step restarts; one sample
        restart, ordinary = about["warm_up_seconds"][0], found["seconds"]["median"]
        found["restart_seconds"] = restart
        found["seconds_with_restarts"] = ordinary + (restart - ordinary) / RESTART_EVERY
    return found
