"""What a finished run tells: one table, one plot. Also a command: `python
examples/report.py RUN [UNCOMPRESSED_RUN]`.

A run leaves `log.jsonl` (a line a step) and `summary.json` in its folder; nothing else
is needed to show it again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lowrank_comm.reduction.plan import human_bytes

LOG = "log.jsonl"
SUMMARY = "summary.json"
PLOT = "loss_vs_bytes.png"
# The order in which kinds of bytes are shown; further ones follow.
KINDS = [
    "all-reduce",
    "factors",
    "restart",
    "broadcast",
    "dense",
    "control",
    "fingerprint",
    "consolidation",
]
ABSENT = "–"
# Losses of single steps are noisy: the table's last loss is the mean of this many
# steps, the plot's curves of one more.
WINDOW = 10


@dataclass
class Summary:
    """One run's figures. Bytes are what one worker hands to collectives for its
    gradients, and for its error memory at checkpoints, over the whole run. A loss is
    the mean over the steps that its `_steps` counts.
    """

    name: str
    # what must be equal for two runs to be compared: model, text, batch, steps, …
    setup: dict[str, Any]
    steps: int
    first_loss: float
    first_loss_steps: int
    last_loss: float
    last_loss_steps: int
    first_perplexity: float | None
    last_perplexity: float | None
    bytes: dict[str, int]
    uncompressed_bytes: int
    step_seconds: float
    # the lowrank_comm section; None: an uncompressed run
    compressor: dict[str, Any] | None = None
    collectives: int | None = None
    restarts: int | None = None
    captured_energy: float | None = None
    # seconds a step
    phases: dict[str, float] = field(default_factory=dict)

    @property
    def total_bytes(self) -> int:
        """Bytes of all kinds."""
        return sum(self.bytes.values())

    @property
    def ratio(self) -> float:
        """How many times fewer bytes than the uncompressed all-reduce."""
        return self.uncompressed_bytes / self.total_bytes

    def save(self, folder: Path) -> None:
        """Write `summary.json`."""
        (folder / SUMMARY).write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Summary:
        """Read `summary.json` of a finished run."""
        file = folder / SUMMARY
        if not file.is_file():
            raise FileNotFoundError(
                f"{folder} is not a finished run of examples/train.py: it has no {SUMMARY}"
            )
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def differences(self, other: Summary) -> list[str]:
        """What is not the same in the two runs beside the compression."""
        keys = self.setup.keys() | other.setup.keys()
        return [
            f"{key} {self.setup.get(key)} against {other.setup.get(key)}"
            for key in sorted(keys)
            if self.setup.get(key) != other.setup.get(key)
        ]


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The lines of `log.jsonl`: one a logged step (it has a loss) and one an evaluation
    (it has a perplexity).
    """
    text = (folder / LOG).read_text(encoding="utf-8")
    # a job that was killed may have left half a line
    whole = text[: text.rfind("\n") + 1]
    return [json.loads(line) for line in whole.splitlines()]


def logged_steps(folder: Path) -> list[dict[str, Any]]:
    """Only the lines of steps."""
    return [line for line in read_log(folder) if "loss" in line]


