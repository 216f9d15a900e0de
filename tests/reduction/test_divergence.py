"""Ranks that should hold the same bits and do not: noticed within K steps, told on all
ranks, mended if asked for.
"""

from __future__ import annotations

import copy
import logging
import random
from typing import Any

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from lowrank_comm import (
    CompressedOptimizer,
    ConfigError,
    ConfigMismatchError,
    DivergenceError,
    GaLore,
    PowerSGD,
    PowerSGDPlus,
)
from lowrank_comm.config import Section
from tests.support.bit_flips import caught, flip
from tests.support.conformance import AROUND, SETTINGS
from tests.support.engines import Setup
from tests.support.gloo import GlooPool
from tests.support.networks import BASES, compressed, loss_of, network

TRIALS = 4

# engine -> (ranks, how it is set up, what has replicas)
ENGINES: dict[str, tuple[int, dict[str, Any], tuple[str, ...]]] = {
    "plain": (2, {"engine": "plain"}, ("parameters", "bases")),
    "two levels": (4, {"engine": "plain", "nodes": 2}, ("parameters", "bases")),
    # for which GaLore is not made
    "matrix": (
        4,
        {"engine": "plain", "nodes": 2, "scope": "matrix", "compressor": PowerSGD(2)},
        ("parameters",),
    ),
    "ddp": (2, {"engine": "ddp"}, ("parameters", "bases")),
    "hsdp": (4, {"engine": "hsdp", "nodes": 2}, ("parameters", "bases")),
    "flat": (2, {"engine": "flat"}, ("bases",)),
}


@pytest.mark.parametrize(
    ("engine", "what"), [(engine, what) for engine in ENGINES for what in ENGINES[engine][2]]
)
def test_every_flipped_bit_is_caught_within_k_steps(gloo: GlooPool, engine: str, what: str) -> None:
    """With GaLore, whose bases stay from step to step; those that are formed anew are
    compared as they are then.
    """
    world, how, _ = ENGINES[engine]
    common = {"compressor": GaLore(2, restart_every=100), "options": {"check_every": 4}}
    setup = Setup(**common | {"adam": True} | how)
    results = gloo.run(caught, world, setup, what, world, range(TRIALS), timeout=120.0)
    for of_trial in zip(*results, strict=True):
        assert len(set(of_trial)) == 1, "all ranks tell the same"
        after, told = of_trial[0]
        assert 0 <= after < 4, told
        assert "CULPRIT" in told
        assert ("the parameter " if what == "parameters" else "the state ") in told


def test_bases_that_are_formed_anew_are_compared_as_they_are(gloo: GlooPool) -> None:
    setup = Setup("ddp", PowerSGD(2), options={"check_every": 1})
    for results in gloo.run(caught, 2, setup, "bases", 2, range(TRIALS)):
        assert [after for after, _ in results] == [0] * TRIALS


def undisturbed(rank: int, section: dict[str, Any]) -> tuple[int, bool]:
    """Steps of a run that compares before each, and whether it is the run without."""
    ends = []
    for check_every in (1, None):
        model = network()
        optimizer = CompressedOptimizer.from_config(
            BASES["Adam"](model.named_parameters()),
            {"min_compression_rate": 0, "rank": 2, "check_every": check_every, **section},
        )
        for t in range(7):
            optimizer.zero_grad()
            if (t + rank) % 3:
                loss_of(model, t, rank).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().view(-1) for p in model.parameters()]))
    return optimizer.reducer.step, torch.equal(*ends)


SECTIONS = [
    {"compressor": name, **settings} for name, those in SETTINGS.items() for settings in those
] + [{"compressor": name, **around} for name in ("powersgd", "atomo") for around in AROUND]


def possible(section: dict[str, Any]) -> bool:
    try:
        Section.parse(section)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("section", [*filter(possible, SECTIONS)], ids=str)
def test_what_should_be_equal_is_equal_and_a_comparison_changes_nothing(
    gloo: GlooPool, section: dict[str, Any]
) -> None:
    assert gloo.run(undisturbed, 2, section) == [(7, True)] * 2


