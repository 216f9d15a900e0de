"""State: what is saved, for whom it is right, and how a run goes on from it."""

from __future__ import annotations

import copy
import io
import itertools
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file as read_safetensors
from safetensors.torch import save_file as plain_save
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from lowrank_comm import (
    CompressedOptimizer,
    ErrorFeedback,
    PowerSGD,
    PowerSGDPlus,
    StateMismatchError,
)
from lowrank_comm.checkpointing import file as library_checkpoint
from lowrank_comm.compressors.base import Compressor
from tests.support.gloo import GlooPool
from tests.support.reference import gradient

COMPRESSORS = [
    PowerSGD(2),
    PowerSGDPlus(2, restart_every=4),
    PowerSGDPlus(2, restart_every=4, restart="randomized", stagger=True),
    PowerSGDPlus(2, restart_every=4, consensus_restart=True),
]
every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)
FIRST, MORE = 6, 10
Arrays = dict[str, np.ndarray]


class Trainer:
    """A plain model under a compressed Adam or SGD, with gradients that are a function
    of (step, worker) and the parameters.
    """

    def __init__(
        self,
        compressor: Compressor,
        dtype: torch.dtype = torch.float64,
        adam: bool = True,
        **options: Any,
    ) -> None:
        self.model = nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 5)).to(dtype)
        with torch.no_grad():
            for k, p in enumerate(self.model.parameters()):
                p.copy_(torch.from_numpy(gradient(tuple(p.shape), 0, 0, 50 + k)))
        named = self.model.named_parameters()
        base = torch.optim.Adam(named, lr=0.01) if adam else torch.optim.SGD(named, lr=0.01)
        self.optimizer = CompressedOptimizer(
            base, compressor=compressor, **({"min_compression_rate": 0} | options)
        )

    def train(self, first: int, steps: int, worker: int, common: bool = False) -> list[Arrays]:
        """common: the gradient has no part of its own, so that the mean is the same
        whatever the number of workers.
        """
        seen = []
        for t in range(first, first + steps):
            for k, p in enumerate(self.model.parameters()):
                p.grad = 0.1 * p.detach() + torch.as_tensor(
                    gradient(tuple(p.shape), t, 0 if common else worker, k), dtype=p.dtype
                )
            self.optimizer.reduce_gradients()
            seen.append(
                {name: p.grad.double().numpy().copy() for name, p in self.model.named_parameters()}
            )
            self.optimizer.step()
        return seen


def saved(what: Any) -> bytes:
    """Through a file, as a user would."""
    buffer = io.BytesIO()
    torch.save(what, buffer)
    return buffer.getvalue()


