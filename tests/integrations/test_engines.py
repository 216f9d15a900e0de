"""Every engine against its own uncompressed training, and against the single-process
simulation of the same workers.

Each engine is a row of the engine matrix in docs/engines.md, each `shows` marker a
column; see engine_matrix.py. All run in four real gloo processes, two nodes of two
ranks where there are two levels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lowrank_comm import (
    Acp,
    Atomo,
    CompressedOptimizer,
    ErrorFeedback,
    GaLore,
    GoLore,
    GreedyLore,
    LowRankCommError,
    PowerSGD,
    PowerSGDPlus,
    Quantization,
    RandomProjection,
)
from lowrank_comm.numerics.device import accelerator_path
from tests.support.engines import (
    ENGINES,
    FULL,
    RANK_2,
    RESTARTS,
    WORLD,
    Setup,
    every_engine,
    loss_of,
    plain_names,
    simulated,
    train,
    worst,
    wrapped,
)
from tests.support.gloo import GlooPool


def alike(results: list[dict]) -> None:
    """All ranks hold the same gathered parameters, bit for bit."""
    for other in results[1:]:
        assert worst(results[0]["parameters"], other["parameters"]) == 0.0


@every_engine
@pytest.mark.shows("full rank")
def test_full_rank_is_the_engines_own_training(gloo: GlooPool, engine: Setup) -> None:
    setup = replace(engine, compressor=FULL, steps=8)
    ours = gloo.run(train, WORLD, setup)
    alike(ours)
    if engine.engine in ("ddp", "flat", "native"):
        own = gloo.run(train, WORLD, replace(setup, compressor=None, options={}))
        parameters, losses = own[0]["parameters"], [one["losses"] for one in own]
    else:
        # has no averaging over all ranks of its own
        exact = simulated(replace(setup, compressor=None), WORLD)
        parameters, losses = exact["parameters"], exact["losses"]
    assert worst(ours[0]["parameters"], parameters) < 1e-5
    for one, theirs in zip(ours, losses, strict=True):
        assert one["losses"] == pytest.approx(theirs, abs=1e-5)


@every_engine
@pytest.mark.shows("rank r = simulation")
def test_low_rank_is_the_simulation(gloo: GlooPool, engine: Setup) -> None:
    setup = replace(engine, compressor=RESTARTS, steps=20)
    ours = gloo.run(train, WORLD, setup)
    alike(ours)
    expected = simulated(setup, WORLD)
    assert worst(ours[0]["parameters"], expected["parameters"]) < 1e-4
    for one, losses in zip(ours, expected["losses"], strict=True):
        assert one["losses"] == pytest.approx(losses, abs=1e-4)
    without = simulated(replace(setup, compressor=None), WORLD)
    # the comparison can fail
    assert worst(without["parameters"], expected["parameters"]) > 1e-2


ON_THE_PATH = ["plain model", "DDP", "FSDP2, flat", "FSDP2, HSDP sub-mesh, matrix"]


@pytest.mark.parametrize("engine", [ENGINES[name] for name in ON_THE_PATH], ids=ON_THE_PATH)
def test_low_rank_is_the_simulation_on_an_accelerators_path(gloo: GlooPool, engine: Setup) -> None:
    """CPU tensors take every branch that a GPU's take, against the simulation on the
    CPU's own path; restarts in pieces of one matrix.
    """
    setup = replace(engine, compressor=RESTARTS, steps=9)
    expected = simulated(setup, WORLD)
    small = replace(setup, options={**setup.options, "bucket_cap_mb": 1e-5})
    with accelerator_path():
        ours = gloo.run(train, WORLD, small)
    alike(ours)
    assert worst(ours[0]["parameters"], expected["parameters"]) < 1e-4
    for one, losses in zip(ours, expected["losses"], strict=True):
        assert one["losses"] == pytest.approx(losses, abs=1e-4)


ALGORITHMS = [
    (Acp(2, restart_every=4), {}),
    (GreedyLore(2, restart_every=3), {}),
    (GaLore(2, restart_every=3), {}),
    (GoLore(2, restart_every=3, galore_until=3), {}),
    (Atomo(2), {}),
    (Atomo(2, sampling="bernoulli", contractive=True), {}),
    (RandomProjection(2), {}),
    (PowerSGDPlus(2, 3, restart="greedy"), {}),
    (RESTARTS, {"error_feedback": ErrorFeedback(form="ef21_sgdm", momentum=0.5)}),
    (PowerSGD(1), {"error_feedback": ErrorFeedback(rounds=2)}),
    (PowerSGD(2), {"quantization": Quantization(factors="int8", dense="int8")}),
    (RESTARTS, {"warmup_steps": 3}),
    (PowerSGD(1), {"warmup_steps": 7}),
]

ONE_LEVEL_OR_SHARDS = {name: setup for name, setup in ENGINES.items() if setup.scope != "matrix"}


@pytest.mark.parametrize("engine", ONE_LEVEL_OR_SHARDS.values(), ids=ONE_LEVEL_OR_SHARDS.keys())
def test_every_algorithm_is_the_simulation(gloo: GlooPool, engine: Setup) -> None:
    """All of them one after the other in one start of the processes. Codes: a number
    next to the middle between two codes may fall to the other side by a last bit, hence
    the wide comparison.
    """
    setups = [
        replace(engine, compressor=compressor, steps=7, options={**engine.options, **options})
        for compressor, options in ALGORITHMS
    ]
    by_rank = gloo.run(train_each, WORLD, setups)
    without = simulated(replace(engine, compressor=None, steps=7), WORLD)["parameters"]
    for k, setup in enumerate(setups):
        alike([results[k] for results in by_rank])
        expected = simulated(setup, WORLD)["parameters"]
        coded = "quantization" in setup.options
        assert worst(by_rank[0][k]["parameters"], expected) < (0.05 if coded else 1e-4), setup
        if setup.options.get("warmup_steps") == setup.steps:
            assert worst(without, expected) < 1e-5
        else:  # the comparison can fail
            assert worst(without, expected) > 1e-2


def train_each(rank: int, setups: list[Setup]) -> list[dict]:
    return [train(rank, setup) for setup in setups]


MATRIX_SCOPE = {name: setup for name, setup in ENGINES.items() if setup.scope == "matrix"}

VARIANTS = {
    "svd": (PowerSGDPlus(2, 3), {}),
    "randomized": (PowerSGDPlus(2, 3, restart="randomized"), {}),
    "random projection": (PowerSGDPlus(2, 3, restart="random_projection"), {}),
    "power iterations": (PowerSGDPlus(2, 3, power_iterations=2), {}),
    "exact restart": (PowerSGDPlus(2, 3, exact_restart=True), {}),
    "consensus restart": (PowerSGDPlus(2, 3, consensus_restart=True), {}),
    "stagger": (PowerSGDPlus(2, 3, stagger=True), {}),
    "rank above the rows of a block": (PowerSGDPlus(5, 3), {}),
    "bf16 wire": (PowerSGDPlus(2, 3), {"wire_dtype": "bfloat16"}),
    "warm-up": (PowerSGDPlus(2, 3), {"warmup_steps": 4}),
}


@pytest.mark.parametrize("engine", MATRIX_SCOPE.values(), ids=MATRIX_SCOPE.keys())
@pytest.mark.parametrize(("compressor", "options"), VARIANTS.values(), ids=VARIANTS.keys())
def test_whole_matrices_in_blocks_equal_the_unsharded_algorithm(
    gloo: GlooPool, engine: Setup, compressor: PowerSGDPlus, options: dict
) -> None:
    setup = replace(engine, compressor=compressor, steps=7, options={**engine.options, **options})
    ours = gloo.run(train, WORLD, setup)
    alike(ours)
    # On a narrower wire a sum that differs by a last bit may round to another 16-bit
    # number.
    assert worst(ours[0]["parameters"], simulated(setup, WORLD)["parameters"]) < (
        1e-2 if "wire_dtype" in options else 1e-6
    )


@every_engine
@pytest.mark.shows("AdamW")
def test_adamw_and_a_randomized_restart(gloo: GlooPool, engine: Setup) -> None:
    setup = replace(
        engine, compressor=PowerSGDPlus(2, 5, restart="randomized"), steps=12, adam=True
    )
    ours = gloo.run(train, WORLD, setup)
    alike(ours)
    assert worst(ours[0]["parameters"], simulated(setup, WORLD)["parameters"]) < 1e-4


@every_engine
@pytest.mark.shows("accumulation")
def test_accumulation(gloo: GlooPool, engine: Setup) -> None:
    setup = replace(engine, compressor=RANK_2, micro=3)
    ours = gloo.run(train, WORLD, setup)
    alike(ours)
    assert worst(ours[0]["parameters"], simulated(setup, WORLD)["parameters"]) < 1e-4
    assert len({report["collectives"] for report in ours[0]["reports"]}) == 1
    once = gloo.run(train, WORLD, replace(setup, micro=1))
    # sent once, however many micro-batches
    assert ours[0]["reports"][0]["bytes"] == once[0]["reports"][0]["bytes"]


@every_engine
def test_a_batch_that_is_given_up_leaves_no_trace(gloo: GlooPool, engine: Setup) -> None:
    """Its gradients are 1000 times as large, and were averaged. Step 7 restarts. In the
    error memory they would move the weights far in the steps that follow.
    """
    hows = ["optimizer.zero_grad", "zeros", "after reduce_gradients", "step without gradients"]
    for compressor, options in [
        (RESTARTS, {}),
        (GreedyLore(2, restart_every=7), {}),
        (RESTARTS, {"error_feedback": ErrorFeedback(form="ef21")}),
    ]:
        if engine.nodes and (options or (engine.scope == "matrix" and compressor is not RESTARTS)):
            # whole matrices know neither; for EF21 one level will do
            continue
        setup = replace(
            engine, compressor=compressor, steps=9, options={**engine.options, **options}
        )
        spikes = {2: "an exception", **dict(zip((3, 4, 6, 7), hows, strict=True))}
        ours, theirs = gloo.run(train_both, WORLD, setup, replace(setup, spikes=spikes))[0]
        assert worst(ours["parameters"], theirs["parameters"]) == 0.0
        assert ours["errors"].keys() == theirs["errors"].keys()
        for name, error in ours["errors"].items():
            assert torch.equal(error, theirs["errors"][name])
        assert [report["step"] for report in theirs["reports"]] == list(range(9))


@every_engine
def test_a_number_that_vetoes_every_step_ends_the_run_on_all_ranks(
    gloo: GlooPool, engine: Setup
) -> None:
    told = gloo.run(stuck, WORLD, replace(engine, compressor=RANK_2))
    rank = 3
    for text in told:
        assert f"on rank {rank} the error memory of head.weight holds nan" in text
        assert "reset()" in text


def stuck(rank: int, setup: Setup) -> str:
    """What ends a run in which a number of rank 3's error memory is NaN."""
    model, process_group = wrapped(setup)
    optimizer = CompressedOptimizer(
        setup.base(plain_names(model).items()),
        RANK_2,
        min_compression_rate=0,
        max_vetoes=3,
        process_group=process_group,
        shard_scope=setup.scope,
        **setup.options,
    )
    optimizer.attach(model)
    try:
        for step in range(9):
            if step == 2 and rank == 3:
                optimizer.reducer.state.error_memory()["head.weight"].view(-1)[:1] = torch.nan
            loss_of(model, step, rank).backward()
            optimizer.step()
            optimizer.zero_grad()
    except LowRankCommError as error:
        assert step == 4
        return str(error)
    finally:
        optimizer.detach()
    return "never"


