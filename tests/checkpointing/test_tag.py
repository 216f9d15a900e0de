"""The tag of a saved state: whose error memory it is, and for how many workers."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from lowrank_comm import PowerSGD, StateMismatchError
from lowrank_comm.checkpointing.tag import Tag, read_tag
from lowrank_comm.compressors.base import Compressor
from tests.support.checkpointed import (
    FIRST,
    MORE,
    Arrays,
    Trainer,
    every_compressor,
    largest_difference,
    read,
    saved,
)
from tests.support.gloo import GlooPool


def test_the_tag_is_readable() -> None:
    one = Trainer(PowerSGD(2), seed=9)
    one.train(0, 3, 0)
    tag = one.optimizer.state_dict()["lowrank_comm"]
    assert {key: tag[key] for key in ("kind", "rank", "world", "step", "seed")} == {
        "kind": "mean", "rank": 0, "world": 1, "step": 3, "seed": 9
    }  # fmt: skip


TAG: dict[str, Any] = {"kind": "mean", "rank": 0, "world": 2, "step": 5, "seed": 0, "format": 1}


def test_fields_of_a_later_version_are_left_out() -> None:
    unsteady = {"a": [1, 2, True]}
    tag = read_tag(TAG | {"unsteady": unsteady, "new": {"key": 1}}, "the file")
    assert tag == Tag("mean", 0, 2, 5, 0, 1, {"a": (1, 2, True)})
    # of an earlier version
    assert read_tag(TAG, "the file").unsteady == {}


@pytest.mark.parametrize(
    "change",
    [{"step": value} for value in ("7", None, -3, 1.5, float("nan"), True, 2**70)]
    + [{"unsteady": {"a": value}} for value in ([1, 2], [1, 2, 3, 4], [1, 2.5, True], "abc", None)]
    + [{"unsteady": []}, {"kind": "theirs"}, {"rank": -2}, {"world": 0}, {"seed": 2**63}],
    ids=str,
)
def test_a_damaged_tag_is_refused_by_key_and_value(change: dict[str, Any]) -> None:
    with pytest.raises(StateMismatchError, match="the file is damaged: its tag has") as caught:
        read_tag(TAG | change, "the file")
    assert next(iter(change)) in str(caught.value)


@pytest.mark.parametrize("key", ["kind", "rank", "world", "step", "seed"])
def test_a_tag_without_a_field_is_refused(key: str) -> None:
    with pytest.raises(StateMismatchError, match=f"its tag has no {key}"):
        read_tag({k: v for k, v in TAG.items() if k != key}, "the file")


@pytest.mark.parametrize("entries", [None, "null", [], 3])
def test_what_is_no_tag_is_refused(entries: Any) -> None:
    with pytest.raises(StateMismatchError, match="the file is damaged: its tag is"):
        read_tag(entries, "the file")


@pytest.mark.parametrize("layout", [0, 2, "1", None])
def test_another_format_is_refused(layout: Any) -> None:
    with pytest.raises(StateMismatchError, match=f"has format {layout}, this version reads 1"):
        read_tag(TAG | {"format": layout}, "the file")


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
