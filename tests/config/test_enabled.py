"""`"enabled": false` leaves the engine alone in every way that a section is read."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lowrank_comm import CompressedOptimizer, ConfigError, PowerSGD
from lowrank_comm.bidirectional import BidirectionalOptimizer
from lowrank_comm.config import Section
from tests.support import ROOT

OFF: dict[str, Any] = {"compressor": "powersgd", "rank": 2, "enabled": False}
SAID = 'lowrank_comm: the section has "enabled": false, nothing is compressed'

engines = pytest.mark.filterwarnings("ignore")


def base_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.named_parameters(), lr=0.1)


@pytest.mark.parametrize("section", [OFF, {"compressor": "m4", "enabled": False}], ids=str)
def test_from_config_returns_the_base(
    section: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_of(nn.Linear(6, 8))
    assert CompressedOptimizer.from_config(base, section) is base
    assert capsys.readouterr().out.count(SAID) == 1
    if section["compressor"] == "m4":
        assert BidirectionalOptimizer.from_config(base, section) is base


def test_only_rank_0_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    CompressedOptimizer.from_config(base_of(nn.Linear(6, 8)), OFF)
    assert not capsys.readouterr().out


def test_true_changes_nothing() -> None:
    assert Section.parse({"enabled": True}) == Section.parse({})
    section = {"compressor": "powersgd", "enabled": True}
    made = CompressedOptimizer.from_config(base_of(nn.Linear(6, 8)), section)
    assert isinstance(made, CompressedOptimizer)


@pytest.mark.parametrize(
    "section", [OFF | {"rnk": 2}, {"compressor": "m4", "enabled": 0}, {"enabled": None}], ids=str
)
def test_the_rest_of_the_section_is_checked(section: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CompressedOptimizer.from_config(base_of(nn.Linear(6, 8)), section)


def says_what_it_drops(optimizer: Any, caplog: pytest.LogCaptureFixture) -> bool:
    """Whether an optimizer that is left alone drops a compressor's state, and says
    so.
    """
    model = nn.Linear(6, 8)
    shapes = [[tuple(p.shape) for p in group["params"]] for group in optimizer.param_groups]
    named = {tuple(p.shape): (name, p) for name, p in model.named_parameters()}
    groups = [{"params": [named[shape] for shape in group]} for group in shapes]
    base = torch.optim.SGD(groups, lr=0.1)
    compressed = CompressedOptimizer(base, PowerSGD(1), min_compression_rate=0)
    model(torch.ones(2, 6)).sum().backward()
    compressed.step()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        optimizer.load_state_dict(compressed.state_dict())
    kept = [key for entries in optimizer.state.values() for key in entries]
    return "is dropped" in caplog.text and not any("lowrank_comm" in key for key in kept)


@engines
def test_accelerate(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    accelerate = pytest.importorskip("accelerate")
    from lowrank_comm.integrations.accelerate import get, prepare

    for compression in (OFF, None):
        model = nn.Linear(6, 8)
        base = base_of(model)
        if compression is None:
            base = CompressedOptimizer.from_config(base, OFF)
        accelerator = accelerate.Accelerator(cpu=True)
        model, optimizer = prepare(accelerator, model, base, compression=compression)
        accelerator.backward(model(torch.ones(2, 6)).sum())
        optimizer.step()
        assert get(optimizer) is None
        assert optimizer.optimizer is base
        assert capsys.readouterr().out.count(SAID) == 1
        assert says_what_it_drops(optimizer, caplog)


@engines
@pytest.mark.parametrize("form", ["section", "optimizer"])
def test_trainer(
    form: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    transformers = pytest.importorskip("transformers")
    from lowrank_comm.integrations.transformers import CompressionCallback

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 8)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.layer(x).square().mean()}

    model = Model()
    base = CompressedOptimizer.from_config(base_of(model), OFF) if form == "optimizer" else None
    callback = CompressionCallback(OFF if base is None else base)
    trainer = transformers.Trainer(
        model,
        transformers.TrainingArguments(
            str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True
        ),
        train_dataset=[{"x": torch.ones(6)} for _ in range(32)],
        optimizers=(base, None),
        callbacks=[callback],
    )
    trainer.train()
    assert callback.compressing is None
    assert capsys.readouterr().out.count(SAID) == 1
    assert says_what_it_drops(trainer.optimizer, caplog)


@engines
def test_trainer_with_a_compressed_optimizer_is_told(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from lowrank_comm.integrations.transformers import CompressionCallback

    model = nn.Linear(6, 8)
    optimizer = CompressedOptimizer.from_config(base_of(model), {"compressor": "powersgd"})
    with pytest.raises(ConfigError, match="give Trainer the base optimizer"):
        transformers.Trainer(
            model,
            transformers.TrainingArguments(str(tmp_path), use_cpu=True, report_to=[]),
            optimizers=(optimizer, None),
            callbacks=[CompressionCallback(OFF)],
        )


@engines
def test_lightning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lightning = pytest.importorskip("lightning.pytorch")
    from lowrank_comm.integrations.lightning import CompressionCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 8)

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return CompressedOptimizer.from_config(base_of(self), OFF)

    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=[CompressionCallback()],
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(8, 6), batch_size=2))
    assert trainer.global_step == 2
    assert capsys.readouterr().out.count(SAID) == 1


DEEPSPEED = """
import torch, deepspeed
from lowrank_comm.integrations import deepspeed as adapter

adapter.skip_shm_extension()
model = torch.nn.Linear(6, 8)
engine = deepspeed.initialize(
    model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
    config={
        "$schema": "configs/lowrank_comm.schema.json", "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True, "zero_optimization": {"stage": STAGE},
        "lowrank_comm": {"compressor": COMPRESSOR, "enabled": False},
    },
)[0]
engine.backward(engine(torch.ones(2, 6)).sum())
engine.step()
assert adapter.get(engine) is None and engine.global_steps == 1
"""


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "compressor"), [(0, "powersgd_plus"), (2, "m4")])
def test_deepspeed(stage: int, compressor: str) -> None:
    pytest.importorskip("deepspeed")
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    script = DEEPSPEED.replace("STAGE", str(stage)).replace("COMPRESSOR", repr(compressor))
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | rank | {"MASTER_PORT": str(29650 + stage), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = 'lowrank_comm: "enabled": false in "lowrank_comm" in the DeepSpeed configuration'
    assert done.stdout.count(said) == 1