def mended(rank: int, world: int, what: str, reduce_at: str) -> dict[str, Any]:
    """A flip on the last rank before call 3 of 6; calls 3 and 6 compare."""
    model = network()
    optimizer = compressed(
        model,
        BASES["AdamW"],
        GaLore(2, restart_every=50),
        check_every=3,
        on_divergence="resync",
        reduce_at=reduce_at,
    )
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lowrank_comm").addHandler(handler)
    error, before = "", None
    try:
        for call in range(1, 7):
            optimizer.zero_grad()
            if call == 3:
                before = copy.deepcopy(model.state_dict())
                if rank == world - 1:
                    weight = model[0].weight.detach()
                    moment = optimizer.base.state[model[0].weight]["exp_avg"]
                    basis = next(iter(optimizer.reducer.state.batches[0].state.values()))
                    for tensor in [weight, moment] if what == "parameters" else [basis]:
                        flip(tensor, random.Random(call))
            loss_of(model, call, rank).backward()
            optimizer.step()
            if call == 3:
                before = None
    except DivergenceError as raised:
        error = str(raised)
    finally:
        logging.getLogger("lowrank_comm").removeHandler(handler)
    numbers = [*model.state_dict().values()]
    numbers += [v for p in model.parameters() for v in optimizer.base.state[p].values()]
    stood_still = before is not None and all(
        torch.equal(before[name], value) or rank == world - 1
        for name, value in model.state_dict().items()
    )
    return {
        "error": error,
        "lines": lines,
        "numbers": torch.cat([v.double().view(-1) for v in numbers]).tolist(),
        "stood still": stood_still,
        "step": optimizer.reducer.step,
    }


@pytest.mark.parametrize("reduce_at", ["step", "backward"])
@pytest.mark.parametrize("what", ["parameters", "bases"])
def test_resync_copies_from_the_majority(gloo: GlooPool, what: str, reduce_at: str) -> None:
    results = gloo.run(mended, 3, 3, what, reduce_at)
    for one in results:
        assert one["error"] == ""
        assert one["step"] == 6
        assert one["numbers"] == results[0]["numbers"]
    kind = "parameters" if what == "parameters" else "state"
    (line,) = results[0]["lines"]
    assert "on rank 2 (not on 0, 1)" in line
    assert f"{kind} of rank 0 go to the others" in line
    assert results[1]["lines"] == results[2]["lines"] == []


@pytest.mark.parametrize("reduce_at", ["step", "backward"])
def test_without_a_majority_all_ranks_raise_and_nothing_has_moved(
    gloo: GlooPool, reduce_at: str
) -> None:
    for one in gloo.run(mended, 2, 2, "parameters", reduce_at):
        assert "the parameter 0.weight on rank 0 against on rank 1" in one["error"]
        assert "No majority agrees" in one["error"]
        assert one["stood still"]
        assert one["step"] == 2


def learning_rates(rank: int) -> str:
    """Rank 1 changes its own in mid-run."""
    model = network()
    optimizer = compressed(model, check_every=5, on_divergence="resync")
    for call in range(10):
        if call == 2:
            optimizer.param_groups[0]["lr"] = 0.01 * (rank + 1)
        optimizer.zero_grad()
        loss_of(model, call, rank).backward()
        try:
            optimizer.step()
        except DivergenceError as error:
            return f"{call} {error}"
    return "not noticed"


def test_unlike_learning_rates_are_named_and_not_mended(gloo: GlooPool) -> None:
    for text in gloo.run(learning_rates, 3):
        assert text.startswith("4 ")
        assert "param_groups[0].lr: 0.01 on rank 0, 0.02 on rank 1" in text


def vetoed(rank: int) -> list[int]:
    """Calls of step() in which a flip of call 2 is noticed, with vetoes in between, and
    again when the step is tried again.
    """
    model = network()
    optimizer = compressed(model, check_every=3, compressor=PowerSGDPlus(2))
    noticed = []
    for call in range(1, 6):
        optimizer.zero_grad()
        if call == 2 and rank:
            flip(model[2].bias.detach(), random.Random(0))
        (loss_of(model, call, rank) * (torch.inf if call < 3 else 1.0)).backward()
        try:
            optimizer.step()
        except DivergenceError:
            noticed.append(call)
    return noticed


def test_vetoed_steps_count_and_a_step_that_is_tried_again_fails_again(gloo: GlooPool) -> None:
    assert gloo.run(vetoed, 2) == [[3, 4, 5]] * 2


