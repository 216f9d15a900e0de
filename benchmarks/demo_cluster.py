"""The main job on several hosts with slow links: the same training uncompressed and
compressed, by the clock.

    # as root: 4 hosts at 100 Mbit/s, 60 steps of each run
    make demo-cluster
    python benchmarks/demo_cluster.py --hosts 2 --mbit 1000 --model-size M \\
        --config configs/ds_powersgd_plus_zero2.json

runs examples/train.py, one process a host, with configs/ds_uncompressed.json and then
with the compressed config, all else equal, in the network of netlab.py: real sockets,
and links that the kernel holds to the rate. Then it prints both step times, the bytes
that the kernel counted at every host's interface, and the losses; draws loss against
time; and writes all figures with the command and the machine's state to a JSON file
beside the plot.

What the figures are. A step's time is that of rank 0, forward pass to optimizer step;
the first two steps are left out of median and quartiles, as they allocate and warm up,
but not of the plot. Bytes are those of the whole run, including the start (the
parameters are broadcast once), the evaluation, and the packets' headers. All hosts
share this machine's cores: computing takes longer than on separate machines, which
makes compression look worse than it is. The links have almost no latency, which affects
both runs.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import typer
from netlab import Lab, LabError, Run, exit_on_sigterm, missing
from report import LOG, SUMMARY, Summary, logged_steps, smoothed
from rich.console import Console
from rich.table import Table

from lowrank_comm.reduction.plan import human_bytes

ROOT = Path(__file__).resolve().parent.parent
# The thick line is the mean of so many steps before and after each.
SMOOTHING = 2
PLOT, FIGURES = "loss_vs_time.png", "demo_cluster.json"
UNCOMPRESSED = ROOT / "configs" / "ds_uncompressed.json"
COMPRESSED = ROOT / "configs" / "ds_powersgd_plus.json"


@dataclass(frozen=True)
class Outcome:
    """One finished run, from its own log and the kernel's counters."""

    folder: Path
    command: list[str]
    # of the machine, before
    load: tuple[float, float, float]
    network: Run
    summary: Summary
    # of log.jsonl
    steps: list[dict[str, Any]]

    @property
    def step_seconds(self) -> list[float]:
        """Of all steps but the first two."""
        return [step["seconds"] for step in self.steps if not step["warm_up"]]

    @property
    def quartiles(self) -> list[float]:
        """Lower quartile, median and upper quartile of a step's seconds."""
        return statistics.quantiles(self.step_seconds, n=4)

    @property
    def clock(self) -> list[float]:
        """Seconds of training at the end of each step."""
        ends, total = [], 0.0
        for step in self.steps:
            total += step["seconds"]
            ends.append(total)
        return ends

    @property
    def all_reduced(self) -> float:
        """Bytes that a ring all-reduce sends from each host: 2 (N - 1) / N of the run's
        own count.
        """
        hosts = len(self.network.sent)
        return 2 * (hosts - 1) / hosts * self.summary.total_bytes

    def figures(self) -> dict[str, Any]:
        """Return what the JSON file holds of the run."""
        return {
            "name": self.summary.name,
            "command": shlex.join(self.command),
            "load_before": self.load,
            "seconds_with_start_and_evaluation": self.network.seconds,
            "step_seconds": {
                "quartiles": self.quartiles,
                "all": [step["seconds"] for step in self.steps],
            },
            "loss": [step["loss"] for step in self.steps],
            "final_loss": self.summary.last_loss,
            "held_out_perplexity": self.summary.last_perplexity,
            "sent_by_host": self.network.sent,
            "received_by_host": self.network.received,
            "counted_by_the_run": self.summary.bytes,
        }


def train(
    lab: Lab, config: Path, folder: Path, steps: int, model_size: str, timeout: float | None = None
) -> Outcome:
    """Run examples/train.py with this DeepSpeed JSON on all hosts of the lab."""
    options = {
        "deepspeed": config,
        "output_dir": folder,
        "max_steps": steps,
        "model_size": model_size,
        "use_cpu": True,
        "save_strategy": "no",
        "eval_on_start": False,
        "held_out_tokens": 10000,
    }
    command = [sys.executable, "examples/train.py"]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    # a run that fails must not be mistaken for the last one that did not
    for old in (LOG, SUMMARY):
        (folder / old).unlink(missing_ok=True)
    quiet = {
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
    }
    load = os.getloadavg()
    network = lab.run(command, env=quiet, cwd=ROOT, timeout=timeout)
    return Outcome(folder, command, load, network, Summary.load(folder), logged_steps(folder))


