"""What `check_every` costs: the time of one comparison against that of a step, its
kernels, and the bytes that it sends.

A transformer encoder of the given width trains under `CompressedOptimizer` (AdamW,
PowerSGD+) on two gloo processes of this machine. Each round times `steps` steps without
a comparison, and one comparison by itself; the share at K = 100 is the comparison's
time over that of 100 steps, by the clock and by the CPU time of the process, which a
busy machine changes less. Kernels are the operators of torch's profiler that compute
(views and allocations are left out), on one rank.

On a CPU the hash reads every parameter once, at the speed of its memory, while forward
and backward pass take about 6 operations for each parameter and token; so the share
falls with the tokens of a batch.

    python benchmarks/bench_divergence.py [--width 512] [--tokens 128] [--rounds 5]
"""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
import typer
from torch import nn

from lowrank_comm import CompressedOptimizer, PowerSGDPlus
from lowrank_comm.communication import leave
from lowrank_comm.optimizer.replicas import replicas_of
from lowrank_comm.reduction.divergence import DivergenceCheck

K = 100
NO_KERNEL = (
    "view",
    "reshape",
    "detach",
    "slice",
    "split",
    "narrow",
    "as_strided",
    "alias",
    "select",
    "unbind",
    "empty",
    "resize",
    "expand",
    "unsafe",
    "item",
    "to",
    "_local_scalar_dense",
)


def model_of(width: int) -> nn.Module:
    """Four encoder layers, with 12 width^2 parameters each."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True
    )
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def measure(rank: int, store: str, width: int, tokens: int, rounds: int, results: Any) -> None:
    """Time steps and comparisons on one of two ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    model = model_of(width)
    optimizer = CompressedOptimizer(
        torch.optim.AdamW(model.named_parameters(), lr=1e-4), PowerSGDPlus(rank=4)
    )
    generator = torch.Generator().manual_seed(rank)

    def step() -> None:
        x = torch.randn(1, tokens, width, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()

    check = DivergenceCheck(1, "error", "")

    def compare() -> None:
        named = dict(model.named_parameters())
        engine = optimizer._attachment.engine
        check.run(optimizer.reducer, replicas_of(named, optimizer.base, engine))

    for _ in range(2):
        step()
        compare()
    times: dict[str, list[float]] = {
        "step": [],
        "comparison": [],
        "step cpu": [],
        "comparison cpu": [],
    }
    for _ in range(rounds):
        for name, call in (("step", step), ("comparison", compare)):
            dist.barrier()
            clock, cpu = time.perf_counter(), time.process_time()
            call()
            times[name].append(time.perf_counter() - clock)
            times[f"{name} cpu"].append(time.process_time() - cpu)
    before = optimizer.ledger.bytes["fingerprint"]
    with torch.profiler.profile() as profile:
        compare()
    sent = optimizer.ledger.bytes["fingerprint"] - before
    kernels = sum(
        event.count
        for event in profile.key_averages()
        if event.key.startswith("aten::")
        and not event.key.removeprefix("aten::").startswith(NO_KERNEL)
    )
    if rank == 0:
        numel = sum(p.numel() for p in model.parameters())
        medians = {name: statistics.median(those) for name, those in times.items()}
        results.put((numel, len(list(model.parameters())), medians, kernels, sent))
    leave()


def main(
    width: Annotated[list[int], typer.Option(help="of the model")] = [256, 512],  # noqa: B006
    tokens: Annotated[list[int], typer.Option(help="of a batch and rank")] = [128, 1024],  # noqa: B006
    rounds: Annotated[int, typer.Option(help="of which the median is told")] = 5,
) -> None:
    """Print the table."""
    print(
        f"{platform.processor() or platform.machine()}, 1 thread a rank, torch {torch.__version__}"
    )
    print(
        "| parameters | tensors | tokens a rank | step ms | comparison ms | share at K = 100 |"
        " of CPU time | kernels | bytes sent |\n" + 9 * "| --- " + "|"
    )
    context = multiprocessing.get_context("spawn")
    for one in width:
        for batch in tokens:
            results = context.SimpleQueue()
            with tempfile.TemporaryDirectory() as folder:
                arguments = (f"{folder}/store", one, batch, rounds, results)
                multiprocessing.spawn(measure, arguments, nprocs=2)
            numel, tensors, medians, kernels, sent = results.get()
            share = medians["comparison"] / (K * medians["step"])
            of_cpu = medians["comparison cpu"] / (K * medians["step cpu"])
            print(
                f"| {numel / 1e6:.1f}M | {tensors} | {batch} | {1e3 * medians['step']:.1f} |"
                f" {1e3 * medians['comparison']:.2f} | {share:.3%} |"
                f" {of_cpu:.3%} | {kernels} | {sent} |",
                flush=True,
            )


if __name__ == "__main__":
    typer.run(main)
