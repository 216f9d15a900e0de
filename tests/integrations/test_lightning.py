"""PyTorch Lightning's real Trainer with CompressionCallback: DDP on two gloo processes,
and a single device.

The two processes run this file as a script, all cases in one start (`cases`); the tests
look at what rank 0 has saved.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support import ROOT

pytest.importorskip("lightning")

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    SingleDeviceStrategy,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from lowrank_comm import CompressedOptimizer, ConfigError, PowerSGD, PowerSGDPlus, UnsupportedError
from lowrank_comm.communication import leave
from lowrank_comm.integrations.lightning import CompressionCallback

CLIP = 0.2
"""Far below the norms of the toy's gradients, so that every step is clipped."""
FULL = 12
"""The most that a matrix of the toy's has."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Toy(LightningModule):
    """Learns a linear map; rank None trains it without compression."""

    def __init__(self, rank: int | None, lr: float = 0.3, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(12, 16), torch.nn.Tanh(), torch.nn.Linear(16, 8)
        )
        self.rank, self.lr, self.options = rank, lr, options
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.wrapped = ""

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = torch.nn.functional.mse_loss(self.net(x), y)
        self.losses.append(float(loss.detach()))
        self.wrapped = type(self.trainer.strategy.model).__name__
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in self.parameters()])))

    def configure_optimizers(self) -> Any:
        base = torch.optim.SGD(self.named_parameters(), lr=self.lr, momentum=0.9)
        optimizer = base if self.rank is None else compressed(base, self.rank, **self.options)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, gamma=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def weights(self) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in self.named_parameters()}


def compressed(base: torch.optim.Optimizer, rank: int, **options: Any) -> CompressedOptimizer:
    compressor = PowerSGDPlus(rank=rank, restart_every=3) if rank < FULL else PowerSGD(rank=rank)
    return CompressedOptimizer(base, compressor, min_compression_rate=0, **options)


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(40, 12, generator=generator)
    return TensorDataset(x, torch.tanh(x @ torch.randn(12, 8, generator=generator)))


def fit(module: Toy, folder: Path, ckpt_path: str | None = None, **options: Any) -> Trainer:
    """Trains for four epochs of (on two processes) five batches of four: with two
    micro-batches a step, three steps each.
    """
    callbacks = [CompressionCallback()] if module.rank is not None else []
    callbacks += options.pop("callbacks", [])
    settings = {
        "max_epochs": 4,
        "accumulate_grad_batches": 2,
        "gradient_clip_val": CLIP,
        "logger": False,
    } | options
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        **settings,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data(), batch_size=4, shuffle=False), ckpt_path=ckpt_path)
    return trainer


# --- two processes ---


def cases(folder: Path) -> None:
    """Run on each of two processes; rank 0 saves what was found."""
    found: dict[str, Any] = {}
    ddp = {"strategy": "ddp", "devices": 2}

    def note(name: str, module: Toy, trainer: Trainer) -> None:
        found[name] = {
            "weights": module.weights(),
            "losses": module.losses,
            "norms": module.norms,
            "wrapped": module.wrapped,
        }
        if module.rank is not None:
            found[name]["errors"] = trainer.optimizers[0].error_memory()
            found[name]["steps"] = trainer.optimizers[0].reducer.step

    for name, rank, options in (
        ("uncompressed", None, {}),
        ("full rank", FULL, {}),
        ("overlap", FULL, {"overlap": True}),
    ):
        module = Toy(rank, **options)
        note(name, module, fit(module, folder, **ddp))

    checkpoint = ModelCheckpoint(
        dirpath=folder, filename="{epoch}", save_top_k=-1, every_n_epochs=2
    )
    module = Toy(1)
    logger = CSVLogger(folder, name="", version="log")
    trainer = fit(module, folder, callbacks=[checkpoint], logger=logger, log_every_n_steps=2, **ddp)
    note("rank 1", module, trainer)
    module, kept = Toy(1), []
    # the same model once more: the first optimizer must have let go of it
    for name in ("resumed", "resumed again"):
        module.losses, module.norms = [], []
        kept.append(fit(module, folder, ckpt_path=str(folder / "epoch=1.ckpt"), **ddp))
        note(name, module, kept[-1])

    module, scaler = Toy(1, max_grad_norm=CLIP), torch.amp.GradScaler("cpu", init_scale=2.0**20)
    plugins = [MixedPrecision("16-mixed", "cpu", scaler)]
    note("scaled", module, fit(module, folder, gradient_clip_val=None, plugins=plugins, **ddp))
    found["scaled"]["scales"] = [None, None]
    torch.distributed.all_gather_object(found["scaled"]["scales"], scaler.get_scale())

    if trainer.is_global_zero:
        torch.save(found, folder / "found.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("lightning")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        __file__,
        str(path),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "found.pt")


def assert_close(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    for name, weight in one["weights"].items():
        torch.testing.assert_close(
            weight,
            other["weights"][name],
            rtol=0,
            atol=tolerance,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.slow
def test_the_model_is_ddps(found: dict[str, Any]) -> None:
    assert {case["wrapped"] for case in found.values()} == {DistributedDataParallel.__name__}


@pytest.mark.slow
def test_full_rank_is_uncompressed_training(found: dict[str, Any]) -> None:
    """With clipping and accumulation; at an epoch's end a step has one micro-batch
    only.
    """
    assert min(found["uncompressed"]["norms"]) > CLIP
    torch.testing.assert_close(
        found["full rank"]["norms"], found["uncompressed"]["norms"], rtol=1e-4, atol=0
    )
    assert_close(found["full rank"], found["uncompressed"])
    assert_close(found["overlap"], found["uncompressed"])
    assert found["full rank"]["steps"] == len(found["uncompressed"]["norms"]) == 12


@pytest.mark.slow
def test_rank_1_learns(found: dict[str, Any]) -> None:
    losses = found["rank 1"]["losses"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert (
        max(
            float((found["rank 1"]["weights"][n] - w).abs().max())
            for n, w in found["full rank"]["weights"].items()
        )
        > 1e-4
    )


@pytest.mark.slow
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(found: dict[str, Any]) -> None:
    for name in ("resumed", "resumed again"):
        assert len(found[name]["norms"]) == 6 and found[name]["steps"] == 12
        assert_close(found[name], found["rank 1"], tolerance=1e-6)
        assert (
            found[name]["errors"].keys()
            == found["rank 1"]["errors"].keys()
            == {"net.0.weight", "net.2.weight"}
        )


@pytest.mark.slow
def test_the_checkpoint_holds_the_mean_error_memory_and_loads_on_one_device(
    found: dict[str, Any], folder: Path
) -> None:
    saved = torch.load(folder / "epoch=1.ckpt", weights_only=True)["optimizer_states"][0]
    errors = [
        v
        for each in saved["state"].values()
        for k, v in each.items()
        if k.startswith("lowrank_comm_") and "error" in k
    ]
    assert len(errors) == 2 and all(float(error.abs().max()) > 0 for error in errors)
    module = Toy(1)
    trainer = fit(module, folder, ckpt_path=str(folder / "epoch=1.ckpt"), devices=1)
    assert trainer.optimizers[0].reducer.step > 6


@pytest.mark.slow
def test_an_overflow_lowers_the_scale_on_all_ranks(found: dict[str, Any]) -> None:
    here, there = found["scaled"]["scales"]
    assert 1 < here == there < 2.0**20
    # some were skipped
    assert 2 <= found["scaled"]["steps"] < 12
    assert sum(found["scaled"]["losses"][-5:]) < sum(found["scaled"]["losses"][:5])


@pytest.mark.slow
def test_figures_are_logged_at_the_trainers_interval(found: dict[str, Any], folder: Path) -> None:
    with (folder / "log" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["compression/steps"]]
    # Lightning counts from 0
    assert [int(row["step"]) for row in rows] == [1, 3, 5, 7, 9, 11]
    assert {float(row["compression/steps"]) for row in rows} == {2.0}
    assert all(float(row["compression/bytes"]) > 0 for row in rows)


# --- a single device, in this process ---


@pytest.mark.slow
def test_on_a_single_device_clipping_acts_on_the_averaged_gradient(tmp_path: Path) -> None:
    module = Toy(1)
    fit(module, tmp_path, max_epochs=1, devices=1, strategy="auto")

    plain = Toy(1)
    settings = plain.configure_optimizers()
    optimizer, scheduler = settings["optimizer"], settings["lr_scheduler"]["scheduler"]
    norms = []
    for k, (x, y) in enumerate(DataLoader(data(), batch_size=4)):
        (torch.nn.functional.mse_loss(plain.net(x), y) / 2).backward()
        if k % 2:
            optimizer.reduce_gradients()
            norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), CLIP)))
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    assert module.norms == pytest.approx(norms, rel=1e-5) and min(norms) > CLIP
    assert_close({"weights": module.weights()}, {"weights": plain.weights()}, tolerance=1e-6)


@pytest.mark.slow
def test_a_scaler_is_made_known(tmp_path: Path) -> None:
    """Its scale is in neither the error memory nor the step; what Lightning cannot
    clip, the optimizer does.
    """
    module, scaled = Toy(1, max_grad_norm=CLIP), Toy(1, max_grad_norm=CLIP)
    reference = fit(module, tmp_path, max_epochs=1, devices=1, gradient_clip_val=None)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = fit(
        scaled, tmp_path, max_epochs=1, devices=1, gradient_clip_val=None, plugins=[plugin]
    )
    assert scaler.get_scale() == 1024.0
    for name, error in reference.optimizers[0].error_memory().items():
        torch.testing.assert_close(
            trainer.optimizers[0].error_memory()[name], error, rtol=0.2, atol=0.02
        )
    assert_close({"weights": scaled.weights()}, {"weights": module.weights()}, tolerance=2e-3)
    with pytest.raises(ConfigError, match=r"gradient_clip_val=0\.2.*max_grad_norm"):
        fit(
            Toy(1),
            tmp_path,
            devices=1,
            plugins=[MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))],
        )


@pytest.mark.slow
def test_a_fit_without_a_compressed_optimizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"\['SGD'\].*return CompressedOptimizer"):
        fit(Toy(None), tmp_path, devices=1, callbacks=[CompressionCallback()])


@pytest.mark.slow
def test_manual_optimization_is_refused(tmp_path: Path) -> None:
    module = Toy(1)
    module.automatic_optimization = False
    with pytest.raises(UnsupportedError, match="automatic_optimization=False"):
        fit(module, tmp_path, devices=1, gradient_clip_val=None, accumulate_grad_batches=1)


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (DeepSpeedStrategy, "DeepSpeedStrategy.*lowrank_comm.integrations.deepspeed"),
        (FSDPStrategy, "FSDPStrategy.*FSDP1"),
    ],
)
def test_other_strategies_are_refused(strategy: type, message: str) -> None:
    """These strategies themselves refuse a CPU, so the hook is called by hand."""
    trainer = SimpleNamespace(strategy=strategy.__new__(strategy))
    with pytest.raises(UnsupportedError, match=message):
        CompressionCallback().setup(trainer, SimpleNamespace(), "fit")  # type: ignore[arg-type]
    CompressionCallback().setup(trainer, SimpleNamespace(), "test")  # type: ignore[arg-type]


def test_one_process_of_several_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    trainer = SimpleNamespace(strategy=SingleDeviceStrategy("cpu"))
    with pytest.raises(ConfigError, match=r"WORLD_SIZE=2.*SingleDeviceStrategy.*strategy=.ddp"):
        CompressionCallback().setup(trainer, SimpleNamespace(), "fit")  # type: ignore[arg-type]


def test_lightnings_wrapper_shows_its_class_and_reaches_the_base() -> None:
    class WithModes(torch.optim.SGD):
        mode = ""

        def train(self) -> None:
            self.mode = "train"

    base = WithModes(torch.nn.Linear(4, 4).named_parameters(), lr=0.1)
    outer = LightningOptimizer(CompressedOptimizer(base, PowerSGD(1)))
    assert repr(outer).startswith("LightningCompressedOptimizer(")
    outer.train()
    assert base.mode == "train"
    assert not hasattr(outer, "eval")
    assert outer.param_groups is base.param_groups
    assert not outer.step_was_skipped


def test_a_fit_that_was_broken_off_gives_the_model_back(tmp_path: Path) -> None:
    """To the next one, by another callback."""

    class Unplugged(Callback):
        def on_train_batch_end(self, *_: Any, **__: Any) -> None:
            raise ZeroDivisionError

    module = Toy(1, reduce_at="backward")
    # whose traceback keeps the first fit and its optimizer
    with pytest.raises(ZeroDivisionError) as broken_off:
        fit(module, tmp_path, devices=1, accumulate_grad_batches=1, callbacks=[Unplugged()])
    fit(module, tmp_path, devices=1, accumulate_grad_batches=1)
    assert broken_off.tb is not None


def test_ddp_is_taken() -> None:
    fine = SimpleNamespace(
        strategy=DDPStrategy(), precision_plugin=SimpleNamespace(), gradient_clip_val=1.0
    )
    CompressionCallback().setup(fine, SimpleNamespace(automatic_optimization=True), "fit")  # type: ignore[arg-type]


if __name__ == "__main__":
    torch.set_num_threads(1)
    cases(Path(sys.argv[1]))
    leave()
