"""Time of one compressed reduction against PyTorch's own PowerSGD hook on the same
tensors, side by side.

It measures what a worker computes in a step beside the communication: compress,
decompress, error feedback, for the gradients of LLaMA shapes of about 5M and 20M
parameters at rank 4 and 32. Both sides run in one process over a gloo group of one,
with equal threads, on equal gradients; PyTorch's hook gets them in buckets of 25 MB, as
from DDP. Each round times both, one after the other, in alternating order. The table
shows the medians and the median of the paired ratios with its quartiles, since the
machine's speed drifts. After timing, the last results of both are compared, dense
parameters exactly and matrices by their norms, so that neither has left work out.

The clock is time.perf_counter: torch.utils.benchmark.Timer repeats a statement to warm
up, and a step changes the compressor's state.

    python benchmarks/bench_compress.py [--rounds 15] [--markdown docs/benchmarks.md]
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.distributed as dist
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import powerSGD_hook as torch_hook

from lowrank_comm import PowerSGD
from lowrank_comm.communication import Group
from lowrank_comm.reduction.reducer import ParamInfo, Reducer

BUCKET_BYTES = 25 * 2**20
NOTE = """\
Where rank is high and the model small, matrix products decide. This library forms four of
them for each matrix and the hook three: the error memory subtracts the worker's own
contribution P Q_i^T, as the paper's algorithm does, and the hook the decoded mean, which it
has anyway and by which the workers' memories part without bound (how_it_works.md).

"""
AGAINST = """
## Against another commit

    git worktree add ../base v0.1.0
    make bench-against BASE=../base

times the same models and ranks with the library of this checkout and of `BASE`, step by
step in alternation, and prints for each row the ratio of the two with its 95 % confidence
interval. A row whose interval lies wholly above 1.03 is slower: the exit code is then 1.
`BENCH_ARGS="--rounds 30 --repeats 10 --json FILE"` sets the length and keeps the figures.
"""


@dataclass(frozen=True)
class Model:
    """A LLaMA's shapes."""

    name: str
    hidden: int
    layers: int
    mlp: int
    vocabulary: int

    def shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of all parameters in the model's order (tied embedding)."""
        h, f = self.hidden, self.mlp
        layer: list[tuple[int, ...]] = [(h, h)] * 4 + [(f, h), (f, h), (h, f), (h,), (h,)]
        return [(self.vocabulary, h), *(shape for _ in range(self.layers) for shape in layer), (h,)]


MODELS = [Model("5M", 256, 6, 688, 2048), Model("20M", 512, 6, 1376, 4096)]


class Bucket:
    """What DDP passes to a hook: a flat buffer and its pieces (duck typing of torch's
    GradBucket).
    """

    def __init__(self, index: int, last: bool, shapes: list[tuple[int, ...]]) -> None:
        self._index, self._last = index, last
        sizes = [torch.Size(shape).numel() for shape in shapes]
        self._buffer = torch.zeros(sum(sizes))
        self._pieces = [p.view(s) for p, s in zip(self._buffer.split(sizes), shapes, strict=True)]

    def buffer(self) -> Tensor:
        """Return the flat gradients."""
        return self._buffer

    def gradients(self) -> list[Tensor]:
        """Return views of the buffer in the parameters' shapes."""
        return self._pieces

    def index(self) -> int:
        """Return the bucket's number in the step."""
        return self._index

    def is_last(self) -> bool:
        """Return whether it is the step's last bucket."""
        return self._last


def buckets_of(shapes: list[tuple[int, ...]]) -> list[Bucket]:
    """Return the parameters in reverse order in buckets of 25 MB, as DDP makes them."""
    groups: list[list[tuple[int, ...]]] = [[]]
    filled = 0
    for shape in reversed(shapes):
        size = torch.Size(shape).numel() * 4
        if filled + size > BUCKET_BYTES and groups[-1]:
            groups.append([])
            filled = 0
        groups[-1].append(shape)
        filled += size
    return [Bucket(k, k == len(groups) - 1, group) for k, group in enumerate(groups)]


def ours(shapes: list[tuple[int, ...]], rank: int) -> tuple[list[Tensor], Callable[[], None]]:
    """Return gradients and the step of this library."""
    cpu = torch.device("cpu")
    slots = [ParamInfo(f"p{k}", shape, torch.float32, cpu) for k, shape in enumerate(shapes)]
    reducer = Reducer(slots, PowerSGD(rank), Group())
    grads = [torch.zeros(shape) for shape in shapes]

    def step() -> None:
        reducer.reduce(list(grads))
        reducer.commit()

    return grads, step


