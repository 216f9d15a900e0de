"""This library beside its peers on four hosts with shaped links, by the clock and by
the kernel's byte counters.

    # as root, Linux, iproute2; about 25 minutes, 16 GB of memory
    make bench-network
    # a minute
    make bench-network NETWORK_ARGS=--quick
    python -m benchmarks.bench_network --networks 100mbit --models 5M \\
        --methods ddp,powersgd

For each network, four processes (one a host: a network namespace each, `netlab`) build
every method on a model of its own and time them in turns: in a repetition each method
takes its steps once, in an order that is drawn anew, so that a ratio is of two times
that were taken one after the other. What is timed is a step of training, forward pass
to optimizer step, after warm-up; a repetition's time is that of the slowest host. The
bytes that leave each host's interface are the kernel's, and are held against the
library's ledger (`network.traffic`).

Rows are kept in the folder as they come. The same command goes on where a run was
interrupted, as long as no source has changed. epfml's `powersgd` is installed beside
(--epfml), or taken from a checkout of its repository there; where neither can be had,
its cells say so.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

from benchmarks.evidence import RESULTS, ROOT, envelope, read, write
from benchmarks.netlab import Lab, LabError, exit_on_sigterm, missing
from benchmarks.network import epfml
from benchmarks.network.figures import cell
from benchmarks.network.methods import (
    EPFML,
    HOSTS,
    METHODS,
    MODELS,
    NODES,
    RESTART_EVERY,
    SEQUENCE,
    Setting,
)
from benchmarks.network.page import section
from benchmarks.network.rows import Job, load, rounds, setup
from benchmarks.network.traffic import HEADERS, MESSAGE_BYTES
from benchmarks.network.worker import SEED
from lowrank_comm.lab.runner.sources import sources_hash

# what takes part without being imported by its name
UNNAMED = ("benchmarks/delayed_switch.py", "integrations/fsdp.py")
# what the rows depend on: a table may be laid out anew without a new run
MEASURING = ("benchmarks/network/worker.py", "benchmarks/netlab.py", *UNNAMED)
ROWS = "rows.jsonl"
_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")


@dataclass(frozen=True)
class Network:
    """Links of a lab."""

    name: str
    mbit: float | None
    delay_ms: float = 0.0


NETWORKS = {
    "100mbit": Network("100 Mbit/s", 100),
    "1gbit": Network("1 Gbit/s", 1000),
    "unshaped": Network("unshaped", None),
    "1gbit-20ms": Network("1 Gbit/s, 20 ms one way", 1000, 20),
}
PUBLISHED = ("5M", "21M")
# that a method's turn lasts, where a step is shorter
REPETITION_SECONDS = 0.7


def measure(network: str, job: Job, folder: Path) -> None:
    """Let the hosts of a network do their job."""
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    links = NETWORKS[network]
    quiet = {
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with Lab(HOSTS, links.mbit, delay_ms=links.delay_ms) as lab:
        command = [sys.executable, "-m", "benchmarks.network.worker", str(path)]
        lab.run(command, env=quiet, cwd=ROOT)


def collect(
    rows: Path,
    sources: str,
    networks: list[str],
    models: list[str],
    methods: list[str],
    reasons: dict[str, str],
) -> dict[str, Any]:
    """Return the figures of all cells: network -> model -> method."""
    cells: dict[str, Any] = {}
    for network in networks:
        for model in models:
            found = load(rows, sources, network, model)
            runnable = [method for method in methods if method not in reasons]
            done, about = rounds(found, runnable), setup(found)
            of = {method: {"reason": reasons[method]} for method in methods if method in reasons}
            of |= {method: cell(done, about[method], method) for method in runnable}
            cells.setdefault(network, {})[model] = {method: of[method] for method in methods}
    return cells


def run(
    networks: list[str],
    models: list[str],
    methods: list[str],
    repetitions: int,
    folder: Path,
    epfml_folder: Path,
    target: Path,
    quick: bool = False,
) -> None:
    """Measure what is not in the folder yet, and write the JSON file.

    Args:
        networks: keys of `NETWORKS`.
        models: keys of `MODELS`.
        methods: keys of `METHODS`.
        repetitions: of each cell.
        folder: of rows.
        epfml_folder: see `epfml.find`.
        target: the JSON file.
        quick: whether this is for a test.
    """
    evidence = envelope(__file__, seeds=[SEED], quick=quick, runs=UNNAMED)
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows, sources = folder / ROWS, sources_hash(*(ROOT / path for path in MEASURING))
    package = epfml.find(epfml_folder) if set(methods) & set(EPFML) else None
    reasons = dict.fromkeys(set(methods) & set(EPFML), package) if isinstance(package, str) else {}
    runnable = [method for method in methods if method not in reasons]
    before = 0
    for network in networks:
        left = {}
        for model in models:
            done = rounds(load(rows, sources, network, model), runnable)
            left[model] = [number for number in range(repetitions) if number not in done]
            before += len(done)
        if any(left.values()):
            print(NETWORKS[network].name, flush=True)
            place = str(package) if isinstance(package, Path) else None
            job = Job(network, runnable, left, REPETITION_SECONDS, place, sources, str(rows))
            measure(network, job, folder)
    results = {
        "hosts": HOSTS,
        "networks": {network: NETWORKS[network].name for network in networks},
        "models": {
            model: sum(p.numel() for p in Setting(model).new_model().parameters())
            for model in models
        },
        "methods": {method: METHODS[method].label for method in methods},
        "repetitions": repetitions,
        "nodes": NODES,
        "sequence": SEQUENCE,
        "restart_every": RESTART_EVERY,
        "allowance": {"headers": HEADERS, "message_bytes": MESSAGE_BYTES},
        "rounds_of_earlier_runs": before,
        "deepspeed": version("deepspeed"),
        "transformers": version("transformers"),
        "congestion_control": _CONGESTION_CONTROL.read_text().strip(),
        "cells": collect(rows, sources, networks, models, methods, reasons),
    }
    write(target, evidence, results)


def main(
    networks: Annotated[str, typer.Option(help="of " + ", ".join(NETWORKS))] = ",".join(NETWORKS),
    models: Annotated[str, typer.Option(help="of " + ", ".join(MODELS))] = ",".join(PUBLISHED),
    methods: Annotated[str, typer.Option(help="of " + ", ".join(METHODS))] = ",".join(METHODS),
    repetitions: Annotated[int, typer.Option(help="of each cell", min=1)] = 5,
    folder: Annotated[Path, typer.Option(help="of the rows")] = Path("runs/bench_network"),
    epfml_folder: Annotated[
        Path, typer.Option("--epfml", help="epfml's package, or where to install it")
    ] = Path("runs/epfml"),
    quick: Annotated[
        bool, typer.Option(help="two methods on a small model, over one network")
    ] = False,
    target: Annotated[Path | None, typer.Option("--json", help="the file of figures")] = None,
) -> None:
    """Time all methods in turns on each network, and print the tables."""
    exit_on_sigterm()
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    reason = missing()
    if reason is not None:
        sys.exit(f"bench_network: {reason}")
    if quick:
        networks, models, methods, repetitions = "1gbit", "1M", "ddp,powersgd", 2
    if target is None:
        target = folder / "bench_network.json" if quick else RESULTS / "bench_network.json"
    chosen = []
    for given, known in ((networks, NETWORKS), (models, MODELS), (methods, METHODS)):
        names = given.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            sys.exit(f"bench_network: no {unknown[0]!r}; there are {', '.join(known)}")
        chosen.append(names)
    try:
        run(*chosen, repetitions, folder, epfml_folder, target, quick)
    except LabError as problem:
        sys.exit(f"bench_network: {problem}")
    print(section(read(target)))


if __name__ == "__main__":
    typer.run(main)
