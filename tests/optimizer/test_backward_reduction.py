"""Reduction at the end of the backward pass."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_comm import ConfigError, LowRankCommError, PowerSGD, PowerSGDPlus, UnsupportedError
from tests.support.gloo import GlooPool
from tests.support.networks import batch, compressed, distance, loss_of, network


def at_backward(rank: int, poisoned: int | None) -> dict[str, Any]:
    """reduce_at="backward" against reduce_at="step"; `poisoned`: the rank whose
    gradient overflows at step 2.
    """
    one, other = network(), network()
    early, late = compressed(one, reduce_at="backward"), compressed(other)
    report: dict[str, Any] = {"inside_step": 0}
    for t in range(5):
        factor = torch.inf if t == 2 and rank == poisoned else 1.0
        for model, optimizer in ((one, early), (other, late)):
            optimizer.zero_grad()
            (loss_of(model, t, rank) * factor).backward()
        if t == 2:
            report["nan"] = [bool(p.grad.isnan().all()) for p in one.parameters()]
        count = early.ledger.collectives
        early.step()
        report["inside_step"] += early.ledger.collectives - count
        late.step()
    report["distance"] = distance(one, other)
    report["moved"] = distance(one, network())
    return report


def test_reduction_at_backward_refuses_a_second_pass_onto_averaged_gradients() -> None:
    model = network()
    optimizer = compressed(model, reduce_at="backward")
    loss_of(model, 0).backward()
    with pytest.raises(LowRankCommError, match=r'reduce_at="step"'):
        loss_of(model, 1).backward()
    optimizer.zero_grad()
    # and goes on
    loss_of(model, 1).backward()
    optimizer.step()
    assert optimizer.ledger.steps == 2


def test_reduction_at_backward_after_a_pass_that_failed() -> None:
    """A backward pass that ends by an exception has no end; the next one must not be
    taken for it.
    """

    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(context: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(context: Any, gradient: Tensor) -> Tensor:
            raise ArithmeticError("in the middle of backward")

    one, other = network(), network()
    early, late = compressed(one, reduce_at="backward"), compressed(other)
    x, y = batch(0, 0)
    with pytest.raises(ArithmeticError):
        ((one[2](Fails.apply(one[1](one[0](x)))) - y) ** 2).mean().backward()
    # it got that far
    assert one[2].weight.grad is not None
    assert early.ledger.steps == 0
    for model, optimizer in ((one, early), (other, late)):
        optimizer.zero_grad()
        loss_of(model, 0).backward()
        optimizer.step()
    assert early.ledger.steps == 1
    assert distance(one, other) == 0.0


class Checkpointed(nn.Module):
    """Three layers whose activations are computed again in backward."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


def test_reduction_at_backward_and_activation_checkpointing() -> None:
    """Reentrant checkpointing has backward passes within the pass, and their ends must
    not be taken for its end.
    """
    x = torch.ones(2, 6, requires_grad=True)
    plain = Checkpointed(reentrant=False)
    optimizer = compressed(plain, reduce_at="backward")
    plain(x).sum().backward()
    optimizer.step()
    assert optimizer.ledger.steps == 1
    reentrant = Checkpointed(reentrant=True)
    refusing = compressed(reentrant, reduce_at="backward")
    with pytest.raises(UnsupportedError, match="use_reentrant=False"):
        reentrant(x).sum().backward()
    assert refusing.ledger.steps == 0
    refusing.detach()
    refusing.zero_grad()
    reentrant(x).sum().backward()
    # at the end of backward no more, but here
    refusing.step()
    assert refusing.ledger.steps == 1


def test_two_optimizers_that_reduce_at_backward_cannot_hold_the_same_parameters() -> None:
    """The first one stays on them as long as somebody holds its base, since a reduction
    that is lost would be worse.
    """
    model = network()
    first = compressed(model, reduce_at="backward")
    ledger, base = first.ledger, first.base
    del first
    gc.collect()
    loss_of(model, 0).backward()
    # whoever holds the base alone, as an engine does, steps on averaged gradients
    base.step()
    assert ledger.steps == 1
    with pytest.raises(ConfigError, match=r"detach\(\)"):
        compressed(model, reduce_at="backward")
    base.zero_grad()
    del base
    gc.collect()
    second = compressed(model, reduce_at="backward")
    loss_of(model, 1).backward()
    second.step()
    assert ledger.steps == second.ledger.steps == 1


