"""Checks the library on your GPUs: it was written and tested on CPUs (docs/gpu.md tells
what was only read).

    torchrun --nproc-per-node=N examples/gpu_check.py
    torchrun --nproc-per-node=4 examples/gpu_check.py --device cpu

N is the number of GPUs; N = 1 works, and from N = 4 on two levels are checked too.

Every engine trains a small model on the GPUs and must end where a simulation of the
same workers on the CPU ends. Then come precision, overflows, and what only a GPU can
show: waits of the host, memory, time. A table at the end; exit code 1 where a check
failed. What cannot be checked is skipped, and the table says why. Times are for
information; nothing fails by them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from gpu_runs import DIM, Device, Net, Run, loss_of, quietly, simulated, spread, train, worst
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lowrank_comm import CompressedOptimizer, PowerSGD, PowerSGDPlus
from lowrank_comm.communication import leave
from lowrank_comm.reduction.plan import human_bytes

RANK_4 = PowerSGD(rank=4)
FULL_RANK = PowerSGD(rank=DIM)
# between a GPU's and a CPU's training: round-off that the steps so far have amplified
CLOSE = 2e-4
# of memory over the plan
SLACK = 1.25
# of the host in an ordinary step: the two reads of docs/gpu.md
WAITS = 2


class Skipped(Exception):
    """A check that cannot be made here; its text is the reason."""


class Failed(Exception):
    """A check that did not pass; its text has the numbers."""


def demand(fine: bool, numbers: str) -> str:
    """The numbers of a check, as its result or as its failure."""
    if not fine:
        raise Failed(numbers)
    return numbers


@dataclass(frozen=True)
class Check:
    """A row of the table, and what makes it."""

    name: str
    make: Callable[[Device], str]


# --- equal to the simulation


def against_simulation(run: Run, tolerance: float = CLOSE) -> Callable[[Device], str]:
    """Train on the devices, simulate on the CPU, compare; all ranks must hold the same
    bits.
    """

    def make(device: Device) -> str:
        if run.nodes and (device.world < 4 or device.world % run.nodes):
            raise Skipped(f"needs 4 ranks or more, and an even number; this run has {device.world}")
        ours = train(run, device)
        difference = worst(ours.parameters, simulated(run, device.world))
        apart = spread(ours.parameters, device)
        return demand(
            difference < tolerance and apart == 0.0,
            f"difference {difference:.1e}, between ranks {apart:.1e}",
        )

    return make


def uncompressed(run: Run) -> Callable[[Device], str]:
    """At full rank the mean is exact: the training is that of an uncompressed run."""

    def make(device: Device) -> str:
        difference = worst(
            train(run, device).parameters, simulated(Run(run.engine, None), device.world)
        )
        return demand(difference < CLOSE, f"difference {difference:.1e}")

    return make


def overlapped(device: Device) -> str:
    """Compare buckets that start during the backward pass with one pass at its end."""
    early = train(Run("ddp", RANK_4, options={"overlap": True, "bucket_cap_mb": 0.02}), device)
    after = train(Run("ddp", RANK_4), device)
    difference = worst(early.parameters, after.parameters)
    numbers = (
        f"difference {difference:.1e}, {early.early} of {early.buckets} buckets began during"
        " backward"
    )
    return demand(difference < 1e-5 and early.early > 0, numbers)


def narrow(device: Device) -> str:
    """A bfloat16 model: it learns, and all ranks hold the same bits."""
    run = train(Run("ddp", RANK_4, dtype=torch.bfloat16, steps=20), device)
    apart = spread(run.parameters, device)
    numbers = f"loss {run.losses[0]:.3f} -> {run.losses[-1]:.3f}, between ranks {apart:.1e}"
    return demand(run.losses[-1] < run.losses[0] and apart == 0.0, numbers)


def overflow(device: Device) -> str:
    """GradScaler with float16; at one step the loss of the last rank is infinite: no
    rank steps, all lower their scale.
    """
    model = DistributedDataParallel(Net().to(device.device))
    base = torch.optim.SGD(model.module.named_parameters(), lr=0.01)
    optimizer = CompressedOptimizer(base, RANK_4, min_compression_rate=0)
    scaler = torch.amp.GradScaler(device.kind, init_scale=1024.0, growth_interval=1000)
    quietly(lambda: optimizer.attach(model, scaler=scaler))
    unchanged = moved = True
    for step in range(5):
        before = [p.detach().clone() for p in model.parameters()]
        memory = [e.clone() for e in optimizer.error_memory().values()]
        with torch.autocast(device.kind, dtype=torch.float16, enabled=device.is_gpu):
            loss = loss_of(model, step, device.rank, device)
        if step == 2 and device.rank == device.world - 1:
            loss = loss * math.inf
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        same = all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        kept = all(
            torch.equal(a, b)
            for a, b in zip(memory, optimizer.error_memory().values(), strict=True)
        )
        if step == 2:
            unchanged = same and kept
        else:
            moved &= not same
    apart = spread({name: p.detach() for name, p in model.named_parameters()}, device)
    scale, steps = scaler.get_scale(), optimizer.reducer.step
    numbers = f"scale 1024 -> {scale:.0f}, {steps} of 5 steps made, between ranks {apart:.1e}"
    return demand(unchanged and moved and scale == 512.0 and steps == 4 and apart == 0.0, numbers)


# --- what only a GPU can show


def need_gpu(device: Device, why: str) -> None:
    """Skip the check on a CPU."""
    if not device.is_gpu:
        raise Skipped(f"needs a GPU: {why}")


def random_step(parameters: Sequence[Tensor], optimizer: CompressedOptimizer) -> Callable[[], None]:
    """A step from given random gradients, so that only the optimizer's own work is
    looked at.
    """
    torch.manual_seed(1 + dist.get_rank())
    gradients = [torch.randn_like(p) for p in parameters]

    def step() -> None:
        for p, gradient in zip(parameters, gradients, strict=True):
            p.grad = gradient.clone()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measured(device: Device) -> tuple[CompressedOptimizer, Callable[[], None]]:
    """A plain model, its optimizer, and its step after some of them."""
    model = Net().to(device.device)
    optimizer = CompressedOptimizer(
        torch.optim.SGD(model.named_parameters(), lr=1e-3, foreach=True),
        RANK_4,
        min_compression_rate=0,
    )
    step = random_step(list(model.parameters()), optimizer)
    for _ in range(5):
        step()
    return optimizer, step


def waits(device: Device) -> str:
    """How often the host waits for the GPU in an ordinary step, and where."""
    import warnings

    need_gpu(device, "host waits are those for a GPU")
    _, step = measured(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [
        f"{Path(one.filename).name}:{one.lineno}"
        for one in caught
        if "called a synchronizing" in str(one.message)
    ]
    return demand(len(places) <= WAITS, f"{len(places)} (expected {WAITS}): {', '.join(places)}")


def whole_device(device: Device) -> str:
    """No call in a step waits for all streams of the device; how many kernels it
    launches.
    """
    need_gpu(device, "only a GPU has streams")
    from torch.profiler import ProfilerActivity, profile, record_function

    _, step = measured(device)
    torch.cuda.synchronize()
    with (
        profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler,
        record_function("our step"),
    ):
        step()
    events = profiler.events() or []
    span = next(
        one.time_range for one in events if one.name == "our step" and one.device_type.name == "CPU"
    )
    inside = [one.name for one in events if span.start <= one.time_range.start <= span.end]
    count = inside.count("cudaDeviceSynchronize")
    numbers = f"{count} device-wide, {inside.count('cudaStreamSynchronize')} of a stream"
    return demand(
        count == 0, f"{numbers}, {sum('LaunchKernel' in name for name in inside)} kernels launched"
    )


def memory(device: Device) -> str:
    """Error memory and workspace are what the plan says."""
    need_gpu(device, "only the GPU's allocator counts")
    optimizer = wide(device, RANK_4, {}, ddp=False)[1]
    before = torch.cuda.memory_allocated()
    plan = optimizer.plan
    kept = torch.cuda.memory_allocated() - before
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    step = random_step(parameters, optimizer)
    # makes what libraries keep
    step()
    for p in parameters:
        p.grad = torch.randn_like(p)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.reduce_gradients()
    peak = torch.cuda.max_memory_allocated() - before
    optimizer.zero_grad()
    numbers = f"kept {human_bytes(kept)} (plan {human_bytes(plan.error_bytes)} and the bases), "
    numbers += f"open {human_bytes(peak)} (plan {human_bytes(plan.workspace_bytes)})"
    return demand(
        kept < SLACK * plan.error_bytes + 4e6 and peak < SLACK * plan.workspace_bytes + 4e6, numbers
    )


def wide(
    device: Device, compressor: Any, options: dict[str, Any], ddp: bool = True
) -> tuple[nn.Module, Any, Tensor]:
    """A model whose gradients are worth compressing, its optimizer, and an input;
    smaller on a CPU.
    """
    width, layers = (2048, 12) if device.is_gpu else (128, 4)
    torch.manual_seed(0)
    stack = nn.Sequential(
        *(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(layers))
    ).to(device.device)
    model: nn.Module = DistributedDataParallel(stack) if ddp else stack
    optimizer: Any = torch.optim.SGD(stack.named_parameters(), lr=1e-3)
    if compressor is not None:
        optimizer = CompressedOptimizer(optimizer, compressor, **options)
        if ddp:
            quietly(lambda: optimizer.attach(model))
    torch.manual_seed(1 + device.rank)
    return model, optimizer, torch.randn(64, width, device=device.device)


def milliseconds(device: Device, compressor: Any, options: dict[str, Any]) -> float:
    """Of a step, forward and backward included; the median of 10, after 5."""
    model, optimizer, inputs = wide(device, compressor, options)
    times = []
    for _ in range(15):
        device.wait()
        clock = time.perf_counter()
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        device.wait()
        times.append(time.perf_counter() - clock)
    if compressor is not None:
        optimizer.detach()
    return 1e3 * sorted(times[5:])[5]


def speed(device: Device) -> str:
    """DDP's own averaging, ours, and ours with overlap. On one node DDP is expected to
    win.
    """
    ddp = milliseconds(device, None, {})
    ours = milliseconds(device, RANK_4, {})
    early = milliseconds(device, RANK_4, {"overlap": True})
    return f"DDP {ddp:.2f} ms, compressed {ours:.2f} ms, overlapped {early:.2f} ms"


CHECKS = (
    Check("plain model, rank 4 = simulation", against_simulation(Run("plain", RANK_4))),
    Check("DDP, rank 4 = simulation", against_simulation(Run("ddp", RANK_4))),
    Check(
        "DDP, SVD restarts = simulation",
        against_simulation(Run("ddp", PowerSGDPlus(rank=4, restart_every=3))),
    ),
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
    Check("DDP, full rank = uncompressed", uncompressed(Run("ddp", FULL_RANK))),
    Check("FSDP2 flat, full rank = uncompressed", uncompressed(Run("flat", FULL_RANK))),
    Check("overlapped = at the end", overlapped),
    Check("bfloat16 model", narrow),
    Check("GradScaler, overflow on one rank", overflow),
    Check("waits of the host in a step", waits),
    Check("no wait for the whole device", whole_device),
    Check("memory = plan", memory),
    Check("time of a step (information)", speed),
)


# --- the program


def outcome_of(check: Check, device: Device) -> tuple[str, str]:
    """passed, skipped or failed, and the numbers or the reason."""
    try:
        return "passed", check.make(device)
    except Skipped as reason:
        return "skipped", str(reason)
    except Failed as numbers:
        return "failed", str(numbers)
    except Exception as error:
        # at once: another rank may be waiting for this one now, until the group's time
        # is up
        traceback.print_exc()
        return (
            "failed",
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
        )


def agreed(mine: tuple[str, str], device: Device) -> tuple[str, str]:
    """The worst outcome of all ranks."""
    told: list[Any] = [None] * device.world
    dist.all_gather_object(told, mine)
    for rank, (status, numbers) in enumerate(told):
        if status == "failed":
            return status, f"rank {rank}: {numbers}"
    return told[0]  # type: ignore[no-any-return]


def show(rows: Sequence[tuple[str, str, str]], device: Device) -> None:
    """The table."""
    title = f"{device.world} x {device.name}, torch {torch.__version__}, {dist.get_backend()}"
    table = Table(title=title, title_style="bold")
    for heading in ("check", "result", "numbers"):
        table.add_column(heading, overflow="fold")
    colours = {"passed": "green", "failed": "bold red", "skipped": "yellow"}
    for name, status, numbers in rows:
        table.add_row(name, f"[{colours[status]}]{status}[/]", numbers)
    console = Console() if sys.stdout.isatty() else Console(width=150)
    console.print(table)
    counts = {status: sum(row[1] == status for row in rows) for status in colours}
    console.print(", ".join(f"{count} {status}" for status, count in counts.items()))


def main(arguments: list[str] | None = None) -> int:
    """Run the checks; 1 if one failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--device",
        choices=["auto", "cuda", "cpu"],
        default="auto",
        help="default: GPUs if there are any",
    )
    parser.add_argument("--only", default="", help="checks whose name contains this")
    parser.add_argument(
        "--timeout", type=int, default=120, help="seconds that a collective may wait for a rank"
    )
    options = parser.parse_args(arguments)
    kind = (
        options.device
        if options.device != "auto"
        else ("cuda" if torch.cuda.is_available() else "cpu")
    )
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, and torch sees no GPU")
    chosen = [check for check in CHECKS if options.only in check.name]
    if not chosen:
        parser.error(f"--only {options.only!r}: no check has that in its name")
    device = Device.of_this_rank(kind)
    launched: dict[str, Any] = {}
    # started without a launcher
    if "RANK" not in os.environ:
        launched = {"store": dist.HashStore(), "rank": 0, "world_size": 1}  # type: ignore[attr-defined]
    limit = timedelta(seconds=options.timeout)
    dist.init_process_group("nccl" if device.is_gpu else "gloo", timeout=limit, **launched)
    rows = []
    for check in chosen:
        if device.rank == 0:
            print(f"... {check.name}", flush=True)
        rows.append((check.name, *agreed(outcome_of(check, device), device)))
    if device.rank == 0:
        show(rows, device)
    leave()
    return int(any(status == "failed" for _, status, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
