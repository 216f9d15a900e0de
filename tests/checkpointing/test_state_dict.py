"""State dicts: round trips, torch's checkpoint helpers, and that a refused state
changes nothing.
"""

from __future__ import annotations

import copy
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lowrank_comm import PowerSGD, PowerSGDPlus, StateMismatchError
from lowrank_comm.compressors.base import Compressor
from tests.support.checkpointed import (
    COMPRESSORS,
    FIRST,
    MORE,
    Trainer,
    equal,
    every_compressor,
    everything,
    largest_difference,
    read,
    saved,
)
from tests.support.gloo import GlooPool


@every_compressor
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_round_trip_is_bit_equal(compressor: Compressor, dtype: torch.dtype) -> None:
    """state_dict, torch.save, torch.load(weights_only=True), load_state_dict: the
    resumed run gives the same bits, and a float32 error memory of a bfloat16 parameter
    is not rounded.
    """
    one, other = Trainer(compressor, dtype), Trainer(compressor, dtype)
    one.train(0, FIRST, 0)
    state, weights = saved(one.optimizer.state_dict()), saved(one.model.state_dict())
    other.model.load_state_dict(read(weights))
    other.optimizer.load_state_dict(read(state))
    for name, error in one.optimizer.error_memory().items():
        assert error.dtype == torch.promote_types(dtype, torch.float32)
        assert error.any()
        assert torch.equal(error, other.optimizer.error_memory()[name])
    one.train(FIRST, MORE, 0)
    other.train(FIRST, MORE, 0)
    assert all(
        torch.equal(p, q)
        for p, q in zip(one.model.parameters(), other.model.parameters(), strict=True)
    )


def test_the_round_trip_carries_what_it_claims() -> None:
    """Negative control: without the compressor's part the resumed run is another one,
    and a warning says that errors start from zero.
    """
    one, other = Trainer(PowerSGD(2)), Trainer(PowerSGD(2))
    one.train(0, FIRST, 0)
    other.model.load_state_dict(one.model.state_dict())
    other.optimizer.load_state_dict(one.optimizer.base.state_dict())
    assert not any(e.any() for e in other.optimizer.error_memory().values())
    assert largest_difference(one.train(FIRST, 3, 0), other.train(FIRST, 3, 0)) > 1e-3


def test_a_plain_optimizers_state_is_accepted_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    plain = Trainer(PowerSGD(2))
    plain.train(0, 2, 0)
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        Trainer(PowerSGD(2)).optimizer.load_state_dict(plain.optimizer.base.state_dict())
    assert "zero" in caplog.text


@pytest.mark.parametrize("between", [0, 2])
def test_errors_of_an_earlier_time_do_not_come_back(
    between: int, caplog: pytest.LogCaptureFixture
) -> None:
    """Compressed, plain for some steps, compressed again: a plain Adam hands on the
    entries that it does not know.
    """
    one, other = Trainer(PowerSGD(2)), Trainer(PowerSGD(2))
    one.train(0, FIRST, 0)
    plain = torch.optim.Adam(one.model.named_parameters(), lr=0.01)
    plain.load_state_dict(read(saved(one.optimizer.state_dict())))
    for _ in range(between):
        # with the gradients that are there
        plain.step()
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        other.optimizer.load_state_dict(read(saved(plain.state_dict())))
    assert ("without compression" in caplog.text) == (between > 0)
    if between:
        assert f"1.bias, which went on from step {FIRST} to {FIRST + between}" in caplog.text
    assert all(
        bool(error.any()) == (not between) for error in other.optimizer.error_memory().values()
    )