def prepare_text(model_size: str) -> None:
    """Tokenize once, before all hosts would do so at the same time."""
    code = f"""if True:
        import sys; sys.path.insert(0, "examples")
        import train
        cache = train.Path(train.ExampleArguments.cache_dir)
        train.load_corpus(cache, None, train.LLAMAS[{model_size!r}]["vocab_size"])
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def compare(
    hosts: int,
    mbit: float,
    steps: int,
    model_size: str,
    config: Path,
    output_dir: Path,
    timeout: float | None = None,
) -> tuple[Outcome, Outcome]:
    """Do both runs, the uncompressed one first; write plot and JSON to `output_dir`."""
    output_dir = output_dir.resolve()
    output_dir.mkdir(parents=True, exist_ok=True)
    prepare_text(model_size)
    with Lab(hosts, mbit) as lab:
        plain, compressed = (
            train(lab, one.resolve(), output_dir / one.stem, steps, model_size, timeout)
            for one in (UNCOMPRESSED, config)
        )
    draw(plain, compressed, hosts, mbit, output_dir / PLOT)
    figures = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(sys.argv),
        "network": {
            "hosts": hosts,
            "mbit_per_second": mbit,
            "how": "network namespaces, veth, tc htb at both ends",
        },
        "machine": machine(),
        "setup": plain.summary.setup,
        "differences_beside_compression": plain.summary.differences(compressed.summary),
        "step_time_ratio": plain.quartiles[1] / compressed.quartiles[1],
        "bytes_ratio": (
            statistics.fmean(plain.network.sent) / statistics.fmean(compressed.network.sent)
        ),
        "runs": [plain.figures(), compressed.figures()],
    }
    (output_dir / FIGURES).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return plain, compressed


def machine() -> dict[str, Any]:
    """Return what the times depend on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    describe = ["git", "describe", "--always", "--dirty"]
    revision = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads_per_host": int(os.environ.get("OMP_NUM_THREADS", "1")),
        "system": platform.platform(),
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "deepspeed", "transformers")},
        "checkout": revision.stdout.strip() or None,
    }


def side_by_side(plain: Outcome, compressed: Outcome, hosts: int) -> list[list[str]]:
    """Return the rows of the table: label, both runs, ratio; an empty one before the
    next section.
    """
    rows: list[list[str]] = []
    both = (plain, compressed)

    def row(label: str, values: list[float], show: Any, ratio: bool = True) -> None:
        rows.append([label, *map(show, values), f"{values[0] / values[1]:.1f}x" if ratio else ""])

    def milliseconds(seconds: float) -> str:
        return f"{seconds * 1e3:,.0f} ms"

    row("step time, median", [run.quartiles[1] for run in both], milliseconds)
    rows.append(
        [
            "  quartiles",
            *(
                " to ".join(f"{run.quartiles[k] * 1e3:,.0f}" for k in (0, 2)) + " ms"
                for run in both
            ),
            "",
        ]
    )
    row("all steps", [run.clock[-1] for run in both], lambda seconds: f"{seconds:.1f} s")
    rows.append([])
    row("sent per host (kernel)", [statistics.fmean(run.network.sent) for run in both], human_bytes)
    spread = [
        " to ".join(f"{end(run.network.sent) / 1e6:.0f}" for end in (min, max)) + " MB"
        for run in both
    ]
    rows.append(["  least and most", *spread, ""])
    row(f"  {2 * (hosts - 1)}/{hosts} of its count", [run.all_reduced for run in both], human_bytes)
    rows.append([])
    row(
        "loss, last 10 steps",
        [run.summary.last_loss for run in both],
        lambda loss: f"{loss:.3f}",
        ratio=False,
    )
    perplexity = [run.summary.last_perplexity or float("nan") for run in both]
    row("held-out perplexity", perplexity, lambda value: f"{value:,.0f}", ratio=False)
    return rows


def titles(plain: Outcome, compressed: Outcome, hosts: int, mbit: float) -> tuple[str, str]:
    """Return what was run, and why some of its steps may be long."""
    title = (
        f"{hosts} hosts at {mbit:g} Mbit/s, {plain.summary.setup['model']}, {len(plain.steps)}"
        " steps"
    )
    caption = ""
    section = compressed.summary.compressor or {}
    if (
        compressed.summary.restarts
        and section.get("restart") == "svd"
        and not section.get("stagger")
    ):
        every = section.get("restart_every", 200)
        caption = (
            f"The first step and then every {every}th restarts, and sends what an uncompressed step"
            " does."
        )
    return title, caption


def table(plain: Outcome, compressed: Outcome, hosts: int, mbit: float) -> Table:
    """Return a table of the two runs side by side."""
    title, caption = titles(plain, compressed, hosts, mbit)
    result = Table(title=title, caption=caption or None)
    for heading in ("", plain.summary.name, compressed.summary.name, "ratio"):
        result.add_column(heading, justify="right" if heading else "left")
    for row in side_by_side(plain, compressed, hosts):
        result.add_row(*row) if row else result.add_section()
    return result