def past_the_wrapper(rank: int, skips: bool) -> list[int]:
    """The same where the loop holds the base alone, steps it, and skips the vetoed
    steps by itself or lets the base step on zeros.
    """
    model = network()
    optimizer = compressed(
        model, check_every=3, compressor=PowerSGDPlus(2), reduce_at="backward", max_vetoes=None
    )
    base, noticed = optimizer.base, []
    for call in range(1, 9):
        base.zero_grad()
        if call == 5 and rank:
            flip(model[2].bias.detach(), random.Random(0))
        try:
            (loss_of(model, call, rank) * (torch.inf if call in (2, 4) else 1.0)).backward()
        except DivergenceError:
            noticed.append(call)
            continue
        if any(not torch.isfinite(p.grad).all() for p in model.parameters()):
            if skips:
                continue
            for p in model.parameters():
                p.grad.zero_()
        base.step()
    return noticed


@pytest.mark.parametrize("skips", [True, False])
def test_steps_of_a_loop_that_holds_the_base_alone_count(gloo: GlooPool, skips: bool) -> None:
    assert gloo.run(past_the_wrapper, 2, skips) == [[6, 7, 8]] * 2


def ignored_by_ddp(rank: int, on_divergence: str) -> tuple[str, bool]:
    """A flip before call 3, where DDP leaves a bias to each rank; what was told, and
    whether that bias differs at the end.
    """
    model = network()
    ignored = model[2].bias
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["2.bias"])
    ddp = DistributedDataParallel(model)
    optimizer = compressed(
        model, BASES["AdamW"], check_every=2, on_divergence=on_divergence, compressor=PowerSGD(2)
    )
    optimizer.attach(ddp)
    told = ""
    try:
        for call in range(1, 6):
            optimizer.zero_grad()
            if call == 4 and rank == 2:
                flip(model[2].weight.detach(), random.Random(0))
            loss_of(ddp, call, rank).backward()
            optimizer.step()
    except DivergenceError as error:
        told = f"{call} {error}"
    of_all = [torch.empty_like(ignored) for _ in range(3)]
    torch.distributed.all_gather(of_all, ignored.detach())
    return told, not torch.equal(of_all[0], of_all[2])


def test_parameters_that_ddp_ignores_are_neither_compared_nor_copied(gloo: GlooPool) -> None:
    for told, differs in gloo.run(ignored_by_ddp, 3, "error"):
        assert told.startswith("4 ")
        assert "weight" in told
        assert "bias" not in told
        assert differs
    assert gloo.run(ignored_by_ddp, 3, "resync") == [("", True)] * 3


def overlapping(rank: int) -> tuple[list[float], list[float]]:
    """A rank lacks the gradient of a layer: ranks begin unlike buckets early."""
    ends = []
    for check_every in (None, 2):
        model = network()
        optimizer = compressed(
            model,
            reduce_at="backward",
            overlap=True,
            bucket_cap_mb=0.0005,
            check_every=check_every,
        )
        for t in range(9):
            optimizer.zero_grad()
            hidden = model[1](model[0](torch.ones(2, 10, dtype=torch.float64)))
            out = hidden if (t + rank) % 2 else model[2](hidden)
            (out.sum() * (1 + t + rank)).backward()
            optimizer.step()
        ends.append(torch.cat([p.detach().view(-1) for p in model.parameters()]).tolist())
    return ends[0], ends[1]


def test_a_comparison_with_overlap_changes_nothing(gloo: GlooPool) -> None:
    for without, with_check in gloo.run(overlapping, 2):
        assert with_check == without


def other_values(rank: int) -> str:
    model = network()
    optimizer = compressed(model, check_every=2 + rank)
    loss_of(model, 0, rank).backward()
    try:
        optimizer.step()
    except ConfigMismatchError as error:
        return str(error)
    return "no error"


def test_the_options_are_checked_and_compared(gloo: GlooPool) -> None:
    for text in gloo.run(other_values, 2):
        assert "check_every: 2 on rank 0, 3 on rank 1" in text
    with pytest.raises(ConfigError, match="check_every=0 is not possible"):
        compressed(network(), check_every=0)
    with pytest.raises(ConfigError, match="on_divergence='mend' is unknown"):
        compressed(network(), on_divergence="mend")
    base = torch.optim.SGD(network().named_parameters(), lr=0.1)
    with pytest.raises(ConfigError, match=r"lowrank_comm\.on_divergence='mend'"):
        CompressedOptimizer.from_config(base, {"on_divergence": "mend"})
    made = CompressedOptimizer.from_config(base, {"check_every": 7, "on_divergence": "resync"})
    assert made._settings(False)["check_every"] == 7
