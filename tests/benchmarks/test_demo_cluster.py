"""Seconds to a common loss over slow links, on four real hosts (network namespaces):
facts that do not depend on the clock.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import demo_cluster, netlab
from benchmarks.demo import page
from benchmarks.demo.training import Job
from benchmarks.evidence import read
from benchmarks.page import building, demo
from lowrank_comm.lab.runner.pages import source_of
from tests.benchmarks.test_page import strange_numbers
from tests.support import ROOT
from tests.support.needs import require

HOSTS, STEPS, WINDOW = 4, 10, 3
PART = "demo_cluster.json"


def labs() -> list[str]:
    """Namespaces that this process' labs have left."""
    listed = subprocess.run(
        ["ip", "netns", "list"], capture_output=True, text=True, check=True
    ).stdout
    return [line for line in listed.splitlines() if line.startswith(f"lrc{os.getpid()}x")]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short comparison on faster links than the published one's: nothing here is
    about time.
    """
    require(netlab.missing())
    folder = tmp_path_factory.mktemp("demo")
    demo_cluster.run(*arguments(folder), hosts=HOSTS, quick=True)
    return folder


def arguments(folder: Path) -> tuple[list[str], Job, int, int, Path, Path]:
    return ["1gbit"], Job(model="S"), STEPS, WINDOW, folder, folder / "demo_cluster.json"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_each_way_sends_what_it_says_and_is_not_run_twice(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert labs() == []
    results = read(measured / "demo_cluster.json")["results"]
    runs = results["networks"]["1gbit"]["runs"]
    assert [run["steps"] for run in runs.values()] == [STEPS, 10, 15]
    for run in runs.values():
        assert all(0 < loss < 10 for loss in run["loss"])
        assert len(run["loss"]) == len(run["seconds"]) == run["steps"]
        assert len(run["sent_by_host"]) == run["setup"]["workers"] == HOSTS
        # Beside the gradients the kernel counts headers, the evaluation, and the
        # broadcast of the parameters at the start: as many bytes as the gradient has.
        gradients = run["uncompressed_bytes"] / run["steps"]
        ring = 1.5e-6 * sum(run["counted_bytes"].values())
        assert ring < run["sent_mb"] < 1.03 * ring + 1e-6 * gradients
    plain, fp16, balanced = runs.values()
    assert 2 * fp16["counted_bytes"]["all-reduce"] == fp16["uncompressed_bytes"]
    # five steps of its warm-up, and ten that are compressed
    assert sum(balanced["counted_bytes"].values()) < balanced["uncompressed_bytes"] / 5
    # all but the schedule is equal: the first steps' learning rate alone differs
    assert plain["loss"][0] == fp16["loss"][0] == balanced["loss"][0]
    assert plain["loss"] != balanced["loss"][:STEPS]
    assert plain["crossing"]["times_as_fast"] == 1

    before = (measured / "rows.jsonl").read_text()
    monkeypatch.setattr(demo_cluster, "train", None)
    demo_cluster.run(*arguments(measured), hosts=HOSTS, quick=True)
    again = read(measured / "demo_cluster.json")["results"]
    assert again["rows_of_earlier_calls"] == 3 and again["networks"] == results["networks"]
    assert (measured / "rows.jsonl").read_text() == before


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_page_of_a_file_has_its_numbers_and_a_plot(measured: Path) -> None:
    evidence = read(measured / "demo_cluster.json")
    text = page.section(evidence)
    assert strange_numbers(text, evidence) == []
    assert re.findall(r"\]\(([\w-]+)\.png\)", text) == list(page.figures(evidence))
    shown = demo.page(measured)
    assert "](demo_cluster/1gbit.png)" in shown and building.run_of(evidence, PART) in shown
    # no path of this machine but the folder that the command was given
    assert str(ROOT) not in json.dumps(evidence["results"])


def test_the_published_page_is_of_the_published_file() -> None:
    written = demo.PAGE.read_text(encoding="utf-8")
    assert building.without_notes(written) == building.without_notes(demo.page()), (
        "run `make benchmarks-page`"
    )
    drawn = {path.name: source_of(path) for path in demo.PLOTS.glob("*.png")}
    expected = re.findall(rf"\]\({demo.PLOTS.name}/([\w-]+\.png)\)", written)
    if demo.PART.file.is_file():
        assert not read(demo.PART.file)["quick"]
        assert drawn == dict.fromkeys(expected, building.sha256(demo.PART.file))
    else:
        assert not drawn and "Not measured" in written


def finished(losses: list[float], seconds: float) -> dict[str, Any]:
    return {
        "loss": losses,
        "seconds": [5 * seconds] + [seconds] * (len(losses) - 1),
        "settled": [False] + [True] * (len(losses) - 1),
        "sent_by_host": [1e6, 3e6],
    }


def test_seconds_to_a_loss() -> None:
    """The mean of the last k steps counts, not a lucky step; the first step's seconds
    count, too.
    """
    found = demo_cluster.compared(
        {
            "uncompressed": finished([9.0, 6.0, 4.0, 2.0], 10.0),
            "quick": finished([9.0, 2.0, 8.0, 4.0, 2.0, 2.0], 1.0),
            "never": finished([9.0, 9.0, 2.0, 9.0], 1.0),
        },
        2,
    )
    assert found["target"] == 3.0
    runs = found["runs"]
    assert runs["uncompressed"]["crossing"] == {"step": 4, "seconds": 80, "times_as_fast": 1}
    assert runs["quick"]["crossing"] == {"step": 5, "seconds": 9, "times_as_fast": 80 / 9}
    assert runs["never"]["crossing"] is None
    assert runs["quick"]["step_seconds"]["median"] == 1 and runs["quick"]["sent_mb"] == 2


def test_the_losses_of_two_networks_are_compared_step_by_step() -> None:
    one = {"runs": {"uncompressed": {"loss": [3.0, 2.0]}}}
    other = {"runs": {"uncompressed": {"loss": [3.0, 2.25]}}}
    assert demo_cluster.differences({"a": one, "b": other}) == {"uncompressed": 0.25}
    assert demo_cluster.differences({"a": one, "b": one}) == {"uncompressed": 0.0}
    assert demo_cluster.differences({"a": one}) == {}


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