def read(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def largest_difference(one: list[Arrays], other: list[Arrays]) -> float:
    return max(
        float(np.abs(a[name] - b[name]).max())
        for a, b in zip(one, other, strict=True)
        for name in a
    )


# --- one process -----------------------------------------------------------------------------------------------------


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


def test_the_tag_is_readable() -> None:
    one = Trainer(PowerSGD(2), seed=9)
    one.train(0, 3, 0)
    tag = one.optimizer.state_dict()["lowrank_comm"]
    assert {key: tag[key] for key in ("kind", "rank", "world", "step", "seed")} == {
        "kind": "mean", "rank": 0, "world": 1, "step": 3, "seed": 9
    }  # fmt: skip


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


def test_errors_that_would_be_lost_are_refused() -> None:
    """Resuming with other rules: the saved error has no place to go. It is not dropped
    without a word.
    """
    one = Trainer(PowerSGD(2))
    one.train(0, 3, 0)
    with pytest.raises(StateMismatchError, match=r"0\.weight"):
        Trainer(PowerSGD(2), min_compression_rate=1000).optimizer.load_state_dict(
            one.optimizer.state_dict()
        )


def everything(trainer: Trainer) -> dict[str, Any]:
    """All that a load may change, as copies."""
    optimizer = trainer.optimizer
    return {
        "errors": {name: e.clone() for name, e in optimizer.error_memory().items()},
        "bases": {
            name: parts["Q"].clone() for name, parts in optimizer.reducer.state.bases().items()
        },
        "moments": [
            optimizer.state[p]["exp_avg"].clone()
            for p in trainer.model.parameters()
            if p in optimizer.state
        ],
        "step": optimizer.reducer.step,
        "rate": optimizer.param_groups[0]["lr"],
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


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


def test_what_a_saved_state_does_not_have_starts_anew(caplog: pytest.LogCaptureFixture) -> None:
    fresh, used = Trainer(PowerSGD(2)), Trainer(PowerSGD(2))
    used.train(0, 3, 0)
    state = used.optimizer.state_dict()
    # the second layer, as saved before it was trained
    for number in (2, 3):
        state["state"][number] = {
            k: v for k, v in state["state"][number].items() if not k.startswith("lowrank_comm_")
        }
    kept = used.optimizer.error_memory()["0.weight"].clone()
    used.train(3, 2, 0)
    state = copy.deepcopy(state)
    state["state"][0]["lowrank_comm_error"] = kept
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        used.optimizer.load_state_dict(state)
    assert "1.weight" in caplog.text
    assert torch.equal(used.optimizer.error_memory()["0.weight"], kept)
    assert not used.optimizer.error_memory()["1.weight"].any()
    assert torch.equal(
        used.optimizer.reducer.state.bases()["1.weight"]["Q"],
        fresh.optimizer.reducer.state.bases()["1.weight"]["Q"],
    )


def test_another_rank_keeps_the_error_and_starts_the_basis_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    one, other = Trainer(PowerSGD(2)), Trainer(PowerSGD(3))
    one.train(0, 3, 0)
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        other.optimizer.load_state_dict(one.optimizer.state_dict())
    assert "rank" in caplog.text
    for name, error in one.optimizer.error_memory().items():
        assert torch.equal(other.optimizer.error_memory()[name], error)
    other.train(3, 2, 0)


KEPT = {"ef14": ", the error memory is kept", "ef21": ", the EF21 memory (y) is kept", "none": ""}
KEPT["ef21_sgdm"] = ", the EF21 memory (y, v) is kept"


@pytest.mark.parametrize("form", KEPT)
def test_what_is_kept_beside_a_basis_that_starts_anew_is_said(
    form: str, caplog: pytest.LogCaptureFixture
) -> None:
    """y and v are the parameter's, whatever the rank, and so is what is said of them."""
    options = {"error_feedback": ErrorFeedback(form=form)}
    one, other = Trainer(PowerSGD(2), **options), Trainer(PowerSGD(3), **options)
    one.train(0, 3, 0)
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        other.optimizer.load_state_dict(one.optimizer.state_dict())
    assert caplog.messages == [
        "the saved bases of 2 parameters (first: 0.weight) are of another rank, or of other blocks"
        " of rows: they start anew" + KEPT[form]
    ]
    for name, kept in one.optimizer.reducer.state.bases().items():
        found = other.optimizer.reducer.state.bases()[name]
        for symbol in kept.keys() - {"Q"}:
            assert kept[symbol].any()
            assert torch.equal(found[symbol], kept[symbol])
    other.train(3, 2, 0)


def test_what_another_form_did_not_keep_starts_from_zero(caplog: pytest.LogCaptureFixture) -> None:
    """All of it, and that is said: y without v, or without the mean of the y's, is not
    what the form keeps. Bases go on.
    """
    one, other = (
        Trainer(PowerSGD(2), error_feedback=ErrorFeedback(form=form))
        for form in ("ef21", "ef21_sgdm")
    )
    one.train(0, 3, 0)
    other.train(0, 3, 0)
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        other.optimizer.load_state_dict(one.optimizer.state_dict())
    assert caplog.messages == [
        "no saved EF21 memory (y, v) for 2 parameters (first: 0.weight): they start from zero"
    ]
    for name, kept in one.optimizer.reducer.state.bases().items():
        found = other.optimizer.reducer.state.bases()[name]
        assert not any(found[symbol].any() for symbol in ("y", "v", "v_started"))
        assert torch.equal(found["Q"], kept["Q"])


def test_what_ef21_keeps_of_another_model_is_refused() -> None:
    """As an error is; and a v that is one worker's own does not go to another."""
    one, other = (
        Trainer(PowerSGD(2), error_feedback=ErrorFeedback(form="ef21_sgdm")) for _ in range(2)
    )
    one.train(0, 3, 0)
    before = everything(other)
    state = copy.deepcopy(one.optimizer.state_dict())
    state["state"][0]["lowrank_comm_v"] = torch.zeros(9, 11)
    with pytest.raises(
        StateMismatchError, match=r"'0\.weight': the saved v is \(9, 11\), the parameter \(12, 9\)"
    ):
        other.optimizer.load_state_dict(state)
    state = copy.deepcopy(one.optimizer.state_dict())
    state["lowrank_comm"] |= {"kind": "own", "rank": 1, "world": 2}
    with pytest.raises(
        StateMismatchError, match=r"the saved EF21 memory \(y, v\) is rank 1's own of 2 ranks"
    ):
        other.optimizer.load_state_dict(state)
    assert equal(everything(other), before)


def test_restart_schedule_goes_on_where_it_was() -> None:
    """t is part of the state: a run saved at t = 6 with tau = 4 restarts next at t = 8."""
    one = Trainer(PowerSGDPlus(2, restart_every=4))
    other = Trainer(PowerSGDPlus(2, restart_every=4))
    one.train(0, 6, 0)
    other.optimizer.load_state_dict(one.optimizer.state_dict())
    restarts = []
    for t in range(6, 10):
        other.train(t, 1, 0)
        restarts.append(other.optimizer.last_report.restarts)
    assert restarts == [0, 0, 2, 0]


# --- several workers -------------------------------------------------------------------------------------------------


def own_state(rank: int, compressor: Compressor) -> dict[str, Any]:
    """Only rank 0 calls state_dict() (a collective in there would hang), then every
    rank does; then each loads its own.
    """
    one, resumed = Trainer(compressor), Trainer(compressor)
    one.train(0, FIRST, rank)
    before = one.optimizer.ledger.collectives
    if rank == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            one.optimizer.state_dict()
            one.optimizer.state_dict()
    torch.distributed.barrier()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = saved(one.optimizer.state_dict())
    resumed.model.load_state_dict(one.model.state_dict())
    resumed.optimizer.load_state_dict(read(state))
    return {
        "silent": one.optimizer.ledger.collectives == before,
        "warned": (
            sum("consolidate_error_memory" in str(w.message) for w in caught) if rank == 0 else 1
        ),
        "state": state,
        "difference": largest_difference(
            one.train(FIRST, MORE, rank), resumed.train(FIRST, MORE, rank)
        ),
    }


def load_foreign(rank: int, compressor: Compressor, states: list[bytes], shift: int) -> str:
    """Load the state of rank + shift."""
    trainer = Trainer(compressor)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    try:
        trainer.optimizer.load_state_dict(read(states[(rank + shift) % len(states)]))
    except StateMismatchError as error:
        assert all(
            torch.equal(p, q) for p, q in zip(trainer.model.parameters(), before, strict=True)
        )
        # the base has not been touched
        assert not trainer.optimizer.state
        return str(error)
    return "accepted"


@every_compressor
def test_own_state_is_for_the_same_rank_of_as_many_workers(
    gloo: GlooPool, compressor: Compressor
) -> None:
    seen = gloo.run(own_state, 2, compressor)
    states = [one["state"] for one in seen]
    for rank, one in enumerate(seen):
        assert one["silent"]
        # with one warning
        assert one["warned"] == 1
        assert one["difference"] == 0.0
        tag = read(one["state"])["lowrank_comm"]
        assert (tag["kind"], tag["rank"], tag["world"], tag["step"]) == ("own", rank, 2, FIRST)
    assert gloo.run(load_foreign, 2, compressor, states, 0) == ["accepted"] * 2
    for text in gloo.run(load_foreign, 2, compressor, states, 1) + gloo.run(
        load_foreign, 1, compressor, states, 0
    ):
        assert "consolidate_error_memory" in text
        assert "rank" in text


def mean_state(rank: int, compressor: Compressor) -> dict[str, Any]:
    """Train, consolidate, save; go on as the control."""
    trainer = Trainer(compressor)
    trainer.train(0, FIRST, rank)
    mean = {name: e.clone() for name, e in trainer.optimizer.error_memory().items()}
    for error in mean.values():
        torch.distributed.all_reduce(error)
    trainer.optimizer.consolidate_error_memory()
    exact = all(
        torch.allclose(e, mean[name] / torch.distributed.get_world_size(), rtol=1e-12, atol=1e-13)
        for name, e in trainer.optimizer.error_memory().items()
    )
    with warnings.catch_warnings():
        # no warning about "own"
        warnings.simplefilter("error")
        state = saved(trainer.optimizer.state_dict())
    weights = saved(trainer.model.state_dict())
    return {
        "state": state,
        "weights": weights,
        "exact": exact,
        "seen": trainer.train(FIRST, MORE, rank, common=True),
    }


def resume(rank: int, compressor: Compressor, state: bytes, weights: bytes) -> list[Arrays]:
    trainer = Trainer(compressor)
    trainer.model.load_state_dict(read(weights))
    trainer.optimizer.load_state_dict(read(state))
    return trainer.train(FIRST, MORE, rank, common=True)


@every_compressor
@pytest.mark.parametrize(("before", "after"), [(2, 1), (2, 2), (2, 4), (4, 2), (3, 1)])
def test_the_mean_resumes_at_any_world_size(
    gloo: GlooPool, compressor: Compressor, before: int, after: int
) -> None:
    """Rank 0's file, loaded by every worker of another world: the next 10 steps to
    1e-10, where the mean gradients are equal.
    """
    first = gloo.run(mean_state, before, compressor)
    assert all(one["exact"] for one in first)
    assert read(first[0]["state"])["lowrank_comm"]["kind"] == "mean"
    for seen in gloo.run(resume, after, compressor, first[0]["state"], first[0]["weights"]):
        assert largest_difference(seen, first[0]["seen"]) < 1e-10


def consolidate_then_step(rank: int) -> list[str]:
    """The tag is "mean" right after consolidation, and "own" again after the next step;
    consolidation itself changes no trajectory.
    """
    one, twin = Trainer(PowerSGD(2)), Trainer(PowerSGD(2))
    one.train(0, 3, rank)
    twin.train(0, 3, rank)
    kinds = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one.optimizer.consolidate_error_memory()
        kinds.append(one.optimizer.state_dict()["lowrank_comm"]["kind"])
        assert largest_difference(one.train(3, 5, rank), twin.train(3, 5, rank)) < 1e-11
        kinds.append(one.optimizer.state_dict()["lowrank_comm"]["kind"])
    return kinds


def test_the_tag_tells_whether_the_state_is_the_mean(gloo: GlooPool) -> None:
    assert gloo.run(consolidate_then_step, 2) == [["mean", "own"]] * 2


# --- the file of `lowrank_comm.checkpointing.file` ---------------------------------------------------------------------------


def save_file(rank: int, compressor: Compressor, folder: str) -> dict[str, Any]:
    trainer = Trainer(compressor)
    trainer.train(0, FIRST, rank)
    library_checkpoint.save(trainer.optimizer.reducer, folder)
    torch.distributed.barrier()
    return {"weights": saved(trainer.model.state_dict()), "base": saved(trainer.optimizer.base.state_dict()),
            "seen": trainer.train(FIRST, MORE, rank, common=True)}  # fmt: skip


def load_file(
    rank: int, compressor: Compressor, folder: str, weights: bytes, base: bytes
) -> list[Arrays]:
    trainer = Trainer(compressor)
    trainer.model.load_state_dict(read(weights))
    trainer.optimizer.load_state_dict(read(base))
    assert library_checkpoint.load(trainer.optimizer.reducer, folder)
    return trainer.train(FIRST, MORE, rank, common=True)


@every_compressor
def test_the_file_resumes_at_any_world_size(
    gloo: GlooPool, compressor: Compressor, tmp_path: Path
) -> None:
    first = gloo.run(save_file, 2, compressor, str(tmp_path))
    # one file, nothing half-written beside it
    assert [path.name for path in tmp_path.iterdir()] == ["lowrank_comm.safetensors"]
    with safe_open(tmp_path / "lowrank_comm.safetensors", framework="pt") as file:
        assert set(file.keys()) == {
            f"{symbol}/{name}" for symbol in ("error", "Q") for name in ("0.weight", "1.weight")
        }
        assert '"mean"' in file.metadata()["tag"]
    for world in (1, 2, 3):
        for seen in gloo.run(
            load_file, world, compressor, str(tmp_path), first[0]["weights"], first[0]["base"]
        ):
            assert largest_difference(seen, first[0]["seen"]) < 1e-10


def test_a_missing_file_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trainer = Trainer(PowerSGD(2))
    with caplog.at_level(logging.WARNING, "lowrank_comm"):
        trainer.train(0, 2, 0)
        assert library_checkpoint.load(trainer.optimizer.reducer, tmp_path) is False
    assert str(tmp_path) in caplog.text
    assert not any(e.any() for e in trainer.optimizer.error_memory().values())
    assert trainer.optimizer.reducer.step == 0


def test_a_foreign_file_is_refused(tmp_path: Path) -> None:
    plain_save({"error/0.weight": torch.ones(12, 9)}, tmp_path / "lowrank_comm.safetensors")
    with pytest.raises(StateMismatchError, match="lowrank_comm"):
        library_checkpoint.load(Trainer(PowerSGD(2)).optimizer.reducer, tmp_path)


def changed_after_consolidation(rank: int) -> list[float]:
    """Whoever writes into the live views, or into one parameter's state, may
    consolidate again.
    """
    trainer = Trainer(PowerSGD(2))
    trainer.train(0, 2, rank)
    trainer.optimizer.consolidate_error_memory()
    for error in trainer.optimizer.error_memory().values():
        error.fill_(rank)
    trainer.optimizer.consolidate_error_memory()
    means = [float(e.mean()) for e in trainer.optimizer.error_memory().values()]
    trainer.optimizer.reducer.state.set_state("0.weight", torch.ones(12, 9), {})
    assert not trainer.optimizer.reducer.state.consolidated
    return means


def test_consolidation_after_the_memory_was_changed(gloo: GlooPool) -> None:
    assert gloo.run(changed_after_consolidation, 2) == [[0.5, 0.5]] * 2


def own_after_the_group_is_gone(rank: int) -> tuple[str, int, int]:
    trainer = Trainer(PowerSGD(2))
    fresh = trainer.optimizer.state_dict()
    assert "lowrank_comm" not in fresh
    trainer.train(0, 2, rank)
    torch.distributed.destroy_process_group()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tag = trainer.optimizer.state_dict()["lowrank_comm"]
    return tag["kind"], tag["rank"], tag["world"]


def test_a_state_dict_after_the_process_group_is_gone_is_still_of_one_worker(
    gloo: GlooPool,
) -> None:
    assert gloo.run(own_after_the_group_is_gone, 2) == [("own", 0, 2), ("own", 1, 2)]


def before_the_first_step(rank: int) -> str:
    trainer = Trainer(PowerSGD(2))
    trainer.optimizer.error_memory()
    return trainer.optimizer.state_dict()["lowrank_comm"]["kind"]


def test_before_the_first_step_every_workers_memory_is_the_mean(gloo: GlooPool) -> None:
    assert gloo.run(before_the_first_step, 2) == ["mean", "mean"]


def broken_files(rank: int, folder: str, what: str) -> str:
    """A checkpoint that one rank cannot use: all ranks must say so, and go on as
    before.
    """
    trainer = Trainer(PowerSGD(2))
    trainer.train(0, 2, rank)
    mine = Path(folder) / (f"rank_{rank}" if what == "missing on one" else "all")
    name = library_checkpoint.save(trainer.optimizer.reducer, mine)
    torch.distributed.barrier()
    file = mine / "lowrank_comm.safetensors"
    if rank == 0:
        # save() has returned on all ranks, so all find it
        assert file.is_file()
        if what == "truncated":
            file.write_bytes(file.read_bytes()[:100])
        if what == "a later format":
            tensors = read_safetensors(file)
            plain_save(tensors, file, metadata={"tag": '{"format": 99, "new": 1}', "name": name})
    torch.distributed.barrier()
    before = everything(trainer)
    try:
        library_checkpoint.load(
            trainer.optimizer.reducer, mine, "another" if what == "left by another save" else name
        )
    except StateMismatchError as error:
        assert equal(everything(trainer), before)
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("truncated", ["cannot be read", "lowrank_comm.safetensors"]),
        ("a later format", ["format 99", "update"]),
        ("left by another save", ["does not belong to this checkpoint"]),
        ("missing on one", ["of step 2 on rank 0, missing on rank 1"]),
    ],
)
def test_a_file_that_one_worker_cannot_use_is_refused_by_all(
    gloo: GlooPool, tmp_path: Path, what: str, words: list[str]
) -> None:
    if what == "missing on one":
        (tmp_path / "rank_1").mkdir()
    texts = gloo.run(broken_files, 2, str(tmp_path), what)
    for text in texts:
        assert all(word in text for word in words), text