def table(runs: Sequence[Summary]) -> Table:
    """The runs side by side."""
    result = Table(title="Training, and what it sent", title_style="bold", row_styles=["", "dim"])
    result.add_column("")
    for run in runs:
        result.add_column(run.name, justify="right")

    def row(label: str, show: Callable[[Summary], str | None]) -> None:
        result.add_row(label, *(show(run) or ABSENT for run in runs))

    def number(value: float | None, form: str) -> str | None:
        return None if value is None else format(value, form)

    row("optimizer steps, workers", lambda run: f"{run.steps}, {run.setup['workers']}")
    first, last = (
        max(getattr(run, f"{end}_loss_steps") for run in runs) for end in ("first", "last")
    )
    row(
        "training loss, first step" if first == 1 else f"training loss, first {first} steps",
        lambda run: number(run.first_loss, ".3f"),
    )
    row(f"training loss, last {last} steps", lambda run: number(run.last_loss, ".3f"))
    row("held-out perplexity, start", lambda run: number(run.first_perplexity, ",.1f"))
    row("held-out perplexity, end", lambda run: number(run.last_perplexity, ",.1f"))
    result.add_section()
    found = {kind for run in runs for kind in run.bytes}
    for kind in sorted(
        found, key=lambda kind: (KINDS.index(kind) if kind in KINDS else len(KINDS), kind)
    ):
        row(
            f"sent per worker: {kind}",
            lambda run, kind=kind: human_bytes(run.bytes[kind]) if kind in run.bytes else None,
        )
    row("sent per worker, all", lambda run: human_bytes(run.total_bytes))
    row("an uncompressed all-reduce", lambda run: human_bytes(run.uncompressed_bytes))
    row("ratio", lambda run: f"{run.ratio:.1f}x")
    row("collectives", lambda run: number(run.collectives, ","))
    result.add_section()
    if any(run.compressor is not None for run in runs):
        row("restarts, all matrices", lambda run: number(run.restarts, ","))
        row("captured energy, mean*", lambda run: number(run.captured_energy, ".1%"))
        result.add_section()
    row("time per step", lambda run: f"{run.step_seconds * 1e3:.1f} ms")
    for phase in dict.fromkeys(phase for run in runs for phase in run.phases):
        row(
            f"  {phase}",
            lambda run, phase=phase: (
                f"{run.phases[phase] * 1e3:.1f} ms" if phase in run.phases else None
            ),
        )
    row(
        "  forward, backward, optimizer",
        lambda run: (
            f"{(run.step_seconds - sum(run.phases.values())) * 1e3:.1f} ms" if run.phases else None
        ),
    )
    if any(run.captured_energy is not None for run in runs):
        result.caption = (
            "* of each step's gradient plus error memory on one worker, the share that was sent"
        )
    return result


def smoothed(values: Sequence[float], reach: int) -> list[float]:
    """The mean of each value and the up to `reach` before and after it."""
    return [statistics.fmean(values[max(0, k - reach) : k + reach + 1]) for k in range(len(values))]


def plot(run: Path, other: Path | None) -> Path:
    """Draw the training loss over the bytes sent so far, of one run or of two; returns
    the picture's path.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import EngFormatter, NullFormatter

    figure, axes = pyplot.subplots(figsize=(8, 5), constrained_layout=True)
    summary = Summary.load(run)
    for folder, colour in ((run, "tab:blue"), (other, "tab:orange")):
        if folder is None:
            continue
        shown, lines = Summary.load(folder), logged_steps(folder)
        sent, loss = [line["bytes_total"] for line in lines], [line["loss"] for line in lines]
        axes.plot(sent, loss, color=colour, alpha=0.25, linewidth=0.8)
        label = f"{shown.name}: {human_bytes(shown.total_bytes)}"
        # The end marker is where the legend says: checkpoints send after the last step,
        # too.
        thick = [*sent, shown.total_bytes], [*(means := smoothed(loss, WINDOW // 2)), means[-1]]
        axes.plot(*thick, color=colour, linewidth=1.8, marker="o", markevery=[-1], label=label)
    if other is None and summary.compressor is not None:
        label = f"{summary.steps} uncompressed steps: {human_bytes(summary.uncompressed_bytes)}"
        axes.axvline(
            summary.uncompressed_bytes, color="tab:gray", linestyle="--", linewidth=1, label=label
        )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("gradient bytes sent per worker (logarithmic)")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title(
        f"Loss against communication\n{summary.setup['model']}, {summary.steps} steps,"
        f" {summary.setup['workers']} workers"
    )
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(title=f"thin: each step; thick: mean of {WINDOW + 1}", frameon=False)
    target = run / PLOT
    figure.savefig(target, dpi=150)
    pyplot.close(figure)
    return target


def show(run: Path, other: Path | None = None) -> None:
    """Print the table of a run, beside another one's if given, and draw the plot."""
    console = Console()
    runs = [Summary.load(folder) for folder in (run, other) if folder is not None]
    console.print(table(runs))
    for difference in runs[0].differences(runs[1]) if len(runs) == 2 else ():
        console.print(f"[yellow]The runs differ in more than compression: {difference}[/yellow]")
    console.print(f"loss against bytes: {plot(run, other)}", soft_wrap=True)


def main() -> None:
    """Show finished runs again."""
    parser = argparse.ArgumentParser(
        description=(
            "Table and plot of finished runs of examples/train.py; draws RUN/loss_vs_bytes.png"
            " anew."
        )
    )
    parser.add_argument("run", type=Path, help="output_dir of a run")
    parser.add_argument(
        "other", type=Path, nargs="?", help="output_dir of the run to set beside it"
    )
    given = parser.parse_args()
    try:
        show(given.run, given.other)
    except FileNotFoundError as problem:
        parser.error(str(problem))


if __name__ == "__main__":
    main()
