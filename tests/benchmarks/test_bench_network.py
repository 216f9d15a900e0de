"""The peers on a shaped network: what is sent, by the kernel, the ledger and the count
of collectives; how rows are resumed, and what a table calls lost. No time is asserted.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import bench_network, netlab
from benchmarks.evidence import envelope, read
from benchmarks.network import epfml, figures, page, rows
from benchmarks.network.methods import METHODS
from benchmarks.network.traffic import Counts, counted
from tests.support.gloo import GlooPool
from tests.support.needs import require

# powerSGD_hook goes on in gloo's threads; int8 is an all-to-all and an all-gather
QUICK = ["ddp", "torch_hook", "powersgd", "int8"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_the_kernel_counts_is_what_the_ledger_says(tmp_path: Path) -> None:
    require(netlab.missing())
    target = tmp_path / "bench_network.json"
    arguments = (["1gbit"], ["1M"], QUICK, 2, tmp_path, tmp_path / "epfml", target, True)
    bench_network.run(*arguments)
    found = read(target)
    cells = found["results"]["cells"]["1gbit"]["1M"]
    assert list(cells) == QUICK
    for method, cell in cells.items():
        assert 0.97 < cell["kernel_over_expected"] < 1.03, method
        assert cell["seconds"]["n"] == 2
        assert (cell["ledger_bytes"] is None) == (not METHODS[method].peers)
    # an uncompressed step sends the gradients around the ring of four
    gradients = 4 * found["results"]["models"]["1M"]
    assert 1.5 * gradients < cells["ddp"]["sent_bytes"] < 1.52 * gradients
    assert cells["powersgd"]["sent_bytes"] < cells["ddp"]["sent_bytes"] / 15
    text = page.section(found)
    assert all(METHODS[method].label in text for method in QUICK)

    # the same again measures nothing
    before = (tmp_path / bench_network.ROWS).read_text()
    bench_network.run(*arguments)
    assert (tmp_path / bench_network.ROWS).read_text() == before
    again = read(target)["results"]
    assert again["rounds_of_earlier_runs"] == 2
    assert again["cells"] == found["results"]["cells"]


def count(_: int) -> dict[str, float]:
    """What each collective of two processes sends, by the model."""
    tensor = torch.zeros(1000)
    both = torch.zeros(2000)
    sent = {}
    for name, call in {
        "all_reduce": lambda: dist.all_reduce(tensor),
        "all_gather": lambda: dist.all_gather(list(both.chunk(2)), tensor),
        "all_gather_single": lambda: dist.all_gather_single(both, tensor),
        "reduce_scatter": lambda: dist.reduce_scatter_single(tensor, both),
        "all_to_all": lambda: dist.all_to_all_single(torch.empty_like(tensor), tensor),
        "broadcast": lambda: dist.broadcast(tensor, 0),
    }.items():
        counts = Counts()
        with counted(counts):
            call()
        assert counts.ours.payload == 0
        sent[name] = counts.others.payload / tensor.nbytes
    return sent


def test_collectives_are_counted_as_gloo_sends_them(gloo: GlooPool) -> None:
    expected = {
        "all_reduce": 1.0,
        "all_gather": 1.0,
        "all_gather_single": 1.0,
        "reduce_scatter": 2.0,
        "all_to_all": 0.5,
        "broadcast": 0.5,
    }
    assert gloo.run(count, 2) == [expected, expected]


def rounds_of(**seconds: list[float]) -> dict[int, dict[str, Any]]:
    """Rounds of one host in which the methods took these seconds."""
    return {
        k: {method: {"seconds": [taken[k]]} for method, taken in seconds.items()}
        for k in range(len(next(iter(seconds.values()))))
    }


@pytest.mark.parametrize(
    ("ddp", "hook", "word", "peer"),
    [
        # the best peer counts, and pairs count: each round is ten times slower
        ([2.0, 20.0, 200.0], [0.5, 5.0, 50.0], "lost", "torch_hook"),
        ([2.0, 20.0, 200.0], [3.0, 30.0, 300.0], "won", "ddp"),
        ([0.9, 11.0, 98.0], [3.0, 30.0, 300.0], "level", "ddp"),
    ],
)
def test_a_cell_is_lost_where_a_peer_is_faster(
    ddp: list[float], hook: list[float], word: str, peer: str
) -> None:
    rounds = rounds_of(powersgd=[1.0, 10.0, 100.0], ddp=ddp, torch_hook=hook)
    found = figures.verdict(rounds, "powersgd")
    assert found is not None
    assert (found["verdict"], found["peer"]) == (word, peer)
    assert figures.verdict(rounds, "ddp") is None


def cell(median: float, stands: dict[str, Any] | None) -> dict[str, Any]:
    of_three = {"n": 3, "median": median, "low": median, "high": median}
    return {
        "seconds": of_three,
        "over_ddp": of_three,
        "sent_bytes": 3e6,
        "ledger_bytes": None if stands is None else 2e6,
        "kernel_over_expected": 1.001,
        "against_peers": stands,
    }


def test_the_section_shows_what_was_lost_and_what_could_not_run() -> None:
    ratio = {"n": 3, "median": 1.25, "low": 1.2, "high": 1.3}
    lost = {"verdict": "lost", "peer": "ddp", "ratio": ratio}
    cells = {
        "ddp": cell(0.5, None),
        "epfml": {"reason": "no module"},
        "powersgd": cell(0.625, lost),
    }
    evidence = envelope(bench_network.__file__, seeds=[0])
    evidence["load"]["after"] = evidence["load"]["before"]
    evidence["results"] = {
        "hosts": 4,
        "networks": {"unshaped": "unshaped"},
        "models": {"5M": 5e6},
        "methods": {method: METHODS[method].label for method in cells},
        "repetitions": 3,
        "nodes": 2,
        "sequence": 32,
        "restart_every": 200,
        "allowance": {"headers": 0.004, "message_bytes": 400},
        "deepspeed": "0",
        "congestion_control": "cubic",
        "cells": {"unshaped": {"5M": cells}},
    }
    lines = page.section(evidence).splitlines()
    label = METHODS["powersgd"].label
    assert f"| {label} | 0.625 (0.625; 0.625-0.625) **lost** |" in lines
    assert f"| {METHODS['epfml'].label} | no module |" in lines
    assert f"| {label} | 3 | 2 | 1 |" in lines
    told = f"- unshaped, 5M: {label} takes 1.25 (1.20-1.30) times as long as DDP, fp32"
    assert lines[lines.index("### Where a peer wins") + 2] == told


def test_a_run_goes_on_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    of = {"network": "1gbit", "model": "5M", "sources": "a"}
    full = {"kind": "round", "methods": {"ddp": {}, "powersgd": {}}, **of}
    rows.append(path, full | {"round": 0})
    with path.open("a") as file:
        file.write("\n" + json.dumps(full | {"round": 1})[:40])
    rows.append(path, full | {"round": 2})
    rows.append(path, full | {"round": 3, "sources": "b"})
    rows.append(path, full | {"round": 4, "methods": {"ddp": {}}})
    found = rows.load(path, "a", "1gbit", "5M")
    assert sorted(rows.rounds(found, ["ddp", "powersgd"])) == [0, 2]
    assert sorted(rows.rounds(found, ["ddp"])) == [0, 2, 4]
    assert rows.load(path, "a", "1gbit", "21M") == []


def test_a_checkout_of_the_authors_package_is_found(tmp_path: Path) -> None:
    (tmp_path / "powersgd").mkdir()
    (tmp_path / "powersgd" / "powersgd.py").touch()
    assert epfml.find(tmp_path) == tmp_path