@pytest.mark.parametrize("reduce_at", ["step", "backward"])
def test_an_optimizer_that_nobody_holds_is_gone_and_so_are_its_parameters(reduce_at: str) -> None:
    """Autograd holds hooks where the garbage collector does not look: what a hook held
    would never go.
    """
    model = network()
    optimizer = compressed(model, reduce_at=reduce_at)
    loss_of(model, 0).backward()
    optimizer.step()
    held = [weakref.ref(optimizer), weakref.ref(optimizer.base), weakref.ref(optimizer.reducer)]
    parameters = [weakref.ref(p) for p in model.parameters()]
    hooks = next(model.parameters())._post_accumulate_grad_hooks
    assert len(hooks) == 1
    del optimizer
    gc.collect()
    assert [ref() for ref in held] == [None] * 3
    assert len(hooks) == 0
    del model, hooks
    gc.collect()
    assert {ref() for ref in parameters} == {None}


@pytest.mark.parametrize("poisoned", [None, 1])
def test_reduction_at_the_end_of_backward(gloo: GlooPool, poisoned: int | None) -> None:
    """step() is left without collectives; a veto leaves NaN in p.grad on every rank, so
    that whoever looks at it skips.
    """
    for report in gloo.run(at_backward, 2, poisoned):
        assert report["inside_step"] == 0
        assert report["distance"] < 1e-12
        assert report["moved"] > 1e-3
        assert set(report["nan"]) == {poisoned is not None}


# --- averaged gradients become true in step() ---
def state_of(optimizer: Any) -> dict[str, Tensor]:
    """Error memory and bases, and the step, as they are now."""
    state = optimizer.reducer.state
    bases = {f"{n} {s}": q for n, held in state.bases().items() for s, q in held.items()}
    errors = {name: error.clone() for name, error in optimizer.error_memory().items()}
    return errors | bases | {"t": torch.tensor(optimizer.reducer.step)}