def train_both(rank: int, one: Setup, other: Setup) -> tuple[dict, dict]:
    return train(rank, one), train(rank, other)


@every_engine
@pytest.mark.shows("clipping")
def test_the_callers_clipping_sees_the_averaged_gradient(gloo: GlooPool, engine: Setup) -> None:
    setup = replace(engine, compressor=FULL, clip=0.5, micro=2)
    ours = gloo.run(train, WORLD, setup)
    alike(ours)
    exact = simulated(replace(setup, compressor=None), WORLD)
    for one in ours:
        assert one["norms"] == pytest.approx(exact["norms"], rel=1e-5)
    # clipping was active
    assert min(exact["norms"]) > 0.5
    assert worst(ours[0]["parameters"], exact["parameters"]) < 1e-5


@every_engine
@pytest.mark.shows("clipping")
def test_our_clipping(gloo: GlooPool, engine: Setup) -> None:
    setup = replace(engine, compressor=FULL, options={**engine.options, "max_grad_norm": 0.5})
    ours = gloo.run(train, WORLD, setup)
    alike(ours)
    exact = simulated(replace(setup, compressor=None, clip=0.5), WORLD)
    assert worst(ours[0]["parameters"], exact["parameters"]) < 1e-5


@every_engine
@pytest.mark.shows("bytes = formula")
def test_bytes_of_a_node_are_the_formula(gloo: GlooPool, engine: Setup) -> None:
    """r (m + n) for each matrix between nodes, or r (m + F n) where blocks are factored
    alone; dense elements; control.
    """
    setup = replace(engine, compressor=RANK_2, steps=2)
    results = gloo.run(train, WORLD, setup)
    ranks = WORLD // engine.nodes if engine.nodes else 1
    r, low, dense = 2, 0, 0
    for name, p in results[0]["parameters"].items():
        if p.dim() != 2:
            dense += p.numel()
            continue
        m, n = p.shape
        blocks = (
            [m] if engine.scope == "matrix" or ranks == 1 else [-(-m // ranks), m - -(-m // ranks)]
        )
        low += sum(min(r, block) * (block + n) for block in blocks)
        assert name in results[0]["errors"]
    node = results[:ranks]
    sent = {
        kind: sum(one["reports"][1]["bytes"].get(kind, 0) for one in node)
        for kind in ("factors", "dense", "control")
    }
    parameters = len(results[0]["parameters"])
    assert sent == {"factors": 4 * low, "dense": 4 * dense, "control": 4 * (1 + parameters) * ranks}
    assert results[0]["plan"][1] == sent["factors"] + sent["dense"]
    # what was counted where torch is called
    for one in results:
        report = one["reports"][1]
        between, inside = ("between", "inside") if engine.nodes else ("inside", "between")
        assert one["carried"][1].pop(between) == sum(report["bytes"].values())
        assert one["carried"][1].pop(inside, 0) == sum(report["inside_bytes"].values())
        assert not one["carried"][1]
        assert bool(report["inside_bytes"]) == (ranks > 1)
    held = sum(one["plan"][3] for one in node)
    # 1/F of the model each
    assert held == 4 * sum(p.numel() for p in results[0]["parameters"].values() if p.dim() == 2)


FSDP = {
    name: setup for name, setup in ENGINES.items() if setup.engine in ("flat", "hsdp", "native")
}

every_fsdp = pytest.mark.parametrize("engine", FSDP.values(), ids=FSDP.keys())


@every_fsdp
@pytest.mark.parametrize(
    "change",
    [
        {"wrap": {"reshard_after_forward": False}},
        {"wrap": {"reshard_after_forward": True}},
        {"model": {"recompute": True}},
        {"compiled": True},
        {"model": {"tied": True}},
        {"model": {"idle": True}},
    ],
    ids=[
        "kept after forward",
        "resharded after forward",
        "activation checkpointing",
        "compiled",
        "tied",
        "unused parameters",
    ],
)
def test_settings_of_fsdp(gloo: GlooPool, engine: Setup, change: dict) -> None:
    setup = replace(
        engine,
        compressor=RANK_2,
        micro=2,
        steps=4,
        adam="idle" in change.get("model", {}),
        **change,
    )
    ours = gloo.run(train, WORLD, setup)
    alike(ours)
    assert worst(ours[0]["parameters"], simulated(setup, WORLD)["parameters"]) < 1e-4


@every_fsdp
@pytest.mark.shows("bf16")
@pytest.mark.parametrize(
    "reduce_dtype", [torch.float32, None], ids=["reduce in fp32", "reduce in bf16"]
)
def test_bf16_parameters_of_fsdp(
    gloo: GlooPool, engine: Setup, reduce_dtype: torch.dtype | None
) -> None:
    mixed = {"mp": {"param_dtype": torch.bfloat16, "reduce_dtype": reduce_dtype}}
    setup = replace(engine, compressor=FULL, wrap=mixed, micro=2)
    ours = gloo.run(train, WORLD, setup)
    alike(ours)
    own_engine = engine if engine.engine != "hsdp" else ENGINES["FSDP2, HSDP 2-D mesh, shard"]
    own = gloo.run(train, WORLD, replace(own_engine, compressor=None, wrap=mixed, micro=2))
    # Forward and backward round to 8 bits; sums in another order make the last of them
    # differ.
    assert worst(ours[0]["parameters"], own[0]["parameters"]) < (2e-3 if reduce_dtype else 2e-2)
    memory = torch.cat([e.flatten() for e in ours[0]["errors"].values()])
    assert memory.dtype == torch.float32


@pytest.mark.parametrize(
    "engine",
    [s for n, s in ENGINES.items() if s.engine in ("plain", "ddp")],
    ids=[n for n, s in ENGINES.items() if s.engine in ("plain", "ddp")],
)
@pytest.mark.shows("bf16")
def test_bf16_model(gloo: GlooPool, engine: Setup) -> None:
    setup = replace(engine, compressor=RANK_2, model={"dtype": torch.bfloat16}, micro=2)
    ours = gloo.run(train, WORLD, setup)
    alike(ours)
    assert worst(ours[0]["parameters"], simulated(setup, WORLD)["parameters"]) < 2e-2


DDP_SETTINGS = {
    "static graph": ({"static_graph": True}, {}),
    "unused parameters": ({"find_unused_parameters": True}, {"idle": True}),
    "gradients as views of buckets": ({"gradient_as_bucket_view": True}, {}),
    "views and unused": (
        {"gradient_as_bucket_view": True, "find_unused_parameters": True},
        {"idle": True},
    ),
    "small buckets": ({"bucket_cap_mb": 0.001}, {}),
    "tied": ({}, {"tied": True}),
    "activation checkpointing": ({}, {"recompute": True}),
}


@pytest.mark.parametrize(("wrap", "model"), DDP_SETTINGS.values(), ids=DDP_SETTINGS.keys())
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("nodes", [0, 2], ids=["one level", "two levels"])
def test_settings_of_ddp(gloo: GlooPool, wrap: dict, model: dict, micro: int, nodes: int) -> None:
    if "static_graph" in wrap and micro > 1:
        pytest.skip("torch issue 143580: static_graph with no_sync fails without us, too")
    setup = Setup(
        "ddp", RANK_2, nodes, wrap=wrap, model=model, micro=micro, steps=5, adam="idle" in model
    )
    ours = gloo.run(train, WORLD, setup)
    alike(ours)
    assert worst(ours[0]["parameters"], simulated(setup, WORLD)["parameters"]) < 1e-4


OVERLAPPING = {
    "plain model": Setup("plain"),
    "DDP": Setup("ddp"),
    "DDP (unused parameters)": Setup(
        "ddp", wrap={"find_unused_parameters": True}, model={"idle": True}
    ),
}


@pytest.mark.parametrize("engine", OVERLAPPING.values(), ids=OVERLAPPING.keys())
@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.shows("overlap")
def test_overlapped_is_what_it_is_without(gloo: GlooPool, engine: Setup, micro: int) -> None:
    setup = replace(engine, compressor=RESTARTS, micro=micro, steps=10, clip=1.0)
    early = replace(setup, options={"overlap": True, "bucket_cap_mb": 0.001})
    ours = gloo.run(train, WORLD, early)
    alike(ours)
    after = gloo.run(train, WORLD, replace(setup, options={"reduce_at": "backward"}))
    assert worst(ours[0]["parameters"], after[0]["parameters"]) < 1e-6
    # A layer without a gradient keeps its bucket, and those after it, until the pass
    # has ended: here it is in the first.
    assert (ours[0]["early"][-1] > 1) == ("idle" not in engine.model)
    assert after[0]["early"][-1] == 0
