"""Runs under every engine that do not go smoothly: overflows, NaN on one rank,
exhausted data, interruptions, wrong use.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lowrank_comm import Atomo, ErrorFeedback, PowerSGDPlus
from lowrank_comm.compressors.base import Compressor
from tests.support import engine_cases as cases
from tests.support import gradient_cases
from tests.support.engines import (
    ENGINES,
    FULL,
    RANK_2,
    RESTARTS,
    WORLD,
    Setup,
    by_turns,
    every_engine,
    simulated,
    worst,
)
from tests.support.gloo import CaseFailed, GlooPool


@by_turns("unscale", {"": False, "unscaled and clipped by the caller": True}, 2)
@pytest.mark.shows("fp16 + scaler")
def test_an_overflow_on_one_rank_skips_the_step_on_all(
    gloo: GlooPool, engine: Setup, unscale: bool
) -> None:
    setup = replace(engine, compressor=RESTARTS, steps=5)
    results = gloo.run(cases.overflow, WORLD, setup, 3, unscale)
    for one in results:
        assert one["scales"] == [8.0, 8.0, 4.0, 4.0, 4.0]
        assert one["equal"] is True
        assert worst(one["parameters"], results[0]["parameters"]) == 0.0
    expected = gloo.run(
        cases.without_scaler, WORLD, replace(setup, clip=1.0 if unscale else None), 2
    )
    # The scale is a power of two, so the numbers are those of the run without it and
    # without that step.
    assert worst(results[0]["parameters"], expected[0]) < 1e-6


@every_engine
@pytest.mark.shows("NaN on one rank")
@pytest.mark.parametrize("culprit", [0, 3])
def test_nan_on_one_rank_changes_nothing_on_any(
    gloo: GlooPool, engine: Setup, culprit: int
) -> None:
    for found in gloo.run(cases.not_finite, WORLD, replace(engine, compressor=RANK_2), culprit):
        assert found == [False, True, False]


@by_turns("way", {"file": "file", "dcp": "dcp"}, 2)
@pytest.mark.shows("checkpoint")
def test_an_interrupted_run_goes_on(
    gloo: GlooPool, engine: Setup, way: str, tmp_path: Path
) -> None:
    setup = replace(engine, compressor=PowerSGDPlus(2, restart_every=5), adam=True)
    for expected, resumed in gloo.run(cases.interrupted, WORLD, setup, 7, 6, way, str(tmp_path)):
        assert worst(expected, resumed) < 1e-5


@every_engine
def test_everything_is_kept_by_one_call(gloo: GlooPool, engine: Setup, tmp_path: Path) -> None:
    setup = replace(engine, compressor=PowerSGDPlus(2, restart_every=5), adam=True)
    for expected, resumed in gloo.run(cases.kept_whole, WORLD, setup, 7, 6, str(tmp_path)):
        assert worst(expected, resumed) < 1e-5


@by_turns("how", {how: how for how in ("wrapped afterwards", "unnamed", "renamed")}, 3)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_state_dict_goes_on_however_it_is_loaded(gloo: GlooPool, engine: Setup, how: str) -> None:
    setup = replace(engine, compressor=PowerSGDPlus(2, restart_every=5), adam=True)
    for expected, resumed in gloo.run(cases.loaded_otherwise, WORLD, setup, 7, 6, how):
        assert worst(expected, resumed) < 1e-5


@by_turns("culprit", {"0": 0, "3": 3}, 2)
def test_state_that_is_not_finite_is_saved_by_nobody(
    gloo: GlooPool, engine: Setup, culprit: int, tmp_path: Path
) -> None:
    setup = replace(engine, compressor=RANK_2)
    for said in gloo.run(cases.bad_state, WORLD, setup, culprit, str(tmp_path)):
        assert len(said) == 3
        for words in said:
            assert words.startswith("the error memory of ")
            assert words.endswith(f"holds nan on rank {culprit}")
    assert list(tmp_path.iterdir()) == []


CROSSINGS = {
    "DDP on 4 -> FSDP2 flat on 2": ("DDP", 4, "FSDP2, flat", 2),
    "FSDP2 flat on 2 -> DDP on 4": ("FSDP2, flat", 2, "DDP", 4),
    "plain on 2 -> FSDP2 flat on 4": ("plain model", 2, "FSDP2, flat", 4),
    "DDP on 2 -> HSDP matrix on 4": ("DDP", 2, "FSDP2, HSDP 2-D mesh, matrix", 4),
    "HSDP matrix on 4 -> DDP two levels matrix on 4": (
        "FSDP2, HSDP sub-mesh, matrix",
        4,
        "DDP, two levels, matrix",
        4,
    ),
    "DDP two levels matrix on 4 -> plain on 2": ("DDP, two levels, matrix", 4, "plain model", 2),
    "HSDP shard on 4 -> DDP two levels shard on 4": (
        "FSDP2, HSDP 2-D mesh, shard",
        4,
        "DDP, two levels, shard",
        4,
    ),
}


WAYS_AND_FORMS = [(way, form) for form in ("ef14", "ef21", "ef21_sgdm") for way in ("file", "dcp")]


@pytest.mark.parametrize(
    ("start", "ranks", "end", "other_ranks", "way", "form"),
    [
        pytest.param(*crossing, way, form, id=f"{form}-{way}-{name}")
        for i, (name, crossing) in enumerate(CROSSINGS.items())
        # two of six for each crossing, by turns
        for j, (way, form) in enumerate(WAYS_AND_FORMS)
        if (i + j) % 3 == 0
    ],
)
def test_a_run_goes_on_under_another_engine(
    gloo: GlooPool,
    start: str,
    ranks: int,
    end: str,
    other_ranks: int,
    way: str,
    form: str,
    tmp_path: Path,
) -> None:
    of_blocks = "shard" in start
    if of_blocks and way == "dcp":
        pytest.skip(
            "DTensors of bases of blocks have another name than whole ones; the file crosses"
        )
    if form != "ef14" and "matrix" in start + end:
        pytest.skip("EF21 is refused there")
    compressor = PowerSGDPlus(2, restart_every=100)
    options = {"error_feedback": ErrorFeedback(form=form)}
    first, second = (
        replace(
            ENGINES[name],
            compressor=compressor,
            adam=True,
            options={**ENGINES[name].options, **options},
        )
        for name in (start, end)
    )
    expected = gloo.run(cases.first_part, ranks, first, 6, 5, str(tmp_path))[0]
    for resumed in gloo.run(cases.second_part, other_ranks, second, 6, 5, str(tmp_path), way):
        assert worst(expected, resumed) < 1e-4


OTHER_BLOCKS = {
    "HSDP, 2 blocks -> 4": ("FSDP2, HSDP 2-D mesh, shard", 2, "FSDP2, HSDP 2-D mesh, shard", 1),
    "HSDP, 4 blocks -> DDP, 2": ("FSDP2, HSDP sub-mesh, shard", 1, "DDP, two levels, shard", 2),
    "plain, 2 blocks -> HSDP, 4": (
        "plain model, two levels, shard",
        2,
        "FSDP2, HSDP sub-mesh, shard",
        1,
    ),
    "DDP, whole -> HSDP, 2 blocks": ("DDP", 0, "FSDP2, HSDP 2-D mesh, shard", 2),
    "HSDP, 2 blocks -> plain, whole": ("FSDP2, HSDP 2-D mesh, shard", 2, "plain model", 0),
}
TRACKING = {
    "ef21": (PowerSGDPlus(2, restart_every=3), ErrorFeedback(form="ef21"), ["y"]),
    "ef21_sgdm": (PowerSGDPlus(2, restart_every=3), ErrorFeedback(form="ef21_sgdm"), ["y", "v"]),
    "ef21_sgdm, a y for each": (
        Atomo(2, contractive=True),
        ErrorFeedback(form="ef21_sgdm"),
        ["y", "y_mean", "v"],
    ),
}


@pytest.mark.parametrize(
    ("start", "nodes", "end", "other_nodes"), OTHER_BLOCKS.values(), ids=OTHER_BLOCKS.keys()
)
@pytest.mark.parametrize(("compressor", "form", "symbols"), TRACKING.values(), ids=TRACKING.keys())
def test_what_ef21_keeps_goes_on_in_other_blocks(
    gloo: GlooPool,
    start: str,
    nodes: int,
    end: str,
    other_nodes: int,
    compressor: Compressor,
    form: ErrorFeedback,
    symbols: list[str],
    tmp_path: Path,
) -> None:
    """y and v are of the parameter and not of a block: the run goes on with them as the
    plain definition does. It is saved before a restart, so that bases do not count.
    With four blocks, one rank of the node has no row of the head.
    """
    first, second = (
        replace(
            ENGINES[name],
            nodes=n,
            compressor=compressor,
            steps=11,
            options={**ENGINES[name].options, "error_feedback": form},
        )
        for name, n in ((start, nodes), (end, other_nodes))
    )
    expected = simulated(first, WORLD, second, 6)["parameters"]
    for found in gloo.run(cases.in_other_blocks, WORLD, first, second, 6, 5, str(tmp_path)):
        for resumed in found.values():
            assert worst(resumed, expected) < 1e-4
    for symbol in symbols:
        # the comparison can fail
        assert worst(simulated(first, WORLD, second, 6, symbol)["parameters"], expected) > 1e-2


@pytest.mark.parametrize("nodes", [0, 2], ids=["one level", "two levels"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduce_at": "step"},
        {"overlap": True, "bucket_cap_mb": 0.001},
        {"check_every": 1},
        {"check_every": 2, "overlap": True, "bucket_cap_mb": 0.001},
    ],
    ids=str,
)
def test_exhausted_data_under_ddps_join(gloo: GlooPool, nodes: int, options: dict) -> None:
    if nodes and "overlap" in options:
        pytest.skip("no overlap with two levels")
    setup = Setup("ddp", RANK_2, nodes, steps=5, options=options)
    results = gloo.run(cases.exhausted, WORLD, setup, True)
    assert {one["step"] for one in results} == {5}
    # DDP broadcasts the model of a rank that was there to the end
    for one in results:
        assert worst(one["parameters"], results[0]["parameters"]) == 0.0


def test_overlap_with_a_layer_that_one_rank_alone_uses(gloo: GlooPool) -> None:
    """DDP's own collective during backward and ours keep one order, though a rank
    without a gradient starts buckets late.
    """
    early = gloo.run(cases.used_on_one_rank_only, WORLD, {"overlap": True, "bucket_cap_mb": 0.0005})
    after = gloo.run(cases.used_on_one_rank_only, WORLD, {})
    for one in early:
        assert worst(one, after[0]) < 1e-6


def test_exhausted_data_without_join_is_an_error_and_no_endless_wait(gloo: GlooPool) -> None:
    with pytest.raises(CaseFailed) as caught:
        gloo.run(cases.exhausted, WORLD, Setup("ddp", RANK_2, steps=4), False, timeout=60)
    assert "did not end in time" not in str(caught.value)


@pytest.mark.parametrize(
    "engine",
    [ENGINES["plain model"], ENGINES["DDP"], ENGINES["FSDP2, HSDP 2-D mesh, shard"]],
    ids=["plain model", "DDP", "HSDP"],
)
def test_a_rank_with_one_micro_batch_more(gloo: GlooPool, engine: Setup) -> None:
    # FSDP2 itself reduce-scatters each micro-batch inside the node, so there the whole
    # node takes one more.
    more = (2, 3) if engine.engine == "native" else (1,)
    results = gloo.run(cases.one_micro_batch_more, WORLD, replace(engine, compressor=RANK_2), more)
    for one in results:
        assert worst(one, results[0]) == 0.0


@every_engine
def test_a_second_backward_says_how_to_accumulate(gloo: GlooPool, engine: Setup) -> None:
    setup = replace(engine, compressor=FULL, options={**engine.options, "reduce_at": "backward"})
    words = {
        "plain": "optimizer.no_sync()",
        "ddp": "model.no_sync()",
        "flat": "set_requires_gradient_sync(False)",
    }
    for said in gloo.run(cases.second_backward, WORLD, setup):
        assert words.get(engine.engine, "set_requires_all_reduce(False)") in said


@pytest.mark.parametrize(
    "engine",
    [ENGINES["DDP"], ENGINES["FSDP2, HSDP 2-D mesh, matrix"], ENGINES["FSDP2, flat"]],
    ids=["DDP", "HSDP", "flat"],
)
def test_reduction_in_step_accumulates_whatever_comes(gloo: GlooPool, engine: Setup) -> None:
    """reduce_at="step": no word about accumulation is needed, and nothing is averaged
    before the step.
    """
    from tests.support.engines import train

    setup = replace(
        engine, compressor=RANK_2, micro=2, steps=4, options={"reduce_at": "step"}, says=False
    )
    ours = gloo.run(train, WORLD, setup)
    assert worst(ours[0]["parameters"], simulated(setup, WORLD)["parameters"]) < 1e-4


TWO_LEVELS_OF_WHOLE = [n for n in ENGINES if n.startswith(("plain model, two", "DDP, two"))]


@pytest.mark.parametrize("name", TWO_LEVELS_OF_WHOLE)
def test_a_state_dict_never_holds_what_was_gathered_earlier(
    gloo: GlooPool, name: str, tmp_path: Path
) -> None:
    for gaps in gloo.run(
        cases.stale_gathered_state, WORLD, replace(ENGINES[name], compressor=RANK_2), str(tmp_path)
    ):
        assert gaps == [0.0, 0.0]


@every_engine
@pytest.mark.shows("checkpoint")
def test_an_interrupted_run_goes_on_from_torchs_checkpoints_on_disk(
    gloo: GlooPool, engine: Setup, tmp_path: Path
) -> None:
    setup = replace(engine, compressor=PowerSGDPlus(2, restart_every=5), adam=True)
    for expected, resumed in gloo.run(cases.through_disk, WORLD, setup, 7, 6, str(tmp_path)):
        assert worst(expected, resumed) < 1e-5


@by_turns("way", {way: way for way in ("file", "dcp", "disk")}, 3)
def test_a_restart_that_is_owed_when_a_run_is_interrupted_comes_in_the_one_that_goes_on(
    gloo: GlooPool, engine: Setup, way: str, tmp_path: Path
) -> None:
    """Two layers have no gradient at t = 5, when their restart is due; the run is
    saved, and they have one at t = 6. Of the one with a single row, some ranks hold
    nothing.
    """
    wrap = engine.wrap | ({"find_unused_parameters": True} if engine.engine == "ddp" else {})
    compressor = PowerSGDPlus(2, restart_every=5)
    setup = replace(
        engine, compressor=compressor, adam=True, wrap=wrap, model={"at_times": True}, lr=0.1
    )
    if way == "disk":
        results = gloo.run(cases.through_disk, WORLD, setup, 6, 4, str(tmp_path))
    else:
        results = gloo.run(cases.interrupted, WORLD, setup, 6, 4, way, str(tmp_path))
    for expected, resumed in results:
        assert worst(expected, resumed) < 1e-4


@pytest.mark.parametrize("engine", ["plain", "ddp"])
def test_an_owed_restart_with_overlap_is_what_it_is_without(gloo: GlooPool, engine: str) -> None:
    """Whether somebody has a gradient is asked bucket by bucket, as they begin."""
    wrap = {"find_unused_parameters": True} if engine == "ddp" else {}
    setup = Setup(
        engine,
        PowerSGDPlus(2, restart_every=5),
        steps=9,
        clip=1.0,
        wrap=wrap,
        model={"at_times": True},
    )
    early = replace(setup, options={"overlap": True, "bucket_cap_mb": 0.001})
    after = gloo.run(
        cases.without_scaler, WORLD, replace(setup, options={"reduce_at": "backward"}), -1
    )
    for one in gloo.run(cases.without_scaler, WORLD, early, -1):
        assert worst(one, after[0]) < 1e-6


def test_a_backward_pass_that_failed_leaves_nothing_begun(gloo: GlooPool) -> None:
    setup = Setup("plain", RANK_2, options={"overlap": True, "bucket_cap_mb": 0.0005})
    after = gloo.run(cases.failed_backward, WORLD, setup, True)
    without = gloo.run(cases.failed_backward, WORLD, setup, False)
    for one in after:
        assert worst(one, without[0]) < 1e-6


@pytest.mark.parametrize("reduce_at", ["step", "backward"])
@pytest.mark.parametrize("name", ["DDP", "FSDP2, flat", "FSDP2, HSDP 2-D mesh, shard"])
def test_an_optimizer_that_is_gone_leaves_the_model_to_its_engine(
    gloo: GlooPool, name: str, reduce_at: str
) -> None:
    setup = replace(ENGINES[name], compressor=RANK_2, options={"reduce_at": reduce_at})
    results = gloo.run(cases.gone_without_detach, WORLD, setup)
    assert all(one == results[0] for one in results)
    assert results[0][0] != results[0][1]


def test_passes_over_different_parameters_are_a_second_pass(gloo: GlooPool) -> None:
    for said in gloo.run(
        cases.disjoint_passes, WORLD, replace(ENGINES["plain model"], compressor=RANK_2)
    ):
        assert "a second backward pass came before step()" in said


def test_a_plain_model_that_is_attached_anew_is_averaged_before_clipping(gloo: GlooPool) -> None:
    results = gloo.run(cases.clipped_after_a_second_attach, WORLD)
    assert all(norms == results[0] for norms in results)


@pytest.mark.parametrize("what", ["weights", "clipping"])
def test_ranks_of_a_node_that_differ_are_told(gloo: GlooPool, what: str) -> None:
    for said in gloo.run(cases.differing_within_a_node, WORLD, what):
        assert said.startswith("ConfigMismatchError")


def test_join_with_unused_parameters(gloo: GlooPool) -> None:
    wrap, model = {"find_unused_parameters": True}, {"idle": True}
    for options in ({}, {"reduce_at": "step"}, {"overlap": True}):
        setup = Setup("ddp", RANK_2, steps=5, options=options, wrap=wrap, model=model)
        results = gloo.run(cases.exhausted, WORLD, setup, True)
        assert {one["step"] for one in results} == {5}
        for one in results:
            assert worst(one["parameters"], results[0]["parameters"]) == 0.0


@every_engine
def test_an_unconsolidated_state_fits_its_own_rank_or_none(gloo: GlooPool, engine: Setup) -> None:
    """torch.distributed.checkpoint keeps one node's part of DTensors, so that of HSDP
    is refused everywhere.
    """
    for said in gloo.run(cases.unconsolidated, WORLD, replace(engine, compressor=RANK_2)):
        if engine.engine in ("hsdp", "native"):
            assert "some rank's own" in said
            assert "consolidate_error_memory()" in said
        else:
            assert said == "loaded"


@pytest.mark.parametrize("options", [{}, {"reduce_at": "step"}, {"overlap": True}])
@pytest.mark.parametrize("differ", [False, True], ids=["alike", "of each rank's own"])
@pytest.mark.parametrize("held", [True, False], ids=["held", "not held"])
def test_what_ddp_was_told_to_ignore_stays_local(
    gloo: GlooPool, held: bool, differ: bool, options: dict
) -> None:
    ours = gloo.run(gradient_cases.ignored, WORLD, True, held, differ, options)
    own = gloo.run(gradient_cases.ignored, WORLD, False, held, differ, {})
    for (ends, line), (theirs, _) in zip(ours, own, strict=True):
        assert worst(ends, theirs) < 1e-5
        assert line.strip() == (
            "1 parameters that DDP was told to ignore keep each rank's own gradients"
        )
    apart = worst(
        {"head.weight": ours[0][0]["head.weight"]}, {"head.weight": ours[1][0]["head.weight"]}
    )
    assert (apart > 1e-4) is (held or differ)


def test_what_would_average_past_us_in_ddp_is_refused_by_name(gloo: GlooPool) -> None:
    for clipping, reducer in gloo.run(gradient_cases.refused, WORLD):
        assert clipping.startswith("ConfigError: max_grad_norm=1.0")
        assert "told to ignore" in clipping
        assert reducer.startswith("UnsupportedError: ")
        assert 'optimize_ddp="python_reducer"' in reducer


HOOKED = {
    **ENGINES,
    "plain model, in step": Setup("plain"),
    "plain model, overlap": Setup("plain", options={"overlap": True}),
    "DDP, overlap": Setup("ddp", options={"overlap": True}),
    "DDP, static graph": Setup("ddp", wrap={"static_graph": True}),
    "DDP, views of buckets": Setup("ddp", wrap={"gradient_as_bucket_view": True}),
    "DDP, views of buckets, overlap": Setup(
        "ddp", wrap={"gradient_as_bucket_view": True}, options={"overlap": True}
    ),
    "DDP, unused parameters": Setup(
        "ddp", wrap={"find_unused_parameters": True}, model={"idle": True}
    ),
    "FSDP2, flat, in step": Setup("flat", options={"reduce_at": "step"}),
}


@by_turns("attach_first", {"attached before": True, "attached after": False}, 2, HOOKED)
def test_users_hooks_run_as_often_as_without_and_before_a_gradient_is_read(
    gloo: GlooPool, engine: Setup, attach_first: bool
) -> None:
    ours = gloo.run(gradient_cases.hooked, WORLD, engine, True, attach_first)
    own = gloo.run(gradient_cases.hooked, WORLD, engine, False, attach_first)
    for found, theirs in zip(ours, own, strict=True):
        assert found["calls"] == theirs["calls"]
        assert found["calls"]["post-accumulate"] == 2 * found["calls"]["module"] == 8
        assert found["moved"] == theirs["moved"] == 0.0
        assert worst(found["ends"], ours[0]["ends"]) == 0.0
    # elsewhere the engine averages over a part of the ranks, or over none
    if engine.engine in ("ddp", "flat", "native"):
        assert worst(ours[0]["ends"], own[0]["ends"]) < 1e-5