def page(plain: Outcome, compressed: Outcome, hosts: int, mbit: float) -> str:
    """Return the same as a page, with the command and the machine."""
    title, caption = titles(plain, compressed, hosts, mbit)
    here, what = Path(__file__).resolve(), machine()
    command = shlex.join(["python", here.relative_to(ROOT).as_posix(), *sys.argv[1:]])
    load = ", ".join(f"{run.load[0]:.1f}" for run in (plain, compressed))
    lines = [
        "# Four hosts on slow links\n" if hosts == 4 else f"# {hosts} hosts on slow links\n",
        (
            f"`{command}` on {what['cpu']}, {what['cores']} cores that all hosts share,"
            f" {what['threads_per_host']} thread(s) a host, torch {what['torch']}, deepspeed"
            f" {what['deepspeed']}, {datetime.now(UTC).date().isoformat()}. Load of the machine"
            f" before each run: {load}. One run of each; the kernel holds the links to their rate"
            " and counts the bytes.\n"
        ),
        f"{title}. {caption}\n",
        f"| | {plain.summary.name} | {compressed.summary.name} | ratio |",
        "| --- | ---: | ---: | ---: |",
        *(
            f"| {' | '.join(cell.strip() for cell in row)} |"
            for row in side_by_side(plain, compressed, hosts)
            if row
        ),
    ]
    return "\n".join(lines) + "\n"


def draw(plain: Outcome, compressed: Outcome, hosts: int, mbit: float, target: Path) -> None:
    """Draw both runs' loss over the seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    for run, colour in ((plain, "tab:orange"), (compressed, "tab:blue")):
        clock, loss = run.clock, [step["loss"] for step in run.steps]
        means = smoothed(loss, SMOOTHING)
        axes.plot(clock, loss, color=colour, alpha=0.3, linewidth=0.8)
        label = f"{run.summary.name}: {run.quartiles[1] * 1e3:,.0f} ms a step (median)"
        axes.plot(clock, means, color=colour, linewidth=2, marker="o", markevery=[-1], label=label)
        axes.annotate(
            f"{len(loss)} steps: {clock[-1]:.0f} s",
            (clock[-1], means[-1]),
            xytext=(0, -16),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of training, evaluation and start left out")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title(
        f"Loss against time: {hosts} hosts, {mbit:g} Mbit/s\n{plain.summary.setup['model']},"
        f" {len(plain.steps)} steps each"
    )
    axes.grid(True, alpha=0.2)
    axes.legend(title=f"thin: each step; thick: mean of {2 * SMOOTHING + 1}", frameon=False)
    figure.savefig(target, dpi=150)
    pyplot.close(figure)


def main(
    hosts: Annotated[int, typer.Option(help="Hosts, one worker process on each.")] = 4,
    mbit: Annotated[
        float, typer.Option(help="Mbit/s of each host's link, in either direction.")
    ] = 100.0,
    steps: Annotated[int, typer.Option(help="Optimizer steps of each run.", min=6)] = 60,
    model_size: Annotated[
        str, typer.Option(help="S, M or L: 1, 5 or 12 million parameters.")
    ] = "S",
    config: Annotated[
        Path, typer.Option(help="DeepSpeed JSON of the compressed run.", exists=True)
    ] = COMPRESSED,
    output_dir: Annotated[Path, typer.Option(help="Where runs, plot and figures go.")] = Path(
        "runs/demo_cluster"
    ),
    markdown: Annotated[
        Path | None, typer.Option(help="Also write the table to this file, as a page.")
    ] = None,
) -> None:
    """Compare the uncompressed and the compressed run by the clock, over slow links."""
    exit_on_sigterm()
    reason = missing()
    if reason is not None:
        sys.exit(f"demo_cluster: {reason}")
    began = time.monotonic()
    try:
        plain, compressed = compare(hosts, mbit, steps, model_size, config, output_dir)
    except LabError as problem:
        sys.exit(f"demo_cluster: {problem}")
    console = Console()
    console.print(table(plain, compressed, hosts, mbit))
    for difference in plain.summary.differences(compressed.summary):
        console.print(f"[yellow]The runs differ in more than compression: {difference}[/yellow]")
    if markdown is not None:
        markdown.write_text(page(plain, compressed, hosts, mbit), encoding="utf-8")
    console.print(
        f"loss against time: {output_dir / PLOT}\nall figures: {output_dir / FIGURES}",
        soft_wrap=True,
    )
    console.print(f"{time.monotonic() - began:.0f} s in all")


if __name__ == "__main__":
    typer.run(main)
