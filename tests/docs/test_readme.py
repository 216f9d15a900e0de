"""What the README shows runs as it stands there."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(heading: str, language: str) -> str:
    """The first block of a language under a heading."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", section, re.DOTALL)
    assert found, f"no {language} under {heading}"
    return found.group(1)


def run(command: list[str], folder: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "RANK"} | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@pytest.mark.slow
def test_the_plain_loop(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(block("A plain loop", "python"))
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    printed = run([sys.executable, *launcher, "train.py"], tmp_path)
    assert "over 2 workers" in printed
    assert printed.count("StepReport(step=2, applied=True") == 2


def test_the_plain_loop_without_a_launcher(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which is as good as a fresh one to a single worker."""
    monkeypatch.delenv("RANK", raising=False)
    exec(compile(block("A plain loop", "python"), "train.py", "exec"), {"__name__": "__main__"})
    printed = capsys.readouterr().out
    assert "over 1 worker" in printed
    assert printed.count("StepReport(step=2, applied=True") == 1


@pytest.mark.slow
def test_hsdp(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(block("DDP, FSDP2, HSDP", "python"))
    printed = run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "4",
            "train.py",
        ],
        tmp_path,
    )
    assert "over 2 nodes of 2 ranks, FSDP2, HSDP" in printed
    assert printed.count("StepReport(step=2, applied=True") == 4


def test_the_engine_matrix_is_as_the_tests_are() -> None:
    done = subprocess.run(
        [sys.executable, "tests/support/engine_matrix.py", "--check"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_setting_is_in_the_table() -> None:
    from lowrank_comm.config import Section

    algorithms = (ROOT / "docs/algorithms.md").read_text(encoding="utf-8")
    rows = [
        line.split("|")[1] for line in (README + algorithms).splitlines() if line.startswith("| `")
    ]
    for name, field in Section.model_fields.items():
        assert any(f"`{name}`" in row for row in rows), name
        if isinstance(field.default, str | int | float) and field.default is not None:
            written = (
                f'"{field.default}"' if isinstance(field.default, str) else f"{field.default:g}"
            )
            assert (
                f"| `{name}` | `{written}` |" in README or f"| `{name}` | {written} |" in README
            ), name


def test_every_file_that_it_names_is_there() -> None:
    named = re.findall(
        r"\]\(([\w./-]+?)(?:#[\w-]*)?\)|`((?:configs|examples|docs|benchmarks)/[\w./-]+)`", README
    )
    for path in (one or other for one, other in named):
        assert (ROOT / path).exists(), path