def theirs(
    shapes: list[tuple[int, ...]], rank: int, batch: bool
) -> tuple[list[Tensor], Callable[[], None]]:
    """Return gradients and the step of PyTorch's hook, with error feedback and warm
    start, compressing from the first step.
    """
    state = torch_hook.PowerSGDState(
        None,
        matrix_approximation_rank=rank,
        start_powerSGD_iter=2,
        batch_tensors_with_same_shape=batch,
    )
    state.iter = 2
    buckets = buckets_of(shapes)
    grads = [piece for bucket in buckets for piece in bucket.gradients()]

    def step() -> None:
        for bucket in buckets:
            torch_hook.powerSGD_hook(state, bucket).wait()

    return list(reversed(grads)), step


def measure(model: Model, rank: int, rounds: int, batch: bool) -> dict[str, float]:
    """Return the medians in ms, and median and quartiles of the paired ratios."""
    shapes = model.shapes()
    generator = torch.Generator().manual_seed(0)
    pool = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
    sides = {"ours": ours(shapes, rank), "hook": theirs(shapes, rank, batch)}
    times: dict[str, list[float]] = {"ours": [], "hook": []}
    for k in range(rounds + 3):
        order = ["ours", "hook"] if k % 2 else ["hook", "ours"]
        for side in order:
            grads, step = sides[side]
            for grad, fresh in zip(grads, pool[k % 3], strict=True):
                grad.copy_(fresh)
            start = time.perf_counter()
            step()
            if k >= 3:
                times[side].append((time.perf_counter() - start) * 1e3)
    check_alike(sides["ours"][0], sides["hook"][0], pool[(rounds + 2) % 3])
    ratios = [a / b for a, b in zip(times["ours"], times["hook"], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    return {
        "ours": statistics.median(times["ours"]),
        "hook": statistics.median(times["hook"]),
        "ratio": statistics.median(ratios),
        "low": quartiles[0],
        "high": quartiles[2],
    }


def check_alike(mine: list[Tensor], hook: list[Tensor], given: list[Tensor]) -> None:
    """Check that both did the work: dense parameters are exact, matrices are
    approximated by about as much.
    """
    for a, b, g in zip(mine, hook, given, strict=True):
        if g.dim() == 1:
            assert torch.allclose(a, g)
            assert torch.allclose(b, g)
        else:
            norms = [float(x.norm()) for x in (a, b)]
            assert not torch.allclose(a, g)
            assert 0.5 < norms[0] / norms[1] < 2.0, norms


def processor() -> str:
    """Return the processor's name, or at least its kind."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main(
    rounds: Annotated[int, typer.Option(help="timed rounds for each row")] = 15,
    markdown: Annotated[Path | None, typer.Option(help="also write the table to this file")] = None,
) -> None:
    """Run all rows and print the table."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    logging.disable(logging.WARNING)
    store = Path(tempfile.mkdtemp()) / "store"
    dist.init_process_group("gloo", store=dist.FileStore(str(store), 1), rank=0, world_size=1)
    machine = (
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), torch"
        f" {torch.__version__}"
    )
    here = Path(__file__).resolve()
    command = " ".join(["python", here.relative_to(here.parents[1]).as_posix(), *sys.argv[1:]])
    heads = ["model", "rank", "hook batches", "ours ms", "hook ms", "ours / hook", "quartiles"]
    table = Table(
        *heads,
        title=(
            f"one step: compress + decompress + error feedback ({rounds} paired rounds, {machine})"
        ),
    )
    lines = ["| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for model in MODELS:
        for rank in (4, 32):
            for batch in (False, True):
                with contextlib.redirect_stdout(io.StringIO()):
                    row = measure(model, rank, rounds, batch)
                cells = [
                    model.name,
                    str(rank),
                    "yes" if batch else "no",
                    f"{row['ours']:.1f}",
                    f"{row['hook']:.1f}",
                    f"{row['ratio']:.2f}",
                    f"{row['low']:.2f}-{row['high']:.2f}",
                ]
                table.add_row(*cells)
                lines.append("| " + " | ".join(cells) + " |")
    Console(width=120).print(table)
    if markdown is not None:
        text = f"# Benchmarks\n\n`{command}` on {machine}; {rounds} paired rounds, medians.\n\n"
        text += (
            "Below 1, this library is faster. `hook batches` is the hook's"
            " `batch_tensors_with_same_shape`.\n\n"
        )
        text += NOTE
        markdown.write_text(text + "\n".join(lines) + "\n" + AGAINST, encoding="utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    typer.run(main)
