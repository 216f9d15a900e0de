"""Which checkpoint a run goes on from, whatever a kill has left in its folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoints import find_checkpoint, is_complete, newest_complete
from safetensors.torch import save_file

from lowrank_comm import CompressedOptimizer, PowerSGD
from tests.support import ROOT

STATE = json.dumps({"global_step": 5, "log_history": [{"loss": 1.0}]})


def put(folder: Path, step: int, state: str | None = STATE, ranks: tuple[int, ...] = ()) -> Path:
    """A checkpoint as Trainer leaves it; without a state, as a kill does."""
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    if state is not None:
        (made / "trainer_state.json").write_text(state)
    for rank in ranks:
        torch.save(rank, made / f"rng_state_{rank}.pth")
    return made


@pytest.mark.parametrize(
    ("state", "ranks", "complete"),
    [
        (STATE, (), True),
        (STATE, (0, 1, 2), True),
        (None, (), False),
        ("", (), False),
        (STATE[:-3], (), False),
        ("{}", (), False),
        # rank 0 had finished when another rank was killed
        (STATE, (0,), False),
        (STATE, (0, 2), False),
    ],
)
def test_complete_is_what_trainer_has_finished(
    tmp_path: Path, state: str | None, ranks: tuple[int, ...], complete: bool
) -> None:
    assert is_complete(put(tmp_path, 5, state, ranks)) is complete


@pytest.mark.parametrize("what", ["safetensors", "optimizer.pt", "DeepSpeed", "FSDP"])
def test_the_last_rank_that_had_not_saved_is_missed(tmp_path: Path, what: str) -> None:
    """Ranks 0 to 2 of 4 have saved their random numbers' state."""
    folder = put(tmp_path, 5, ranks=(0, 1, 2))
    assert is_complete(folder)
    inside = folder / "global_step5"
    inside.mkdir()
    if what == "safetensors":
        tag = json.dumps({"kind": "mean", "world": 4})
        save_file({"a": torch.ones(2)}, inside / "lowrank_comm-x.safetensors", {"tag": tag})
    elif what == "optimizer.pt":
        model = torch.nn.Linear(8, 8)
        base = torch.optim.SGD(model.named_parameters(), lr=0.1)
        optimizer = CompressedOptimizer(base, PowerSGD(1))
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
        optimizer.reducer.state.worker = (0, 4)
        optimizer.reducer.state.mark_consolidated()
        torch.save(optimizer.state_dict(), folder / what)
    else:
        for k in range(4):
            name = f"bf16_zero_pp_rank_{k}_mp_rank_00_optim_states.pt"
            (inside / (name if what == "DeepSpeed" else f"__{k}_0.distcp")).write_bytes(b"x")
    assert not is_complete(folder)
    torch.save(3, folder / "rng_state_3.pth")
    assert is_complete(folder)


@pytest.mark.parametrize("name", ["rng_state_1.pth", "optimizer.pt", "scheduler.pt"])
def test_a_file_that_was_cut_off_is_seen(tmp_path: Path, name: str) -> None:
    """Rank 1 is killed in the middle of its file, and rank 0 finishes."""
    folder = put(tmp_path, 5, ranks=(0, 1))
    file = folder / name
    torch.save(torch.arange(100), file)
    assert is_complete(folder)
    file.write_bytes(file.read_bytes()[:-40])
    assert not is_complete(folder)


def test_true_and_auto_pass_over_what_a_kill_left(tmp_path: Path) -> None:
    put(tmp_path, 5)
    right = put(tmp_path, 10)
    put(tmp_path, 100, state=None)
    put(tmp_path, 20, state=STATE[:10])
    (tmp_path / "checkpoint-last").mkdir()
    assert newest_complete(tmp_path) == right
    for asked in ("true", "True", "auto", True):
        assert find_checkpoint(asked, tmp_path) == str(right)


def test_where_there_is_none_auto_starts_and_true_says_so(tmp_path: Path) -> None:
    put(tmp_path, 5, state=None)
    for folder in (tmp_path, tmp_path / "not there"):
        assert find_checkpoint("auto", folder) is None
        with pytest.raises(FileNotFoundError, match=r"no complete checkpoint.*With auto instead"):
            find_checkpoint("true", folder)
    for asked in (None, False, "", "false", "False"):
        assert find_checkpoint(asked, tmp_path) is None


def test_a_folder_by_name_must_be_complete(tmp_path: Path) -> None:
    right, cut = put(tmp_path, 5), put(tmp_path, 10, state=None)
    assert find_checkpoint(str(right), Path("elsewhere")) == str(right)
    with pytest.raises(FileNotFoundError, match=r"checkpoint-10.*missing or cut off"):
        find_checkpoint(str(cut), tmp_path)


def test_the_shell_gets_the_same_folder(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "examples" / "checkpoints.py"), str(tmp_path)]
    nothing = subprocess.run(words, capture_output=True, text=True, check=True)
    right = put(tmp_path, 10)
    put(tmp_path, 20, state=None)
    newest = subprocess.run(words, capture_output=True, text=True, check=True)
    assert (nothing.stdout, newest.stdout) == ("", f"{right}\n")