def fails_to_save(rank: int, folder: str, disk_is_full: bool) -> str:
    trainer = Trainer(PowerSGD(2))
    trainer.train(0, 2, rank)
    # as safetensors says it
    if disk_is_full:

        def full(*_: Any, **__: Any) -> None:
            raise SafetensorError("No space left on device")

        library_checkpoint.save_file = full
    try:
        library_checkpoint.save(trainer.optimizer.reducer, folder)
    except StateMismatchError as error:
        return str(error)
    finally:
        library_checkpoint.save_file = plain_save
    return "no error"


@pytest.mark.parametrize(
    "disk_is_full", [False, True], ids=["the folder is a file", "the disk is full"]
)
def test_a_save_that_fails_on_rank_0_is_told_by_all(
    gloo: GlooPool, tmp_path: Path, disk_is_full: bool
) -> None:
    folder = tmp_path / "taken"
    if not disk_is_full:
        folder.write_text("a file")
    texts = gloo.run(fails_to_save, 2, str(folder), disk_is_full, timeout=20.0)
    assert texts[0] == texts[1]
    assert "could not be saved" in texts[0]


def test_the_file_that_a_checkpoint_was_saved_with_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(StateMismatchError, match="missing, and with it the error memory"):
        library_checkpoint.load(Trainer(PowerSGD(2)).optimizer.reducer, tmp_path, "a name")


# --- torch.distributed.checkpoint's helpers --------------------------------------------------------------------------


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


def test_views_of_the_error_memory_stay_live() -> None:
    """A view taken once shows every later step's error, for large matrices too, whose
    memory changes its place.
    """
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(256, 200), torch.nn.Tanh(), torch.nn.Linear(200, 16)
    )
    optimizer = CompressedOptimizer(torch.optim.SGD(model.named_parameters(), lr=0.1), PowerSGD(2))
    held = optimizer.error_memory()
    seen = []
    for _ in range(4):
        model(torch.randn(8, 256)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, fresh in optimizer.error_memory().items():
            assert torch.equal(held[name], fresh)
            assert held[name].data_ptr() == fresh.data_ptr()
        seen.append(held["0.weight"].clone())
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(seen))
    held["0.weight"].zero_()
    assert not optimizer.error_memory()["0.weight"].any()
