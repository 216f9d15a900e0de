"""Time of one compressed reduction in this checkout against another one, side by side.

Each row is a model and a rank of bench_compress.py. Two processes, one for each
checkout, import that checkout's `lowrank_comm` and bench_compress.py, and take turns:
in a round both make one step on equal gradients, in alternating order, and the ratio of
the two times is one paired ratio. A process keeps its memory layout for life, which may
favour one side; so the pair is started afresh `repeats` times. Each repeat counts as
one value, the median of its paired ratios. The table shows the geometric mean of these
medians with its 95 % confidence interval (Student's t over the repeats' logarithms).

torch.utils.benchmark is not used: its Timer repeats a statement to warm up, and a step
changes the compressor's state.

    git worktree add ../base v0.1.0
    python benchmarks/compare_commits.py ../base [--rounds 30] [--repeats 10] [--json F]
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import typer
from rich.console import Console
from rich.table import Table
from scipy import stats

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
ROWS = [(model, rank) for model in ("5M", "20M") for rank in (4, 32)]
WARM_UP = 3
SLOWER = 1.03
"""A row whose whole interval lies above this ratio counts as slower."""


def serve(checkout: Path) -> None:
    """Answer each request on stdin, [model, rank, round], with the milliseconds of one
    step by the checkout's library.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    sys.path[:0] = [str(checkout), str(checkout / "benchmarks")]
    import bench_compress
    import torch
    import torch.distributed as dist

    import lowrank_comm

    assert checkout in Path(lowrank_comm.__file__).parents, lowrank_comm.__file__
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    store = dist.FileStore(str(Path(tempfile.mkdtemp()) / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    models = {model.name: model for model in bench_compress.MODELS}
    current = None
    for request in sys.stdin:
        model, rank, number = json.loads(request)
        if current != (model, rank):
            current, shapes = (model, rank), models[model].shapes()
            generator = torch.Generator().manual_seed(0)
            pool = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(3)]
            grads, step = bench_compress.ours(shapes, rank)
        for grad, fresh in zip(grads, pool[number % 3], strict=True):
            grad.copy_(fresh)
        start = time.perf_counter()
        step()
        print((time.perf_counter() - start) * 1e3, file=answers, flush=True)
    dist.destroy_process_group()


class Server:
    """A process that times steps of one checkout; see `serve`."""

    def __init__(self, checkout: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(HERE), "--serve", str(checkout)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def milliseconds(self, model: str, rank: int, number: int) -> float:
        """Return the time of one step.

        Raises:
            RuntimeError: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([model, rank, number]) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self._process.args} has ended; its error is above.")
        return float(answer)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def paired_times(base: Path, rounds: int) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Return, for each row, (ms of this checkout, ms of the base) of every round."""
    servers = [Server(ROOT), Server(base)]
    try:
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for row in ROWS:
            found[row] = []
            for number in range(WARM_UP + rounds):
                order = (0, 1) if number % 2 else (1, 0)
                times = {side: servers[side].milliseconds(*row, number) for side in order}
                if number >= WARM_UP:
                    found[row].append((times[0], times[1]))
        return found
    finally:
        for server in servers:
            server.close()


def summary(repeats: list[list[tuple[float, float]]]) -> dict[str, Any]:
    """Return medians in ms, the ratio with its interval, and whether the row is slower.

    Args:
        repeats: of each pair of processes, the paired times of a row.
    """
    medians = [statistics.median(own / base for own, base in pairs) for pairs in repeats]
    logs = [math.log(median) for median in medians]
    mean, degrees = statistics.fmean(logs), len(logs) - 1
    low, high = stats.t.interval(0.95, degrees, loc=mean, scale=stats.sem(logs))
    return {
        "ms": statistics.median(own for pairs in repeats for own, _ in pairs),
        "base_ms": statistics.median(base for pairs in repeats for _, base in pairs),
        "ratio": math.exp(mean),
        "low": math.exp(low),
        "high": math.exp(high),
        "slower": math.exp(low) > SLOWER,
        "medians_of_paired_ratios": medians,
    }


def revision(checkout: Path) -> str:
    """Return the checkout's commit, as `git describe` names it."""
    command = ["git", "-C", str(checkout), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main(
    base: Annotated[Path, typer.Argument(help="checkout to compare with", exists=True)],
    rounds: Annotated[int, typer.Option(help="paired rounds of a row in a repeat", min=1)] = 30,
    repeats: Annotated[int, typer.Option(help="pairs of processes", min=2)] = 10,
    output: Annotated[Path | None, typer.Option("--json", help="also write this file")] = None,
) -> None:
    """Time this checkout against another one; the exit code is 1 if a row is slower."""
    base = base.resolve()
    found = [paired_times(base, rounds) for _ in range(repeats)]
    rows = {row: summary([repeat[row] for repeat in found]) for row in ROWS}
    names = {"this": revision(ROOT), "base": revision(base)}
    table = Table(
        *("model", "rank", "base ms", "this ms", "this / base", "95 % interval", ""),
        title=f"one step, {names['this']} / {names['base']}: {repeats} x {rounds} paired rounds",
    )
    for (model, rank), row in rows.items():
        table.add_row(
            model,
            str(rank),
            f"{row['base_ms']:.1f}",
            f"{row['ms']:.1f}",
            f"{row['ratio']:.3f}",
            f"{row['low']:.3f}-{row['high']:.3f}",
            "slower" if row["slower"] else "",
        )
    Console(width=100).print(table)
    if output is not None:
        told = {
            "revisions": names,
            "rounds": rounds,
            "repeats": repeats,
            "load": os.getloadavg(),
            "rows": [{"model": model, "rank": rank, **row} for (model, rank), row in rows.items()],
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    if any(row["slower"] for row in rows.values()):
        raise typer.Exit(1)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(Path(sys.argv[2]))
    else:
        typer.run(main)
