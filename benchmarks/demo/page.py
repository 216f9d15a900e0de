"""The section of `benchmarks.demo_cluster`: seconds to a loss on each network."""

from __future__ import annotations

import itertools
from typing import Any

from matplotlib.figure import Figure

from benchmarks.demo.crossing import trailing_means
from benchmarks.page.tables import digits, table

COLOURS = {"uncompressed": "tab:orange", "fp16": "tab:green", "balanced": "tab:blue"}


def section(evidence: dict[str, Any]) -> str:
    """Return the section of a run's JSON file."""
    results = evidence["results"]
    parts = ["## Seconds to a common loss\n", _about(results)]
    for network, found in results["networks"].items():
        parts += [f"### {found['label']}\n", _table(results, found)]
        parts.append(f"![loss against seconds, {found['label']}]({network}.png)\n")
    return "\n".join([*parts, _same(results), _commands(results)])


def _about(results: dict[str, Any]) -> str:
    job, k = results["job"], results["window"]
    setup = next(iter(results["networks"].values()))["runs"]["uncompressed"]["setup"]
    steps = ", ".join(f"{one['label']} {one['steps']}" for one in results["runs"].values())
    whole = sum(
        run["whole_seconds"]
        for found in results["networks"].values()
        for run in found["runs"].values()
    )
    about = (
        f"{results['hosts']} hosts (network namespaces; the kernel holds their links to the"
        f" rate and counts the bytes), one process each: {setup['model']}, {job['batch']} x"
        f" {job['sequence']} tokens a host and step, {setup['optimizer']}, {setup['schedule']}"
        f" up to {job['learning_rate']:g}, clipping at {setup['clipping']:g}. Every run is"
        " whole and was trained on the link that its table names; no curve is computed from"
        f" another's steps. One run of each, one seed ({job['seed']}): the seconds of a step"
        " are many measurements, the step of the crossing is one."
    )
    rule = (
        f"The target is the uncompressed run's loss at its end, the mean of its last {k}"
        f" steps. A run has come to it at the first step, from step {k} on, at which the mean"
        f" of its last {k} steps is at most that. Rule and schedules were fixed before the"
        f" runs: each has a learning-rate schedule over steps of its own ({steps}), a"
        " compressed one longer, as it may need more steps. Seconds are those of rank 0's"
        " steps from the first one on, forward pass to optimizer step, steps of a warm-up"
        " included; start and evaluation are not. All hosts compute on the same"
        f" {results['cores']} cores, so a step has more computation in it than on machines of"
        " their own, which makes compression look worse than it is. All runs together took"
        f" {whole / 60:.0f} minutes."
    )
    return f"{about}\n\n{rule}\n"


def _table(results: dict[str, Any], found: dict[str, Any]) -> str:
    runs = found["runs"]
    heads = ["", *(results["runs"][name]["label"] for name in runs)]

    def row(label: str, cell: Any) -> list[str]:
        return [label, *(cell(run) for run in runs.values())]

    def of_step(run: dict[str, Any]) -> str:
        step = run["step_seconds"]
        return f"{digits(step['median'])} ({digits(step['low'])}-{digits(step['high'])})"

    def crossed(key: str, show: Any) -> Any:
        return lambda run: "not reached" if run["crossing"] is None else show(run["crossing"][key])

    k = results["window"]
    rows = [
        row("steps of the schedule", lambda run: str(run["steps"])),
        row("seconds of a step, median (quartiles)", of_step),
        row(f"loss at the end, mean of {k} steps", lambda run: f"{run['final_loss']:.3f}"),
        row(f"step at which it is at {found['target']:.3f}", crossed("step", str)),
        row("**seconds to it**", crossed("seconds", digits)),
        row("times as fast", crossed("times_as_fast", lambda ratio: f"{ratio:.2f}")),
        row("held-out perplexity at the end", lambda run: digits(run["held_out_perplexity"])),
        row("MB sent by a host, whole run (kernel)", lambda run: digits(run["sent_mb"])),
        row("MB sent by a host and step", lambda run: digits(run["sent_mb_per_step"])),
    ]
    return table(heads, rows)


def _same(results: dict[str, Any]) -> str:
    differences = results["difference_between_networks"]
    if not differences:
        return ""
    told = ", ".join(
        f"{results['runs'][name]['label']} {value:g}" for name, value in differences.items()
    )
    return (
        "The link should change the time of a step and not its loss. The largest difference of a"
        f" step's loss between the networks: {told}.\n"
    )


def _commands(results: dict[str, Any]) -> str:
    first = next(iter(results["networks"].values()))["runs"]
    lines = [f"    {run['command']}" for run in first.values()]
    return "What every host runs:\n\n" + "\n".join(lines) + "\n"


def figures(evidence: dict[str, Any]) -> dict[str, Figure]:
    """Return network -> plot of the loss over seconds."""
    results = evidence["results"]
    return {network: _plot(results, found) for network, found in results["networks"].items()}


def _plot(results: dict[str, Any], found: dict[str, Any]) -> Figure:
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, k = figure.subplots(), results["window"]
    for name, run in found["runs"].items():
        clock, colour = list(itertools.accumulate(run["seconds"])), COLOURS.get(name)
        axes.plot(clock, run["loss"], color=colour, alpha=0.15, linewidth=0.6)
        label, crossing = results["runs"][name]["label"], run["crossing"]
        label += ": not reached" if crossing is None else f": {crossing['seconds']:.0f} s"
        axes.plot(clock[k - 1 :], trailing_means(run["loss"], k), color=colour, label=label)
        if crossing is not None:
            axes.plot([crossing["seconds"]], [found["target"]], "o", color=colour)
    axes.axhline(found["target"], color="tab:gray", linestyle="--", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel("seconds of training (logarithmic), evaluation and start left out")
    axes.set_ylabel("training loss (nats per token)")
    axes.set_title(f"Loss against time: {results['hosts']} hosts, {found['label']}")
    axes.grid(True, which="both", alpha=0.2)
    axes.legend(title=f"thick: mean of the last {k} steps", frameon=False)
    return figure
