"""examples/gpu_check.py, on the CPU: what needs no GPU passes, the rest is skipped with
its reason, a failure is an exit code.
"""

from __future__ import annotations

import os
import subprocess
import sys

import gpu_check
import pytest

from tests.support import ROOT

NEEDS_A_GPU = ("waits of the host in a step", "no wait for the whole device", "memory = plan")


def launched(processes: int, *arguments: str) -> dict[str, list[str]]:
    """The table's rows by check: [result, numbers]."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    if sys.platform == "linux":
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
    ]
    done = subprocess.run(
        [*command, str(ROOT / "examples" / "gpu_check.py"), "--device", "cpu", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{processes} x CPU" in done.stdout
    rows = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in done.stdout.splitlines()
        if line.startswith("│")
    ]
    return {name: cells for name, *cells in rows}


@pytest.mark.slow
def test_one_process() -> None:
    rows = launched(1)
    assert rows.keys() == {check.name for check in gpu_check.CHECKS}
    for name, (result, numbers) in rows.items():
        if name in NEEDS_A_GPU:
            assert result == "skipped"
            assert "needs a GPU" in numbers
        elif "HSDP" in name or "two levels" in name:
            assert result == "skipped"
            assert "4 ranks" in numbers
        else:
            assert result == "passed", (name, numbers)


@pytest.mark.slow
def test_four_processes() -> None:
    rows = launched(4)
    assert {name for name, (result, _) in rows.items() if result != "passed"} == set(NEEDS_A_GPU)


def test_a_failed_check_is_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also without a launcher, as a single process."""

    def wrong(device: gpu_check.Device) -> str:
        return gpu_check.demand(False, "difference 1.0")

    def broken(device: gpu_check.Device) -> str:
        raise ZeroDivisionError("by zero")

    checks = (
        gpu_check.Check("wrong", wrong),
        gpu_check.Check("broken", broken),
        gpu_check.Check("fine", lambda device: "1"),
    )
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    monkeypatch.delenv("RANK", raising=False)
    assert gpu_check.main(["--device", "cpu"]) == 1
    out = capsys.readouterr().out
    assert "rank 0: difference 1.0" in out
    assert "ZeroDivisionError: by zero" in out
    assert "1 passed, 2 failed, 0 skipped" in out
    assert gpu_check.main(["--device", "cpu", "--only", "fine"]) == 0
