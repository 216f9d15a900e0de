"""`save_all` and `load_all`: everything of a run, whole at any moment."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lowrank_comm import (
    CompressedOptimizer,
    ConfigError,
    PowerSGD,
    PowerSGDPlus,
    ProjectedAdamW,
    StateMismatchError,
    UnsupportedError,
    checkpoint,
)
from lowrank_comm.bidirectional import M4, BidirectionalOptimizer
from tests.support.checkpointed import equal
from tests.support.gloo import GlooPool

MORE = 3


def plain_model(norm: type[nn.Module] = nn.BatchNorm1d) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(9, 12), norm(12), nn.Linear(12, 6)).double()


def built(engine: str, compressor: Any = None, **options: Any) -> tuple[nn.Module, Any]:
    """A model under an engine, and a fresh optimizer that is ready for its first
    step.
    """
    # of the engines, DDP alone keeps running means equal on all ranks
    keeps_means = engine in ("plain", "projected", "uncompressed", "DDP") and not compressor
    model: nn.Module = plain_model(nn.BatchNorm1d if keeps_means else nn.LayerNorm)
    if engine == "projected":
        return model, ProjectedAdamW(model.named_parameters(), lr=0.01, rank=2, restart_every=2)
    if engine == "bidirectional":
        base = torch.optim.AdamW(model.named_parameters(), lr=0.01)
        return model, BidirectionalOptimizer(base, M4(uplink_fraction=0.5))
    if engine == "DDP":
        model = DistributedDataParallel(model)
    if engine in ("FSDP2", "HSDP"):
        world = dist.get_world_size()
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("nodes", "inside"))
        fully_shard(model, mesh=mesh if engine == "HSDP" else None)
    base = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    if engine == "uncompressed":
        return model, base
    optimizer = CompressedOptimizer(
        base, compressor or PowerSGDPlus(2, restart_every=4), min_compression_rate=0, **options
    )
    optimizer.attach(model)
    return model, optimizer


def train(model: nn.Module, optimizer: Any, first: int, steps: int, rank: int = 0) -> None:
    for t in range(first, first + steps):
        optimizer.zero_grad()
        x = torch.randn(8, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        (model(x) - rank).pow(2).sum().backward()
        optimizer.step()


def whole(value: Tensor) -> Tensor:
    value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.detach().clone()


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name.removeprefix("module."): whole(v) for name, v in model.state_dict().items()}


def interrupted(rank: int, engine: str, folder: str) -> tuple[bool, Any, list[str]]:
    """Save, go on; and the same from the save, in new objects."""
    model, optimizer = built(engine)
    train(model, optimizer, 0, 5, rank)
    checkpoint.save_all(folder, model, optimizer, epoch=5, more={"a": torch.ones(2)})
    train(model, optimizer, 5, MORE, rank)
    fresh, resumed = built(engine)
    found = checkpoint.load_all(folder, fresh, resumed)
    train(fresh, resumed, 5, MORE, rank)
    return (
        equal(values(model), values(fresh)),
        found,
        sorted(path.name for path in Path(folder).rglob("*")),
    )


@pytest.mark.parametrize("engine", ["plain", "projected", "bidirectional", "uncompressed"])
def test_one_process_goes_on_bit_by_bit(engine: str, tmp_path: Path) -> None:
    same, found, _ = interrupted(0, engine, str(tmp_path))
    assert same
    assert found["epoch"] == 5
    assert torch.equal(found["more"]["a"], torch.ones(2))


@pytest.mark.parametrize(
    ("engine", "world"),
    [("plain", 2), ("DDP", 2), ("FSDP2", 2), ("HSDP", 4), ("projected", 2), ("bidirectional", 2)],
)
def test_several_workers_go_on_bit_by_bit(
    gloo: GlooPool, engine: str, world: int, tmp_path: Path
) -> None:
    for same, found, files in gloo.run(interrupted, world, engine, str(tmp_path)):
        assert same
        assert found["epoch"] == 5
        sharded = engine in ("FSDP2", "HSDP")
        assert (".metadata" in files) == sharded
        assert ("state.pt" in files) != sharded
        assert ("optimizer_1.pt" in files) == (engine == "bidirectional")


def saved_under(rank: int, engine: str, folder: str) -> tuple[dict[str, Tensor], float]:
    model, optimizer = built(engine, PowerSGD(2), shard_scope="matrix")
    train(model, optimizer, 0, 5)
    checkpoint.save_all(folder, model, optimizer)
    train(model, optimizer, 5, MORE)
    return values(model), error_norm(optimizer)


def error_norm(optimizer: CompressedOptimizer) -> float:
    return sum(float(whole(e).norm()) for e in optimizer.error_memory().values())


def loaded_under(rank: int, engine: str, folder: str) -> tuple[dict[str, Tensor], float]:
    model, optimizer = built(engine, PowerSGD(2), shard_scope="matrix")
    assert checkpoint.load_all(folder, model, optimizer) == {}
    assert error_norm(optimizer) > 1e-3
    train(model, optimizer, 5, MORE)
    return values(model), error_norm(optimizer)


@pytest.mark.parametrize(
    ("there", "world", "here", "other_world"),
    [
        ("DDP", 2, "FSDP2", 2),
        ("FSDP2", 2, "DDP", 2),
        ("HSDP", 4, "plain", 1),
        ("DDP", 2, "HSDP", 4),
        ("FSDP2", 2, "plain", 1),
        ("plain", 1, "DDP", 3),
    ],
)
def test_a_run_goes_on_under_another_engine(
    gloo: GlooPool, there: str, world: int, here: str, other_world: int, tmp_path: Path
) -> None:
    """All workers have the same gradients, so that their number does not matter."""
    expected, norm = gloo.run(saved_under, world, there, str(tmp_path))[0]
    for found, other_norm in gloo.run(loaded_under, other_world, here, str(tmp_path)):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
        assert other_norm == pytest.approx(norm, rel=1e-8)


class Lookahead(torch.optim.Optimizer):
    """An optimizer that keeps another one as `optimizer`, and slow weights beside."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(optimizer.param_groups, optimizer.defaults)
        self.optimizer = optimizer
        self.state, self.param_groups = optimizer.state, optimizer.param_groups
        self.slow = 0

    def state_dict(self) -> dict[str, Any]:
        return {**self.optimizer.state_dict(), "slow": self.slow}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.slow = state_dict["slow"]
        self.optimizer.load_state_dict({k: v for k, v in state_dict.items() if k != "slow"})

    def step(self, closure: Any = None) -> Any:
        self.slow += 1
        return self.optimizer.step(closure)


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "compressed"])
def test_an_optimizer_around_another_one_is_saved_itself(wrapped: bool, tmp_path: Path) -> None:
    def made() -> tuple[nn.Module, Any, Lookahead]:
        model = plain_model()
        inner = Lookahead(torch.optim.AdamW(model.named_parameters(), lr=0.01))
        if not wrapped:
            return model, inner, inner
        return model, CompressedOptimizer(inner, PowerSGD(2), min_compression_rate=0), inner

    model, optimizer, _ = made()
    train(model, optimizer, 0, 3)
    checkpoint.save_all(tmp_path, model, optimizer)
    train(model, optimizer, 3, MORE)
    fresh, resumed, inner = made()
    checkpoint.load_all(tmp_path, fresh, resumed)
    assert inner.slow == 3
    assert not wrapped or resumed.reducer.step == 3
    train(fresh, resumed, 3, MORE)
    assert equal(values(model), values(fresh))