def test_state_dict_before_the_first_step() -> None:
    """Accelerate calls it in prepare(): nothing to say yet, nothing raised, nothing
    warned; what it gives can be loaded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = Trainer(PowerSGD(2))
        state = one.optimizer.state_dict()
        one.optimizer.load_state_dict(state)
    other = Trainer(PowerSGD(2))
    assert largest_difference(one.train(0, 4, 0), other.train(0, 4, 0)) == 0.0


def test_state_dict_does_not_touch_the_live_state() -> None:
    """Adam takes a non-empty state for one that it has initialised: the compressor's
    part is in the dict only.
    """
    one = Trainer(PowerSGD(2))
    one.optimizer.state_dict()
    one.train(0, 1, 0)
    one.optimizer.state_dict()
    for entries in one.optimizer.state.values():
        assert set(entries) == {"step", "exp_avg", "exp_avg_sq"}


def test_loading_hooks_of_torch_run() -> None:
    one = Trainer(PowerSGD(2))
    one.train(0, 1, 0)
    calls: list[str] = []
    one.optimizer.register_state_dict_pre_hook(lambda *_: calls.append("before saving"))
    one.optimizer.register_state_dict_post_hook(lambda *_: calls.append("after saving"))
    one.optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("before loading"))
    one.optimizer.register_load_state_dict_post_hook(lambda *_: calls.append("after loading"))
    one.optimizer.load_state_dict(one.optimizer.state_dict())
    assert calls == ["before saving", "after saving", "before loading", "after loading"]


def test_a_refused_state_changes_nothing() -> None:
    """Neither the base nor the compressor: who catches the error goes on as before."""
    # one matrix goes dense there
    one, other = Trainer(PowerSGD(2)), Trainer(PowerSGD(2), min_compression_rate=2)
    one.train(0, 3, 0)
    other.train(10, 2, 0)
    assert len(other.optimizer.error_memory()) == 1
    one.optimizer.param_groups[0]["lr"] = 0.5
    before = everything(other)
    with pytest.raises(StateMismatchError):
        other.optimizer.load_state_dict(one.optimizer.state_dict())
    assert equal(everything(other), before)


def test_a_load_replaces_all_that_was_there(caplog: pytest.LogCaptureFixture) -> None:
    """A plain optimizer's state over a run that has begun: errors, bases and t are
    those of a start, and that is said.
    """
    fresh, used = Trainer(PowerSGD(2)), Trainer(PowerSGD(2))
    used.train(0, 3, 0)
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        used.optimizer.load_state_dict(torch.optim.Adam(used.model.named_parameters()).state_dict())
    assert "error memory starts from zero" in caplog.text
    found, start = everything(used), everything(fresh)
    assert all(equal(found[part], start[part]) for part in ("errors", "bases", "step"))


@pytest.mark.parametrize("adam", [True, False], ids=["Adam", "SGD without state"])
@pytest.mark.parametrize("compressor", COMPRESSORS[:2], ids=repr)
def test_torch_checkpoint_helpers_keep_the_error_memory(compressor: Compressor, adam: bool) -> None:
    """get_optimizer_state_dict drops top-level keys that it does not know;
    set_optimizer_state_dict makes a fresh optimizer initialise its state by a step of
    its own, and wants a state for every parameter or for none. None of that may cost
    the error memory or count as a step.
    """
    one, other = Trainer(compressor, adam=adam), Trainer(compressor, adam=adam)
    one.train(0, FIRST, 0)
    # it holds live tensors
    state = copy.deepcopy(get_optimizer_state_dict(one.model, one.optimizer))
    other.model.load_state_dict(get_model_state_dict(one.model))
    set_optimizer_state_dict(other.model, other.optimizer, state)
    assert other.optimizer.ledger.steps == 0
    for name, error in one.optimizer.error_memory().items():
        assert error.any()
        assert torch.equal(other.optimizer.error_memory()[name], error)
    assert largest_difference(one.train(FIRST, MORE, 0), other.train(FIRST, MORE, 0)) == 0.0


def test_torch_checkpoint_helpers_flattened_lose_it_but_not_silently(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """With flatten_optimizer_state_dict torch's loader asks for the names of the live
    state only, so the compressor's part, although saved, never arrives. The base's
    state does, and the log says that errors start from zero.
    """
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    one, other = Trainer(PowerSGD(2)), Trainer(PowerSGD(2))
    one.train(0, FIRST, 0)
    state = copy.deepcopy(get_optimizer_state_dict(one.model, one.optimizer, options=options))
    assert torch.equal(
        state["state.0.weight.lowrank_comm_error"], one.optimizer.error_memory()["0.weight"]
    )
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        set_optimizer_state_dict(other.model, other.optimizer, state, options=options)
    assert "error memory starts from zero" in caplog.text
    weights = zip(one.model.parameters(), other.model.parameters(), strict=True)
    assert all(
        torch.equal(one.optimizer.state[p]["exp_avg"], other.optimizer.state[q]["exp_avg"])
        for p, q in weights
    )


def helpers_on_ranks(rank: int, folder: str) -> dict[str, float]:
    """Through torch.distributed.checkpoint's own files, saved by two ranks after
    consolidation, loaded by two fresh ones.
    """
    import torch.distributed.checkpoint as dcp

    one = Trainer(PowerSGDPlus(2, restart_every=4))
    other = Trainer(PowerSGDPlus(2, restart_every=4))
    one.train(0, FIRST, rank)
    one.optimizer.consolidate_error_memory()
    dcp.save(
        {
            "model": get_model_state_dict(one.model),
            "optimizer": get_optimizer_state_dict(one.model, one.optimizer),
        },
        checkpoint_id=folder,
    )
    target = {
        "model": get_model_state_dict(other.model),
        "optimizer": get_optimizer_state_dict(other.model, other.optimizer),
    }
    dcp.load(target, checkpoint_id=folder)
    other.model.load_state_dict(target["model"])
    set_optimizer_state_dict(other.model, other.optimizer, target["optimizer"])
    norm = max(float(e.norm()) for e in other.optimizer.error_memory().values())
    return {
        "norm": norm,
        "difference": largest_difference(
            one.train(FIRST, MORE, rank), other.train(FIRST, MORE, rank)
        ),
    }


def test_torch_checkpoint_files(gloo: GlooPool, tmp_path: Path) -> None:
    for seen in gloo.run(helpers_on_ranks, 2, str(tmp_path)):
        assert seen["norm"] > 1e-3
        assert seen["difference"] < 1e-10


def test_tensors_in_a_state_dict_are_those_of_the_moment_it_is_used(tmp_path: Path) -> None:
    """As torch's own optimizers, state_dict() gives references; a state dict that was
    saved is independent of later steps.
    """
    trainer = Trainer(PowerSGD(2))
    trainer.train(0, 2, 0)
    state = trainer.optimizer.state_dict()
    data = read(saved(state))
    trainer.train(2, 1, 0)

    def error(of: dict[str, Any]) -> Tensor:
        return next(
            entries["lowrank_comm_error"]
            for entries in of["state"].values()
            if "lowrank_comm_error" in entries
        )

    assert not torch.equal(error(data), error(trainer.optimizer.state_dict()))


def test_a_state_dict_that_is_held_keeps_its_bases_when_another_is_loaded() -> None:
    one, other = Trainer(PowerSGD(2)), Trainer(PowerSGD(2))
    one.train(0, 2, 0)
    other.train(5, 3, 0)
    held = one.optimizer.state_dict()
    basis = held["state"][0]["lowrank_comm_Q"].clone()
    one.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
    assert torch.equal(held["state"][0]["lowrank_comm_Q"], basis)
    assert not torch.equal(one.optimizer.reducer.state.bases()["0.weight"]["Q"], basis)
