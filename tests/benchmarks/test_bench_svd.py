"""The benchmark of the SVD restart, on small matrices: what it writes, and what its own
matrices capture.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import bench_svd
from benchmarks.evidence import read
from benchmarks.page import svd
from tests.benchmarks.test_page import strange_numbers


def test_a_short_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    threads = torch.get_num_threads()
    try:
        bench_svd.main(quick=True, output=tmp_path / "figures.json")
    finally:
        torch.set_num_threads(threads)
    evidence = read(tmp_path / "figures.json")
    assert evidence["quick"]
    results = evidence["results"]
    assert [(row["m"], row["n"], row["rank"]) for row in results["times"]] == [(300, 500, 4)]
    assert all(row["krylov"]["median"] > 0 < row["exact"]["median"] for row in results["times"])
    assert {row["rank"] for row in results["energies"]} == set(bench_svd.RANKS)
    assert results["least"]["gap"] >= 0.999
    assert results["least"]["flat"] >= 0.98
    assert "torch.linalg.svd" in capsys.readouterr().out
    text = svd.section(evidence)
    assert "| 300 x 500 | 4 | " in text
    assert strange_numbers(text, evidence) == []


def test_the_spectra_are_of_their_kind() -> None:
    for r in bench_svd.RANKS:
        kinds = set()
        for kind, name, values in bench_svd.spectra(r, 700):
            assert bool((values.diff() <= 1e-12).all()), name
            assert kind == "flat" or float(values[r]) <= 0.9 * float(values[r - 1]) + 1e-12, name
            kinds.add(kind)
        assert kinds == {"gap", "flat"}