@pytest.mark.parametrize("library", ["accelerate", "lightning"])
def test_the_wrapper_of_a_library_is_looked_through(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrapper_of(optimizer: Any) -> Any:
        if library == "lightning":
            found = pytest.importorskip("lightning.pytorch.core.optimizer")
            return found.LightningOptimizer(optimizer)
        found = pytest.importorskip("accelerate.optimizer")
        monkeypatch.setattr(found, "AcceleratorState", lambda: None)
        monkeypatch.setattr(found, "GradientState", lambda: None)
        return found.AcceleratedOptimizer(optimizer, device_placement=False)

    model, optimizer = built("plain")
    train(model, optimizer, 0, 3)
    checkpoint.save_all(tmp_path, model, wrapper_of(optimizer))
    fresh, resumed = built("plain")
    checkpoint.load_all(tmp_path, fresh, wrapper_of(resumed))
    assert resumed.reducer.step == 3
    assert error_norm(resumed) == error_norm(optimizer)


# --- several saves ---


def test_the_newest_is_loaded_and_as_many_stay_as_asked_for(tmp_path: Path) -> None:
    model, optimizer = built("plain")
    for step in range(4):
        train(model, optimizer, step, 1)
        path = checkpoint.save_all(tmp_path, model, optimizer, step=step)
        assert path == tmp_path / f"save-{step + 1:08d}"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["save-00000003", "save-00000004"]
    assert checkpoint.load_all(tmp_path, model, optimizer) == {"step": 3}
    checkpoint.save_all(tmp_path, model, optimizer, keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["save-00000005"]


def test_without_a_save_the_run_starts_from_the_beginning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = built("plain")
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        assert checkpoint.load_all(tmp_path / "none", model, optimizer) is None
        (tmp_path / "save-00000001.unfinished").mkdir()
        assert checkpoint.load_all(tmp_path, model, optimizer) is None
    start = "nothing is loaded, and the run starts from the beginning"
    assert caplog.messages == [
        f"load_all: {tmp_path / 'none'} does not exist; {start}",
        f"load_all: {tmp_path} has no complete save; {start}",
    ]


def test_what_is_no_folder_of_saves_is_not_a_start_from_the_beginning(tmp_path: Path) -> None:
    model, optimizer = built("plain")
    path = checkpoint.save_all(tmp_path, model, optimizer)
    for given, words in ((path, "is one save"), (path / "state.pt", "is a file")):
        with pytest.raises(ConfigError, match=words) as caught:
            checkpoint.load_all(given, model, optimizer)
        assert repr(str(tmp_path)) in str(caught.value)


@pytest.mark.parametrize("file", ["state.pt", "extra.pt", "manifest.json"])
@pytest.mark.parametrize("how", ["a bit", "cut", "gone"])
def test_a_damaged_save_is_passed_over_and_said(
    file: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = built("plain")
    for step in range(2):
        train(model, optimizer, step, 1)
        path = checkpoint.save_all(tmp_path, model, optimizer, step=step)
    damaged = path / file
    data = bytearray(damaged.read_bytes())
    if how == "gone":
        damaged.unlink()
    else:
        # within a hash, where it is the manifest
        place = data.index(b"sha256") + 12 if file == "manifest.json" else len(data) // 2
        data[place] ^= 1
        damaged.write_bytes(data if how == "a bit" else data[:-20])
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        assert checkpoint.load_all(tmp_path, model, optimizer) == {"step": 0}
    assert f"passed over: {path}" in caplog.text
    (tmp_path / "save-00000001" / "state.pt").unlink()
    with pytest.raises(StateMismatchError, match=r"no save in .* is undamaged"):
        checkpoint.load_all(tmp_path, model, optimizer)


@pytest.mark.parametrize("how", ["a bit", "cut", "cut, not loaded"])
def test_a_damaged_save_is_not_kept_in_the_place_of_a_good_one(how: str, tmp_path: Path) -> None:
    model, optimizer = built("plain")
    for step in range(2):
        path = checkpoint.save_all(tmp_path, model, optimizer, step=step)
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data if how == "a bit" else data[:-1])
    if "not loaded" not in how:
        assert checkpoint.load_all(tmp_path, model, optimizer) == {"step": 0}
    newest = checkpoint.save_all(tmp_path, model, optimizer, step=2)
    shutil.rmtree(newest)
    assert checkpoint.load_all(tmp_path, model, optimizer) == {"step": 0}
    # damaged ones go when as many good ones are newer
    for step in (3, 4):
        checkpoint.save_all(tmp_path, model, optimizer, step=step)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["save-00000003", "save-00000004"]


# --- other optimizers ---


@pytest.mark.parametrize("recorded", [True, False])
def test_another_base_optimizer_is_refused_with_nothing_touched(
    recorded: bool, tmp_path: Path
) -> None:
    """Its state would be loaded, and its step would not find what it needs. Earlier
    versions did not record the class, and load as before.
    """
    model, optimizer = built("plain")
    train(model, optimizer, 0, 2)
    path = checkpoint.save_all(tmp_path, model, optimizer)
    if not recorded:
        manifest = json.loads((path / "manifest.json").read_text())
        del manifest["optimizer"]
        manifest["sha256"] = sha256_of(manifest)
        (path / "manifest.json").write_text(json.dumps(manifest))
    other = plain_model()
    base = torch.optim.SGD(other.named_parameters(), lr=0.1)
    again = CompressedOptimizer(base, PowerSGDPlus(2), min_compression_rate=0)
    before = values(other)
    if recorded:
        with pytest.raises(StateMismatchError, match=r"saved with AdamW, and .* here is SGD"):
            checkpoint.load_all(tmp_path, other, again)
        assert base.param_groups[0]["lr"] == 0.1
    else:
        assert checkpoint.load_all(tmp_path, other, again) == {}
    assert equal(values(other), before) == recorded


def test_an_uncompressed_run_says_what_it_drops_of_a_compressed_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, optimizer = built("plain")
    train(model, optimizer, 0, 2)
    checkpoint.save_all(tmp_path, model, optimizer)
    other, plain = built("uncompressed")
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        assert checkpoint.load_all(tmp_path, other, plain) == {}
    assert "the error memory of 2 parameters is dropped" in caplog.text
    for entries in plain.state.values():
        assert set(entries) == {"step", "exp_avg", "exp_avg_sq"}
    train(other, plain, 2, 1)


def test_the_optimizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model, optimizer = built("plain")
    checkpoint.save_all(tmp_path / "good", model, optimizer)
    other, _ = built("plain")
    for call in (checkpoint.save_all, checkpoint.load_all):
        with pytest.raises(ConfigError, match="holds none of the model's parameters"):
            call(tmp_path / "good", other, optimizer)
    assert len(list((tmp_path / "good").iterdir())) == 1


class Around(torch.optim.SGD):
    """An optimizer around another one, whose state it saves as its own."""

    def __init__(self, inner: Any) -> None:
        super().__init__([p for group in inner.param_groups for p in group["params"]], lr=0.1)
        self.inner = inner

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)


def test_an_optimizer_around_a_compressed_one_keeps_the_error_memory(tmp_path: Path) -> None:
    model, optimizer = built("plain")
    train(model, optimizer, 0, 2)
    checkpoint.save_all(tmp_path, model, Around(optimizer))
    other, again = built("plain")
    assert checkpoint.load_all(tmp_path, other, Around(again)) == {}
    assert error_norm(again) == pytest.approx(error_norm(optimizer), rel=1e-12)
    assert error_norm(again) > 1e-3


# --- refusals ---


@pytest.mark.parametrize("call", [checkpoint.save_all, checkpoint.load_all])
def test_arguments_in_another_order_are_named(call: Any, tmp_path: Path) -> None:
    model, optimizer = built("plain")
    for given, words in (
        ((tmp_path, optimizer, model), "model is of another kind"),
        ((model, optimizer, tmp_path), "folder is of another kind"),
        ((tmp_path, model, model), "optimizer is of another kind"),
    ):
        with pytest.raises(ConfigError, match=words):
            call(*given)
    assert not list(tmp_path.iterdir())


def test_an_extra_that_cannot_be_saved_or_has_an_arguments_name_is_named(tmp_path: Path) -> None:
    model, optimizer = built("plain")
    for key, value in (("metric", lambda: 1), ("scheduler", random.Random(0))):
        with pytest.raises(StateMismatchError, match=f"{key}=.* cannot be saved .*give tensors"):
            checkpoint.save_all(tmp_path, model, optimizer, epoch=1, **{key: value})
    with pytest.raises(StateMismatchError, match=r"scheduler=.*it holds a random\.Random"):
        checkpoint.save_all(tmp_path, model, optimizer, scheduler=[random.Random(0)])
    for name in ("folder", "model", "optimizer"):
        with pytest.raises(ConfigError, match=f"no extra can be called '{name}'"):
            checkpoint.save_all(tmp_path, model, optimizer, **{name: 1})
    with pytest.raises(ConfigError, match="another name"):
        checkpoint.save_all(tmp_path, model, optimizer, keep="all")
    assert not list(tmp_path.iterdir())


def test_loaded_is_said_after_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = built("plain")
    path = checkpoint.save_all(tmp_path, model, optimizer)
    other = nn.Sequential(nn.Linear(9, 13)).double()
    base = torch.optim.AdamW(other.named_parameters(), lr=0.01)
    with caplog.at_level(logging.INFO, "lowrank_comm"):
        with pytest.raises((StateMismatchError, ValueError)):
            checkpoint.load_all(tmp_path, other, base)
        assert "is loaded" not in caplog.text
        checkpoint.load_all(tmp_path, model, optimizer)
    assert f"{path} is loaded" in caplog.text


def test_another_model_is_refused_with_nothing_touched(tmp_path: Path) -> None:
    model, optimizer = built("plain")
    train(model, optimizer, 0, 2)
    checkpoint.save_all(tmp_path, model, optimizer)
    other = nn.Sequential(nn.Linear(9, 13), nn.BatchNorm1d(13), nn.Linear(13, 6)).double()
    base = torch.optim.AdamW(other.named_parameters(), lr=0.01)
    again = CompressedOptimizer(base, PowerSGD(2), min_compression_rate=0)
    before = values(other)
    with pytest.raises(StateMismatchError, match=r"'0.bias' is \(12,\) there and \(13,\) here"):
        checkpoint.load_all(tmp_path, other, again)
    assert equal(values(other), before)
    assert not base.state


def test_a_state_that_does_not_fit_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model, optimizer = built("plain")
    train(model, optimizer, 0, 2)
    checkpoint.save_all(tmp_path, model, optimizer)
    other = plain_model()
    base = torch.optim.AdamW(other.named_parameters(), lr=0.01)
    dense = CompressedOptimizer(base, PowerSGD(2), min_compression_rate=1000)
    before = values(other)
    with pytest.raises(StateMismatchError, match="it would be lost"):
        checkpoint.load_all(tmp_path, other, dense)
    assert equal(values(other), before)


def test_what_could_not_be_loaded_safely_is_not_saved(tmp_path: Path) -> None:
    model, optimizer = built("plain")
    with pytest.raises(StateMismatchError, match="give tensors, numbers, text"):
        checkpoint.save_all(tmp_path, model, optimizer, scheduler=random.Random(0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("engine", "words"),
    [
        ("projected", "exp_avg of 0.weight holds nan"),
        ("bidirectional", "'w'"),
        ("plain", "holds nan"),
    ],
)
def test_state_that_is_not_finite_is_not_saved(engine: str, words: str, tmp_path: Path) -> None:
    model, optimizer = built(engine)
    train(model, optimizer, 0, 2)
    if engine == "plain":
        state = optimizer.error_memory()["0.weight"]
    elif engine == "projected":
        state = optimizer.state[model[0].weight]["exp_avg"]
    else:
        state = optimizer.state_dict()["lowrank_comm_bidirectional"]["tensors"]["w"]
    state.view(-1)[1] = float("nan")
    with pytest.raises(StateMismatchError, match=words):
        checkpoint.save_all(tmp_path, model, optimizer)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("keep", [0, -1, True, 1.5])
def test_a_keep_that_keeps_nothing_is_refused(keep: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"keep={keep}"):
        checkpoint.save_all(tmp_path, *built("plain"), keep=keep)


def test_a_deepspeed_engine_saves_by_itself(tmp_path: Path) -> None:
    engine = type("DeepSpeedEngine", (nn.Linear,), {})(2, 2)
    base = torch.optim.SGD(engine.parameters(), lr=0.1)
    for call in (checkpoint.save_all, checkpoint.load_all):
        with pytest.raises(UnsupportedError, match="save_checkpoint"):
            call(tmp_path, engine, base)


def fails_on_one(rank: int, folder: str) -> str:
    """Rank 1's error memory is damaged; then rank 0's disk is full."""
    model, optimizer = built("DDP")
    train(model, optimizer, 0, 2, rank)
    checkpoint.save_all(folder, model, optimizer)
    said, real = [], torch.save
    kept = {name: error.clone() for name, error in optimizer.error_memory().items()}
    if rank == 1:
        optimizer.error_memory()["0.weight"][0, 0] = float("nan")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    for disk in (real, full):
        torch.save = disk
        try:
            checkpoint.save_all(folder, model, optimizer)
        except StateMismatchError as error:
            said.append(str(error))
        finally:
            torch.save = real
        for name, error in optimizer.error_memory().items():
            error.copy_(kept[name])
    dist.barrier()
    assert [path.name for path in Path(folder).iterdir()] == ["save-00000001"]
    return " | ".join(said)


def test_a_failure_on_one_rank_is_told_to_all(gloo: GlooPool, tmp_path: Path) -> None:
    one, other = gloo.run(fails_on_one, 2, str(tmp_path))
    assert one == other
    assert "the error memory of 0.weight holds nan on rank 1" in one
    assert "the checkpoint failed on rank 0: [Errno 28] No space left on device" in one


def cannot_read_the_extra(rank: int, folder: str) -> str:
    model, optimizer = built("DDP")
    train(model, optimizer, 0, 2, rank)
    checkpoint.save_all(folder, model, optimizer, epoch=1)
    train(model, optimizer, 2, 1, rank)
    before, real = copy.deepcopy(values(model)), torch.load

    def broken(path: Any, *arguments: Any, **options: Any) -> Any:
        if rank == 1 and "extra" in str(path):
            raise OSError(5, "Input/output error")
        return real(path, *arguments, **options)

    torch.load = broken
    try:
        checkpoint.load_all(folder, model, optimizer)
    except StateMismatchError as error:
        assert equal(values(model), before)
        assert optimizer.reducer.step == 3
        return str(error)
    finally:
        torch.load = real
    return "loaded"


def test_what_one_rank_cannot_read_changes_nothing_on_any(gloo: GlooPool, tmp_path: Path) -> None:
    for text in gloo.run(cannot_read_the_extra, 2, str(tmp_path)):
        assert "rank 1" in text
        assert "Input/output error" in text


def loads_where_one_is_blind(rank: int, folder: str, blind: int) -> str:
    model, optimizer = built("DDP")
    train(model, optimizer, 0, 1, rank)
    mine = Path(folder) / "shared"
    checkpoint.save_all(mine, model, optimizer)
    before = copy.deepcopy(values(model))
    try:
        checkpoint.load_all(Path(folder) / "elsewhere" if rank == blind else mine, model, optimizer)
    except StateMismatchError as error:
        assert equal(values(model), before)
        return str(error)
    return "loaded"


@pytest.mark.parametrize("blind", [0, 1])
def test_a_save_that_one_rank_does_not_see_is_refused_by_all(
    gloo: GlooPool, blind: int, tmp_path: Path
) -> None:
    """Nobody is told that a good save is damaged, and nobody starts over."""
    for said in gloo.run(loads_where_one_is_blind, 2, str(tmp_path), blind):
        assert "rank 1 does not see what rank 0 sees" in said
        assert f"no save on rank {blind}" in said
        assert f"save-00000001 on rank {1 - blind}" in said
        assert "file system that all share" in said
        assert "undamaged" not in said


# --- killed at any moment ---


def weights_after(step: int) -> dict[str, Tensor]:
    model, optimizer = built("plain")
    train(model, optimizer, 0, step)
    return values(model)


def life(folder: Path, dies_at: int | None) -> int:
    """Resume, then train and save until dead; in a child process.

    dies_at: the process is gone before this file event; None: it is killed from
        outside.
    """
    events = 0

    def event(name: str, arguments: tuple[Any, ...]) -> None:
        nonlocal events
        if name in FILE_EVENTS and str(folder) in str(arguments):
            events += 1
            if events == dies_at:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(event)
    model, optimizer = built("plain")
    found = checkpoint.load_all(folder, model, optimizer)
    first = found["step"] if found else 0
    for step in range(first, first + (2 if dies_at is not None else 10**6)):
        train(model, optimizer, step, 1)
        checkpoint.save_all(folder, model, optimizer, step=step + 1)
    return events


FILE_EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")


def child(folder: Path, dies_at: int | None) -> int:
    """Fork a life, which returns by exit; the child's number."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            logging.disable(logging.CRITICAL)
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            life(folder, dies_at)
            code = 0
        finally:
            os._exit(code)
    return pid


def state_of(folder: Path, at_least: int) -> int:
    """The step that a new run goes on from, whose weights are those of that step."""
    model, optimizer = built("plain")
    found = checkpoint.load_all(folder, model, optimizer)
    step = found["step"] if found else 0
    assert step >= at_least
    assert equal(values(model), weights_after(step))
    return step


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork")
def test_a_run_that_is_killed_at_any_file_event_loses_at_most_one_save(tmp_path: Path) -> None:
    """Each run dies one file event later than the one before it, which it resumes,
    until one comes to its end.
    """
    at, first = 0, tmp_path / "0"
    assert os.waitpid(child(first, 10**9), 0)[1] == 0
    before = state_of(first, 2)
    assert before == 2
    while True:
        at += 1
        folder = Path(shutil.copytree(first, tmp_path / str(at)))
        _, status = os.waitpid(child(folder, at), 0)
        step = state_of(folder, before)
        if not os.WIFSIGNALED(status):
            break
    assert at > 20
    assert step == before + 2


def newest(folder: Path) -> int:
    """The number of the newest save that has been begun; 0 without one."""
    return max((int(path.name[5:13]) for path in folder.glob("save-????????")), default=0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork")
def test_a_run_that_is_killed_at_random_moments_goes_on(tmp_path: Path) -> None:
    """Each run has completed a save of its own, however slow the machine is."""
    draws, step = random.Random(0), 0
    for _ in range(12):
        before = newest(tmp_path)
        pid = child(tmp_path, None)
        end = time.monotonic() + 60
        while newest(tmp_path) < before + 2 and time.monotonic() < end:
            time.sleep(0.005)
        time.sleep(draws.random() * 0.2)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        step = state_of(tmp_path, step)
    assert step > 10


def sha256_of(manifest: dict[str, Any]) -> str:
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@pytest.mark.parametrize("key", ["world", "sharded", "files", "sha256"])
def test_a_manifest_that_is_not_as_it_was_written_is_refused(key: str, tmp_path: Path) -> None:
    """Each of these is a manifest of some save; the last is of an earlier version."""
    model, optimizer = built("plain")
    path = checkpoint.save_all(tmp_path, model, optimizer) / "manifest.json"
    manifest = json.loads(path.read_text())
    if key == "sha256":
        del manifest[key]
    else:
        manifest[key] = {"world": 3, "sharded": True, "files": {}}[key]
    path.write_text(json.dumps(manifest))
    with pytest.raises(StateMismatchError, match=r"checksum in manifest\.json is not that of its"):
        checkpoint.load_all(tmp_path, model, optimizer)


@pytest.mark.parametrize("text", ["", "[]", "3", "[" * 100_000, '{"sha256": 1}'])
def test_a_manifest_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    model, optimizer = built("plain")
    (checkpoint.save_all(tmp_path, model, optimizer) / "manifest.json").write_text(text)
    with pytest.raises(StateMismatchError, match="cannot be read"):
        checkpoint.load_all(tmp_path, model, optimizer)


def test_the_manifest_says_what_belongs_to_a_save(tmp_path: Path) -> None:
    model, optimizer = built("plain")
    path = checkpoint.save_all(tmp_path, model, optimizer)
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {"state.pt", "extra.pt"}
    assert (manifest["format"], manifest["sharded"], manifest["world"]) == (1, False, 1)
    # a later version's
    manifest["new"] = 1
    manifest["sha256"] = sha256_of(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert checkpoint.load_all(tmp_path, model, optimizer) == {}
