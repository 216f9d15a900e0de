"""What commit 053bcf5 saved loads into today's code, and the run goes on as it did."""

from __future__ import annotations

import importlib.util
import logging
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import torch

from lowrank_comm import checkpoint

FOLDER = Path(__file__).parents[1] / "fixtures" / "053bcf5"
BY_FILE = ["powersgd_plus", "greedylore", "powersgd_ef21"]


def writer() -> ModuleType:
    """The script that wrote the fixtures; it runs with today's code, too."""
    spec = importlib.util.spec_from_file_location("write_053bcf5", FOLDER / "write.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", [*BY_FILE, "projected_adamw", "m4"])
def test_a_state_dict_of_053bcf5_goes_on_to_the_same_parameters(case: str) -> None:
    saved = torch.load(FOLDER / f"{case}.pt", weights_only=True)
    found = writer().resume(case, saved, by_file=False)
    torch.testing.assert_close(found, saved["after"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("named", [True, False], ids=["by its name", "without a name"])
@pytest.mark.parametrize("case", BY_FILE)
def test_a_safetensors_file_of_053bcf5_goes_on_to_the_same_parameters(
    case: str, named: bool, caplog: pytest.LogCaptureFixture
) -> None:
    saved = torch.load(FOLDER / f"{case}.pt", weights_only=True)
    wanted = saved["after_by_file"]
    if not named:
        saved["name"] = None
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        found = writer().resume(case, saved, by_file=True)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    said = [text for text in caplog.messages if "without a checksum" in text]
    assert said == [
        f"{FOLDER / case / 'lowrank_comm.safetensors'} was written by an earlier version, without a"
        " checksum"
    ]


def test_todays_saves_leave_a_file_of_053bcf5_where_it_is(tmp_path: Path) -> None:
    shutil.copytree(FOLDER / "powersgd_plus", tmp_path, dirs_exist_ok=True)
    written = writer()
    reducer = written.OPTIMIZERS["powersgd_plus"](written.model()).reducer
    assert checkpoint.load(reducer, tmp_path)
    first = checkpoint.save(reducer, tmp_path)
    assert checkpoint.load(reducer, tmp_path, first)
    assert (tmp_path / "lowrank_comm.safetensors").is_file()


def test_control_a_run_without_the_saved_state_comes_elsewhere() -> None:
    written, saved = writer(), torch.load(FOLDER / "powersgd_plus.pt", weights_only=True)
    parameters = written.model()
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved["parameters"][name])
    optimizer = written.OPTIMIZERS["powersgd_plus"](parameters)
    optimizer.base.load_state_dict(saved["base"])
    written.train(optimizer, parameters, written.FIRST, written.MORE, rank=0)
    difference = (parameters["first"].detach() - saved["after"]["first"]).abs().max()
    assert float(difference) > 1e-3
