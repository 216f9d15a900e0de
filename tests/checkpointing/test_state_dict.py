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

from lowrank_comm import (
    CompressedOptimizer,
    LowRankCommError,
    PowerSGD,
    PowerSGDPlus,
    StateMismatchError,
)
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


# --- other names ---

NAMED = {
    "named": lambda model: list(model.named_parameters()),
    "unnamed": lambda model: list(model.parameters()),
    "prefixed": lambda model: [(f"module.{n}", p) for n, p in model.named_parameters()],
    "renamed": lambda model: [(f"net.{n}", p) for n, p in model.named_parameters()],
}


def run_of(how: str, steps: int, first: int = 0) -> tuple[torch.nn.Module, CompressedOptimizer]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(9, 12), torch.nn.Linear(12, 5)).double()
    base = torch.optim.AdamW(NAMED[how](model), lr=0.01)
    optimizer = CompressedOptimizer(base, PowerSGD(2), min_compression_rate=0)
    train(model, optimizer, first, steps)
    return model, optimizer


def train(model: torch.nn.Module, optimizer: Any, first: int, steps: int) -> None:
    for t in range(first, first + steps):
        optimizer.zero_grad()
        x = torch.randn(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        model(x).pow(2).sum().backward()
        optimizer.step()


def errors_in_order(optimizer: CompressedOptimizer) -> list[Tensor]:
    named = optimizer.error_memory()
    return [named[slot.name] for slot in optimizer.reducer.slots if slot.name in named]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("steps", [0, 2], ids=["fresh", "after a step"])
@pytest.mark.parametrize("there", NAMED)
@pytest.mark.parametrize("here", NAMED)
def test_other_names_load_by_order(there: str, here: str, steps: int) -> None:
    """As bare torch does, and this run keeps its own names; PowerSGD without restarts
    draws nothing, so that the run goes on bit by bit.
    """
    model, optimizer = run_of(there, 3)
    saved_state, weights = saved(optimizer.state_dict()), saved(model.state_dict())
    expected = [error.clone() for error in errors_in_order(optimizer)]
    train(model, optimizer, 3, 3)
    other, resumed = run_of(here, steps)
    names = [group.get("param_names") for group in resumed.param_groups]
    other.load_state_dict(read(weights))
    resumed.load_state_dict(read(saved_state))
    assert [group.get("param_names") for group in resumed.param_groups] == names
    assert all(map(torch.equal, errors_in_order(resumed), expected))
    assert resumed.reducer.step == 3
    train(other, resumed, 3, 3)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("there", "here", "said"),
    [
        ("named", "renamed", "'0.weight' there, 'net.0.weight' here"),
        ("named", "prefixed", ""),
        ("prefixed", "named", ""),
        ("named", "unnamed", ""),
    ],
)
def test_names_that_differ_are_said(
    there: str, here: str, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    _, optimizer = run_of(there, 1)
    _, other = run_of(here, 0)
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        other.load_state_dict(optimizer.state_dict())
    assert ("loaded by their order" in caplog.text) == bool(said)
    assert said in caplog.text


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_plain_optimizers_state_with_other_names() -> None:
    model, optimizer = run_of("prefixed", 2)
    _, other = run_of("named", 2)
    other.load_state_dict(optimizer.base.state_dict())
    assert other.param_groups[0]["param_names"][0] == "0.weight"
    train(model, optimizer, 2, 1)


def test_other_groups_are_refused_in_torchs_words_with_nothing_touched() -> None:
    one, other = Trainer(PowerSGD(2)), Trainer(PowerSGD(2))
    one.train(0, 2, 0)
    other.train(2, 2, 0)
    before, state = everything(other), one.optimizer.state_dict()
    state["param_groups"] = [{**state["param_groups"][0], "params": [0, 1]}]
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        other.optimizer.load_state_dict(state)
    assert equal(everything(other), before)


# --- damage ---

DAMAGE: dict[str, Any] = {
    "nan": lambda entry: entry["lowrank_comm_error"].view(-1)[3].fill_(float("nan")),
    "inf": lambda entry: entry["lowrank_comm_Q"].view(-1)[3].fill_(float("inf")),
    "integers": lambda entry: entry.update(lowrank_comm_error=torch.ones(12, 9).long()),
    "no tensor": lambda entry: entry.update(lowrank_comm_Q="Q"),
    "another shape of one size": lambda entry: entry.update(
        lowrank_comm_error=entry["lowrank_comm_error"].reshape(9, 12)
    ),
    "short tag": lambda entry: entry.update(lowrank_comm_tag=torch.arange(3)),
    "tag of another kind": lambda entry: entry["lowrank_comm_tag"][1].fill_(-1),
    "tag of another save": lambda entry: entry["lowrank_comm_tag"][4].fill_(9),
    "tag of another format": lambda entry: entry["lowrank_comm_tag"][0].fill_(9),
    "tag that is none": lambda entry: entry.update(lowrank_comm_tag="tag"),
}


# where the readable tag is there, it is the one that counts
WITH_KEY = [(what, True) for what in DAMAGE if what != "tag of another save"]


@pytest.mark.parametrize(("what", "readable_tag"), [*WITH_KEY, *((what, False) for what in DAMAGE)])
def test_a_damaged_state_dict_is_refused_with_nothing_touched(
    what: str, readable_tag: bool
) -> None:
    one, other = Trainer(PowerSGD(2)), Trainer(PowerSGD(2))
    one.train(0, 3, 0)
    other.train(10, 2, 0)
    state = copy.deepcopy(one.optimizer.state_dict())
    DAMAGE[what](state["state"][0])
    if not readable_tag:
        del state["lowrank_comm"]
    before = everything(other)
    with pytest.raises(StateMismatchError):
        other.optimizer.load_state_dict(state)
    assert equal(everything(other), before)
    other.train(12, 1, 0)


@pytest.mark.parametrize("value", ["7", None, -3, 1.5, float("nan"), True, 2**70])
def test_a_damaged_step_is_refused_with_nothing_touched(value: Any) -> None:
    one, other = Trainer(PowerSGDPlus(2, restart_every=5)), Trainer(PowerSGD(2))
    one.train(0, 3, 0)
    state = copy.deepcopy(one.optimizer.state_dict())
    state["lowrank_comm"]["step"] = value
    before = everything(other)
    with pytest.raises(StateMismatchError, match="step"):
        other.optimizer.load_state_dict(state)
    assert equal(everything(other), before)


def refuses_on_one(rank: int) -> tuple[str, bool]:
    """Rank 1 is given a damaged state dict: rank 0 must not go on alone."""
    trainer = Trainer(PowerSGD(2))
    trainer.train(0, 2, rank)
    trainer.optimizer.consolidate_error_memory()
    state = copy.deepcopy(trainer.optimizer.state_dict())
    trainer.train(2, 2, rank)
    if rank == 1:
        state["state"][0]["lowrank_comm_error"][0, 0] = float("nan")
    before, said = everything(trainer), "loaded"
    try:
        trainer.optimizer.load_state_dict(state)
    except StateMismatchError as error:
        said = str(error)
    unchanged = equal(everything(trainer), before)
    trainer.train(4, 1, rank)
    return said, unchanged


def test_a_refusal_on_one_rank_is_told_to_all(gloo: GlooPool) -> None:
    for said, unchanged in gloo.run(refuses_on_one, 2):
        assert said.startswith("rank 1: '0.weight': the saved error memory is not finite")
        assert unchanged


def test_state_that_is_not_finite_is_not_given_out() -> None:
    trainer = Trainer(PowerSGD(2))
    trainer.train(0, 2, 0)
    trainer.optimizer.error_memory()["1.weight"][0, 0] = float("nan")
    with pytest.raises(StateMismatchError, match=r"the error memory of 1\.weight holds nan"):
        trainer.optimizer.state_dict()
    with pytest.raises(StateMismatchError, match="on rank 0"):
        trainer.optimizer.consolidate_error_memory()


def given_out_by_one_of_two(rank: int) -> str:
    trainer = Trainer(PowerSGD(2))
    trainer.train(0, 2, rank)
    if rank == 1:
        trainer.optimizer.error_memory()["1.weight"][0, 0] = float("nan")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        state = trainer.optimizer.state_dict()
    assert any("the error memory of 1.weight holds nan" in str(w.message) for w in told) == bool(
        rank
    )
    try:
        trainer.optimizer.load_state_dict(state)
    except StateMismatchError as error:
        return str(error)
    return "loaded"


def test_a_state_dict_of_several_ranks_that_no_run_will_load_is_said(gloo: GlooPool) -> None:
    """state_dict() does not raise: only some ranks may have called it."""
    for said in gloo.run(given_out_by_one_of_two, 2):
        assert said.startswith("rank 1: '1.weight': the saved error memory is not finite")


# --- a base that had loaded before it was wrapped ---


def loaded_base(
    state: bytes, weights: bytes, dtype: torch.dtype = torch.float64
) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Sequential(torch.nn.Linear(9, 12), torch.nn.Linear(12, 5)).to(dtype)
    model.load_state_dict(read(weights))
    base = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    base.load_state_dict(read(state))
    return model, base


@pytest.mark.parametrize("attach", [True, False])
@pytest.mark.parametrize("given_back", [True, False], ids=["as Accelerate does", "as it is"])
def test_a_base_that_had_loaded_keeps_its_error_memory(
    attach: bool, given_back: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The order of nanoGPT's train.py: the base loads, and is wrapped afterwards."""
    model, optimizer = run_of("named", 3)
    state, weights = saved(optimizer.state_dict()), saved(model.state_dict())
    train(model, optimizer, 3, 3)
    other, base = loaded_base(state, weights)
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        resumed = CompressedOptimizer(base, PowerSGD(2), min_compression_rate=0)
        # what was found is not yet in the reducer, and not in the base any more
        assert all("lowrank_comm_error" not in entries for entries in base.state.values())
        if given_back:
            resumed.load_state_dict(resumed.state_dict())
        if attach:
            resumed.attach(other)
        assert resumed.reducer.step == 3
    assert "its error memory goes on from step 3" in caplog.text
    train(other, resumed, 3, 3)
    assert all(map(torch.equal, model.parameters(), other.parameters()))


def test_a_base_that_had_loaded_and_stepped_alone_starts_from_zero(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, optimizer = run_of("named", 3)
    other, base = loaded_base(saved(optimizer.state_dict()), saved(model.state_dict()))
    train(other, base, 3, 1)
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        resumed = CompressedOptimizer(base, PowerSGD(2), min_compression_rate=0)
        assert not any(error.any() for error in resumed.error_memory().values())
    assert "is of an earlier time, and is left out" in caplog.text
    assert all("lowrank_comm_error" not in entries for entries in base.state.values())


def test_a_base_that_had_rounded_the_error_memory_is_refused() -> None:
    model, optimizer = run_of("named", 3)
    state, weights = saved(optimizer.state_dict()), saved(model.state_dict())
    _, base = loaded_base(state, weights, torch.bfloat16)
    with pytest.raises(StateMismatchError, match="Wrap it first"):
        CompressedOptimizer(base, PowerSGD(2), min_compression_rate=0)


def wrapped_with_one_ranks_state(rank: int, states: list[bytes]) -> str:
    """All load rank 0's own errors and wrap: rank 1 alone cannot use them."""
    trainer = Trainer(PowerSGD(2))
    base = torch.optim.Adam(trainer.model.named_parameters(), lr=0.01)
    base.load_state_dict(read(states[0]))
    resumed = CompressedOptimizer(base, PowerSGD(2), min_compression_rate=0)
    for p in trainer.model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    try:
        resumed.step()
    except LowRankCommError as error:
        assert all(map(torch.equal, before, trainer.model.parameters()))
        return str(error)
    return "stepped"


def own_states(rank: int) -> bytes:
    trainer = Trainer(PowerSGD(2))
    trainer.train(0, 2, rank)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return saved(trainer.optimizer.state_dict())


def test_what_a_base_had_loaded_and_one_rank_cannot_use_is_told_by_all(gloo: GlooPool) -> None:
    states = gloo.run(own_states, 2)
    for said in gloo.run(wrapped_with_one_ranks_state, 2, states):
        assert "state found in the base optimizer" in said
        assert "rank 0's own of 2 ranks; this is rank 1 of 2" in said


def test_what_a_base_had_loaded_and_does_not_fit_is_refused_at_the_first_step() -> None:
    model, optimizer = run_of("named", 3)
    other, base = loaded_base(saved(optimizer.state_dict()), saved(model.state_dict()))
    resumed = CompressedOptimizer(base, PowerSGD(2), min_compression_rate=1000)
    with pytest.raises(StateMismatchError, match="it would be lost"):
        train(other, resumed, 3, 1)


# --- an uncompressed resume ---


def test_an_optimizer_that_is_left_alone_says_what_it_drops(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _, optimizer = run_of("named", 3)
    other = torch.nn.Sequential(torch.nn.Linear(9, 12), torch.nn.Linear(12, 5)).double()
    base = torch.optim.AdamW(other.named_parameters(), lr=0.01)
    plain = CompressedOptimizer.from_config(base, {"compressor": "powersgd", "enabled": False})
    assert plain is base
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        plain.load_state_dict(optimizer.base.state_dict())
        assert not caplog.text
        plain.load_state_dict(optimizer.state_dict())
    # biases are dense, and have none
    assert "the error memory of 2 parameters is dropped" in caplog.text
    for entries in plain.state.values():
        assert set(entries) == {"step", "exp_avg", "exp_avg_sq"}
