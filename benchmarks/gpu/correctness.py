"""Checks that a training on the devices ends where a simulation of the same workers on
the CPU ends, under every engine that needs no package beside torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.gpu.device import Device
from benchmarks.gpu.outcome import Check, Found, Skipped, demand
from benchmarks.gpu.small_runs import (
    DIM,
    SEED,
    Net,
    Run,
    engine_works,
    loss_of,
    quietly,
    simulated,
    spread,
    train,
    worst,
)
from lowrank_comm import (
    Acp,
    CompressedOptimizer,
    ErrorFeedback,
    GreedyLore,
    PowerSGD,
    PowerSGDPlus,
    Quantization,
)

RANK_4 = PowerSGD(rank=4)
FULL_RANK = PowerSGD(rank=DIM)
# between a GPU's and a CPU's training: round-off that the steps so far have amplified
CLOSE = 2e-4
# the same where round-off may turn a code or a 16-bit number into its neighbour
NARROW = 2e-2


def against_simulation(run: Run, tolerance: float = CLOSE) -> Callable[[Device], Found]:
    """Return a check that trains on the devices, simulates on the CPU and compares; all
    ranks must hold the same bits.
    """

    def make(device: Device) -> Found:
        _need(run, device)
        ours = train(run, device)
        difference = worst(ours.parameters, simulated(run, device.world))
        apart = spread(ours.parameters, device)
        return demand(
            difference < tolerance and apart == 0.0,
            f"difference {difference:.1e}, between ranks {apart:.1e}",
            difference=difference,
            tolerance=tolerance,
            between_ranks=apart,
        )

    return make


def _need(run: Run, device: Device) -> None:
    """Skip a run of two levels on too few ranks, and an engine that the backend does
    not carry, which is nothing of this library.
    """
    if run.nodes and (device.world < 4 or device.world % run.nodes):
        raise Skipped(f"needs 4 ranks or more, and an even number; here are {device.world}")
    if device.is_gpu and dist.get_backend() == "gloo" and run.engine in ("flat", "native"):
        try:
            engine_works(run, device)
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise Skipped(f"FSDP2 itself does not run over gloo on a GPU: {reason}") from error


def uncompressed(run: Run) -> Callable[[Device], Found]:
    """Return a check that training at full rank, whose mean is exact, is that of an
    uncompressed run.
    """

    def make(device: Device) -> Found:
        _need(run, device)
        ends = simulated(Run(run.engine, None), device.world)
        difference = worst(train(run, device).parameters, ends)
        return demand(
            difference < CLOSE,
            f"difference {difference:.1e}",
            difference=difference,
            tolerance=CLOSE,
        )

    return make


def overlapped(device: Device) -> Found:
    """Compare buckets that start during the backward pass with one pass at its end."""
    early = train(Run("ddp", RANK_4, options={"overlap": True, "bucket_cap_mb": 0.02}), device)
    difference = worst(early.parameters, train(Run("ddp", RANK_4), device).parameters)
    return demand(
        difference < 1e-5 and early.early > 0,
        f"difference {difference:.1e}, {early.early} of {early.buckets} buckets began during"
        " backward",
        difference=difference,
        tolerance=1e-5,
        began=early.early,
        buckets=early.buckets,
    )


def narrow(device: Device) -> Found:
    """Train a bfloat16 model: it learns, and all ranks hold the same bits."""
    run = train(Run("ddp", RANK_4, dtype=torch.bfloat16, steps=20), device)
    apart = spread(run.parameters, device)
    first, last = run.losses[0], run.losses[-1]
    return demand(
        last < first and apart == 0.0,
        f"loss {first:.3f} -> {last:.3f}, between ranks {apart:.1e}",
        first_loss=first,
        last_loss=last,
        between_ranks=apart,
    )


def overflow(device: Device) -> Found:
    """Train with GradScaler and float16; at one step the loss of the last rank is
    infinite: no rank steps, and all lower their scale.
    """
    with device.path():
        model = DistributedDataParallel(Net().to(device.device))
        base = torch.optim.SGD(model.module.named_parameters(), lr=0.01)
        optimizer = CompressedOptimizer(base, RANK_4, min_compression_rate=0, seed=SEED)
        scaler = torch.amp.GradScaler(device.kind, init_scale=1024.0, growth_interval=1000)
        quietly(lambda: optimizer.attach(model, scaler=scaler))
        stood_still = [_stands_still(step, model, optimizer, scaler, device) for step in range(5)]
        apart = spread({name: p.detach() for name, p in model.named_parameters()}, device)
        scale, steps = scaler.get_scale(), optimizer.reducer.step
    right = stood_still == [False, False, True, False, False] and scale == 512.0 and steps == 4
    return demand(
        right and apart == 0.0,
        f"scale 1024 -> {scale:.0f}, {steps} of 5 steps made, between ranks {apart:.1e}",
        scale=scale,
        steps=steps,
        stood_still=stood_still,
        between_ranks=apart,
    )


def _stands_still(
    step: int,
    model: DistributedDataParallel,
    optimizer: CompressedOptimizer,
    scaler: torch.amp.GradScaler,
    device: Device,
) -> bool:
    """Make a step; return whether parameters and error memory are as before."""

    def now() -> list[Tensor]:
        kept = optimizer.error_memory().values()
        return [*(p.detach().clone() for p in model.parameters()), *(e.clone() for e in kept)]

    before = now()
    with torch.autocast(device.kind, dtype=torch.float16, enabled=device.is_gpu):
        loss = loss_of(model, step, device.rank, device)
    if step == 2 and device.rank == device.world - 1:
        loss = loss * math.inf
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    return all(torch.equal(a, b) for a, b in zip(before, now(), strict=True))


def _ddp(compressor: object = RANK_4, **options: object) -> Run:
    return Run("ddp", compressor, options=options)  # type: ignore[arg-type]


CHECKS = (
    Check("plain model, rank 4 = simulation", against_simulation(Run("plain", RANK_4))),
    Check("DDP, rank 4 = simulation", against_simulation(_ddp())),
    Check("FSDP2 flat, rank 4 = simulation", against_simulation(Run("flat", RANK_4))),
    Check("HSDP, shard scope = simulation", against_simulation(Run("native", RANK_4, nodes=2))),
    Check(
        "HSDP, matrix scope = simulation",
        against_simulation(Run("native", RANK_4, nodes=2, scope="matrix")),
    ),
    Check(
        "DDP, two levels, matrix scope = simulation",
        against_simulation(Run("ddp", RANK_4, nodes=2, scope="matrix")),
    ),
    Check(
        "DDP, SVD restarts = simulation",
        against_simulation(_ddp(PowerSGDPlus(rank=4, restart_every=3, restart="svd"))),
    ),
    Check(
        "DDP, randomized restarts = simulation",
        against_simulation(_ddp(PowerSGDPlus(rank=4, restart_every=3, restart="randomized"))),
    ),
    Check("DDP, ACP = simulation", against_simulation(_ddp(Acp(rank=4)))),
    Check(
        "DDP, GreedyLore = simulation",
        against_simulation(_ddp(GreedyLore(rank=4, restart_every=3))),
    ),
    Check(
        "DDP, offloaded error memory = simulation",
        against_simulation(_ddp(error_feedback=ErrorFeedback(offload=True))),
    ),
    Check(
        "DDP, bfloat16 error memory = simulation",
        against_simulation(
            _ddp(error_feedback=ErrorFeedback(dtype="bfloat16", rounding="stochastic")), NARROW
        ),
    ),
    Check(
        "DDP, bfloat16 wire = simulation",
        against_simulation(_ddp(wire_dtype="bfloat16"), NARROW),
    ),
    Check(
        "DDP, int8 factors = simulation",
        against_simulation(_ddp(quantization=Quantization(factors="int8")), NARROW),
    ),
    Check("DDP, full rank = uncompressed", uncompressed(Run("ddp", FULL_RANK))),
    Check("FSDP2 flat, full rank = uncompressed", uncompressed(Run("flat", FULL_RANK))),
    Check("overlapped = at the end", overlapped),
    Check("bfloat16 model", narrow),
    Check("GradScaler, overflow on one rank", overflow),
)
