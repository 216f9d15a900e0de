"""The comparison over slow links, on four real hosts (network namespaces): facts that
do not depend on the clock.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.support import ROOT
from tests.support.needs import require

sys.path.insert(0, str(ROOT / "benchmarks"))

import demo_cluster
import netlab
from rich.console import Console

HOSTS, STEPS = 4, 10


def labs() -> list[str]:
    """Namespaces that this process' labs have left."""
    listed = subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=True
    ).stdout
    return [line for line in listed.splitlines() if line.startswith(f"lrc{os.getpid()}x")]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_compression_saves_bytes_on_the_wire(tmp_path: Path) -> None:
    require(netlab.missing())
    # Faster links than the default's: nothing here is about time.
    plain, compressed = demo_cluster.compare(
        HOSTS, 500, STEPS, "S", demo_cluster.COMPRESSED, tmp_path, timeout=250
    )
    assert labs() == []
    for run in (plain, compressed):
        assert [step["step"] for step in run.steps] == list(range(1, STEPS + 1))
        assert all(0 < step["loss"] < 10 for step in run.steps)
        assert len(run.network.sent) == HOSTS
        assert run.summary.setup["workers"] == HOSTS
    assert plain.summary.differences(compressed.summary) == []
    # Beside the gradients the kernel counts headers, the evaluation, and the broadcast
    # of the parameters at the start: as many bytes as the gradient has, at most once
    # from each host on average.
    gradients = plain.summary.uncompressed_bytes / STEPS
    ring = 2 * (HOSTS - 1) / HOSTS * gradients * STEPS
    mean = [sum(run.network.sent) / HOSTS for run in (plain, compressed)]
    assert ring < mean[0] < 1.02 * ring + gradients
    # One step of the ten restarts and sends as much as an uncompressed one; so the
    # ratio is far below that of a long run.
    for sent, fewer in zip(plain.network.sent, compressed.network.sent, strict=True):
        assert sent > 3 * fewer
    assert mean[1] < 1.02 * compressed.all_reduced + gradients

    figures = json.loads((tmp_path / demo_cluster.FIGURES).read_text())
    assert [run["sent_by_host"] for run in figures["runs"]] == [
        plain.network.sent,
        compressed.network.sent,
    ]
    assert figures["network"]["mbit_per_second"] == 500
    assert Image.open(tmp_path / demo_cluster.PLOT).format == "PNG"
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(demo_cluster.table(plain, compressed, HOSTS, 500))
    printed = console.export_text()
    assert "sent per host" in printed and f"{plain.summary.last_loss:.3f}" in printed


def test_a_failing_run_ends_all_hosts_and_leaves_nothing() -> None:
    require(netlab.missing())
    script = (
        "import os, sys, time; rank = int(os.environ['RANK']); time.sleep(0 if rank == 1 else 60);"
        " sys.exit('told by 1')"
    )
    began = time.monotonic()
    with (
        pytest.raises(netlab.LabError, match=r"host 1 ended with 1: \s*told by 1"),
        netlab.Lab(3, 100) as lab,
    ):
        lab.run([sys.executable, "-c", script])
    assert time.monotonic() - began < 30
    assert labs() == []


def test_the_counters_see_what_crosses_the_link() -> None:
    """Host 0 sends 2 MB to host 1, at 8 Mbit/s."""
    require(netlab.missing())
    script = """if True:
        import os, socket, time
        if os.environ["RANK"] == "1":
            with socket.create_server(("", 29500)) as server:
                peer = server.accept()[0]
                while peer.recv(65536):
                    pass
        else:
            for _ in range(100):
                try:
                    peer = socket.create_connection(("10.77.0.2", 29500))
                    break
                except ConnectionRefusedError:
                    time.sleep(0.1)
            peer.sendall(bytes(2_000_000))
            peer.close()
    """
    with netlab.Lab(2, 8) as lab:
        done = lab.run([sys.executable, "-c", script], timeout=60)
    assert 2_000_000 < done.sent[0] < 2_200_000
    assert done.sent[0] <= done.received[1] + 1000
    assert done.sent[1] < 200_000
    # 2 s by the rate: the link is no faster, however loaded the machine
    assert done.seconds > 1.5


def test_a_lab_whose_owner_was_killed_is_removed_by_the_next() -> None:
    require(netlab.missing())
    code = (
        "import netlab, sys, time; lab = netlab.Lab(1, 100); lab.up(); print(lab.name, flush=True);"
        " lab.run([sys.executable, '-c', 'import time; time.sleep(300)'])"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    name = owner.stdout.readline().strip()
    deadline = time.monotonic() + 20
    while not (inside := pids(name)) and time.monotonic() < deadline:
        time.sleep(0.1)
    owner.send_signal(signal.SIGKILL)
    owner.communicate()
    while pids(name) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert inside and not pids(name), "the processes die with their owner"
    with netlab.Lab(1, 100):
        assert not Path(f"/run/netns/{name}0").exists()


def pids(name: str) -> str:
    return subprocess.run(
        ["ip", "netns", "pids", f"{name}0"], capture_output=True, text=True, check=False
    ).stdout
