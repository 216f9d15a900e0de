"""Figures for loggers, and JSON lines for plain loops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from lowrank_comm import CompressedOptimizer, ConfigError, Figures, PowerSGD, PowerSGDPlus, StepLog
from tests.support.gloo import GlooPool


def small(rank: int = 0, **keywords: object) -> tuple[nn.Module, CompressedOptimizer]:
    torch.manual_seed(0)
    model = nn.Linear(32, 24)
    compressor = PowerSGDPlus(rank=2, restart_every=3, restart="randomized")
    return model, CompressedOptimizer(
        torch.optim.SGD(model.named_parameters(), lr=0.1), compressor, **keywords
    )


def step(model: nn.Module, optimizer: CompressedOptimizer, factor: float = 1.0) -> float:
    loss = (model(torch.randn(8, 32)) ** 2).mean() * factor
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


def test_figures_are_of_the_steps_between() -> None:
    model, optimizer = small()
    figures = Figures(optimizer)
    assert figures.since_last() == {}
    for _ in range(4):
        step(model, optimizer)
    four = figures.since_last()
    assert four["compression/steps"] == 4
    # of the one matrix, at t = 0 and 3
    assert four["compression/restarts"] == 2
    ledger = optimizer.ledger
    assert four["compression/bytes"] == ledger.total_bytes / 4
    assert four["compression/ratio"] == ledger.uncompressed_bytes / ledger.total_bytes
    assert four["compression/captured_energy"] == optimizer.last_report.captured_energy  # type: ignore[union-attr]
    assert four["compression/error_norm"] == pytest.approx(
        float(optimizer.error_memory()["weight"].norm())
    )
    phases = {key.removeprefix("compression/ms/") for key in four if "/ms/" in key}
    assert phases == {"compress", "communicate", "decompress", "commit"}
    for phase in phases:
        assert four[f"compression/ms/{phase}"] == pytest.approx(1e3 * ledger.seconds[phase] / 4)
    before = ledger.total_bytes
    step(model, optimizer)
    one = figures.since_last()
    assert one["compression/steps"] == 1
    assert one["compression/restarts"] == 0
    assert one["compression/bytes"] == ledger.total_bytes - before
    assert all(type(value) is float for value in one.values())


def test_skipped_steps_are_counted() -> None:
    model, optimizer = small()
    figures = Figures(optimizer)
    step(model, optimizer)
    step(model, optimizer, float("nan"))
    found = figures.since_last()
    assert (found["compression/steps"], found["compression/skipped_steps"]) == (2, 1)
    assert optimizer.step_was_skipped
    # nothing was sent in the last one
    assert "compression/captured_energy" not in found
    step(model, optimizer)
    assert not optimizer.step_was_skipped


def test_without_a_compressed_matrix() -> None:
    layer = nn.Linear(4, 4)
    optimizer = CompressedOptimizer(
        torch.optim.SGD(layer.named_parameters(), lr=0.1), PowerSGD(rank=4)
    )
    figures = Figures(optimizer)
    layer(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    found = figures.since_last()
    # the fingerprint and control numbers count
    assert 0.5 < found["compression/ratio"] < 1
    assert "compression/error_norm" not in found


def logged(rank: int, path: str) -> None:
    model, optimizer = small()
    torch.manual_seed(rank)
    with StepLog(optimizer, path, every=2) as log:
        for k in range(5):
            loss = step(model, optimizer)
            log.write(loss=torch.tensor(loss), epoch=k // 3)


def test_json_lines_are_written_by_one_process_and_go_on(gloo: GlooPool, tmp_path: Path) -> None:
    path = tmp_path / "new" / "log.jsonl"
    for _ in range(2):
        gloo.run(logged, 2, str(path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 2, 4]
    assert all(line["compression/steps"] == 2 and line["compression/ratio"] > 1 for line in lines)
    assert all(isinstance(line["loss"], float) for line in lines)
    assert [line["epoch"] for line in lines] == [0, 1, 0, 1]


@pytest.mark.parametrize("every", [0, True, 1.5, "2"])
def test_a_wrong_interval(every: object, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="every must be an integer of at least 1, got"):
        StepLog(small()[1], tmp_path / "log.jsonl", every=every)  # type: ignore[arg-type]


def test_what_has_no_figures() -> None:
    with pytest.raises(ConfigError, match=r"SGD has no ledger.*accelerate\.get\(optimizer\)"):
        Figures(small()[1].base)  # type: ignore[arg-type]