def alike(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def averaged(optimizer: Any, model: nn.Module, step: int) -> None:
    """A backward pass, whose gradients are averaged when this returns."""
    loss_of(model, step).backward()
    optimizer.reduce_gradients()


@pytest.mark.parametrize("options", [{}, {"reduce_at": "backward"}, {"overlap": True}])
def test_error_memory_bases_and_step_go_on_when_the_base_steps(options: dict[str, Any]) -> None:
    model = network()
    optimizer = compressed(model, **options)
    for t in range(3):
        before = state_of(optimizer)
        averaged(optimizer, model, t)
        assert alike(state_of(optimizer), before)
        # some engines hold the base alone
        (optimizer.base if t == 1 else optimizer).step()
        assert optimizer.reducer.step == t + 1
        assert not alike(state_of(optimizer), before)
        model.zero_grad()


@pytest.mark.parametrize("options", [{}, {"reduce_at": "backward"}, {"overlap": True}])
def test_a_gradient_that_alone_is_given_up_is_as_if_no_worker_had_had_it(
    options: dict[str, Any],
) -> None:
    one, other = network(), network()
    early, late = compressed(one, **options), compressed(other)
    for t in range(4):
        averaged(early, one, t)
        loss_of(other, t).backward()
        if t == 2:
            one[0].weight.grad = other[0].weight.grad = None
        for model, optimizer in ((one, early), (other, late)):
            optimizer.step()
            model.zero_grad()
    assert distance(one, other) == 0.0
    assert alike(state_of(early), state_of(late))


@pytest.mark.parametrize("options", [{}, {"reduce_at": "backward"}])
def test_a_gradient_that_the_caller_replaces_is_in_use(options: dict[str, Any]) -> None:
    """Clipping by value into a new tensor is no giving up."""
    one, other = network(), network()
    early, late = compressed(one, **options), compressed(other)
    for t in range(3):
        for model, optimizer in ((one, early), (other, late)):
            averaged(optimizer, model, t)
            for p in model.parameters():
                half = p.grad / 2
                if model is one:
                    p.grad = half
                else:
                    p.grad.copy_(half)
            optimizer.step()
            model.zero_grad()
    assert distance(one, other) == 0.0
    assert alike(state_of(early), state_of(late))


@pytest.mark.parametrize("options", [{}, {"reduce_at": "backward"}])
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_that_are_zeroed_in_place_are_given_up(
    options: dict[str, Any], bias: bool
) -> None:
    """Also where the optimizer has one parameter, and no other can tell."""
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def train(spike: bool) -> tuple[nn.Module, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = nn.Linear(6, 6, bias=bias).double()
        optimizer = compressed(model, compressor=PowerSGD(1), **options)
        for t in range(4):
            if spike and t == 2:
                for _ in range(2):
                    (100 * model(x)).square().mean().backward()
                    optimizer.reduce_gradients()
                    model.zero_grad(set_to_none=False)
            (model(x) - x).square().mean().backward()
            optimizer.step()
            model.zero_grad(set_to_none=False)
        return model, state_of(optimizer)

    (one, ours), (other, theirs) = train(False), train(True)
    assert distance(one, other) == 0.0
    assert alike(ours, theirs)


def dropped_on_one_side(rank: int) -> tuple[int, float]:
    """Rank 1 has no further batch after averaged gradients were dropped."""
    model = network()
    optimizer = compressed(model)
    averaged(optimizer, model, 0)
    model.zero_grad()
    if rank == 0:
        loss_of(model, 1).backward()
    optimizer.step()
    return optimizer.reducer.step, distance(model, network())


def test_a_worker_without_a_new_batch_takes_part_in_the_step(gloo: GlooPool) -> None:
    (one, moved), (other, _) = gloo.run(dropped_on_one_side, 2)
    assert one == other == 1
    assert moved > 0


def test_gradients_that_are_added_to_averaged_ones_keep_those() -> None:
    """In step mode a second pass after reduce_gradients() averages the sum; the first
    one's error memory is that of the sum's first part.
    """
    one, other = network(), network()
    ours, twin = compressed(one), compressed(other)
    averaged(ours, one, 0)
    averaged(twin, other, 0)
    twin.reducer.commit()
    first = state_of(twin)
    averaged(ours, one, 1)
    assert alike(state_of(ours), first)
    ours.step()
    assert ours.reducer.step == 2


def test_what_happens_between_the_average_and_the_step() -> None:
    """A state dict holds the state before the pass; a parameter that is unfrozen takes
    part from the next pass on; loading forgets the pass.
    """
    one, other = network(), network()
    ours, twin = compressed(one, reduce_at="backward"), compressed(other, reduce_at="backward")
    for model in (one, other):
        model[2].bias.requires_grad_(False)
    for t in range(3):
        for model, optimizer in ((one, ours), (other, twin)):
            loss_of(model, t).backward()
            if optimizer is ours and t == 1:
                optimizer.consolidate_error_memory()
                saved = optimizer.state_dict()
                one[2].bias.requires_grad_(True)
                # asks for the reducer
                assert "2.bias" not in {row.name for row in optimizer.plan.rows}
            optimizer.step()
            optimizer.zero_grad()
            if t == 1 and optimizer is twin:
                other[2].bias.requires_grad_(True)
    assert distance(one, other) == 0.0
    assert alike(state_of(ours), state_of(twin))
    third = network()
    third[2].bias.requires_grad_(False)
    fresh = compressed(third, reduce_at="backward")
    loss_of(third, 5).backward()
    fresh.load_state_dict(saved)
    assert fresh.reducer.step == 1
    third.zero_grad()
    loss_of(third, 1).backward()
    fresh.step()
    assert fresh.reducer.step == 2


def test_two_models_whose_backward_passes_cross() -> None:
    """The generator's loss gives the discriminator gradients, which are dropped."""

    def train(reduce_at: str) -> tuple[nn.Module, nn.Module, list[dict[str, Tensor]]]:
        torch.manual_seed(0)
        made, judge = nn.Linear(6, 6).double(), nn.Linear(6, 4).double()
        of_made, of_judge = (
            compressed(model, compressor=PowerSGDPlus(1, 2), reduce_at=reduce_at)
            for model in (made, judge)
        )
        for _ in range(4):
            x = torch.randn(5, 6, dtype=torch.float64)
            of_judge.zero_grad()
            (judge(x) - judge(made(x).detach())).square().mean().backward()
            of_judge.step()
            of_made.zero_grad()
            judge(made(x)).square().mean().backward()
            of_made.step()
        return made, judge, [state_of(of_made), state_of(of_judge)]

    (made, judge, early), (other_made, other_judge, late) = train("backward"), train("step")
    assert distance(made, other_made) == distance(judge, other_judge) == 0.0
    assert alike(early[0], late[0]) and alike(early[1], late[1])


@pytest.mark.parametrize("options", [{}, {"reduce_at": "backward"}, {"overlap": True}])
def test_compiled_autograd_is_refused_by_name(options: dict[str, Any]) -> None:
    compiled = pytest.importorskip("torch._dynamo.compiled_autograd")
    model = network()
    optimizer = compressed(model, **options)
    with (
        compiled._enable(torch.compile(backend="eager")),
        pytest.raises(UnsupportedError, match=r"compiled autograd .* is not supported"),
    ):
        loss_of(model, 0).backward()
    assert optimizer.reducer.step == 0
