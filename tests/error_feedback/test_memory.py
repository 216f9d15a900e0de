"""The error memory: nothing is lost, it stays bounded, and views of it stay live."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

from lowrank_comm import CompressedOptimizer, PowerSGD
from lowrank_comm.checkpointing.tag import tag_of
from lowrank_comm.checkpointing.tensors import restore, tensors_of
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.errors import StateMismatchError
from tests.support.feedback_runs import optimizer_of, steps


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


@pytest.mark.parametrize("form", ["none", "ef21"])
def test_errors_are_not_lost_without_a_word(form: str) -> None:
    """A state with errors does not go into a run without an error memory; the other way
    round they start from zero, whatever the run held before.
    """
    old = optimizer_of(PowerSGD(rank=2))
    new = optimizer_of(PowerSGD(rank=2), error_feedback=ErrorFeedback(form=form))
    steps(old, 0, 3)
    steps(new, 0, 5)
    with pytest.raises(StateMismatchError, match=r"'w' has a saved error memory.*error_feedback"):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert new.reducer.step == 5
    assert float(old.error_memory()["w"].norm()) > 0
    restore(
        old.reducer, tag_of(new.reducer), {"w": {"Q": tensors_of(new.reducer)["w"]["Q"].clone()}}
    )
    assert torch.equal(old.reducer.state.bases()["w"]["Q"], new.reducer.state.bases()["w"]["Q"])
    assert float(old.error_memory()["w"].norm()) == 0
