"""The page and figures of `ablations`, computed from its rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from lowrank_comm.lab.experiment import Row
from lowrank_comm.lab.experiments.comparison import Spread, table

if TYPE_CHECKING:
    from lowrank_comm.lab.experiments.ablations import AblationSettings, Group, Variant


def page(settings: AblationSettings, rows: Sequence[Row]) -> str:
    p = settings.problem
    comparisons = sum(len(group.variants) - 1 for group in settings.groups)
    about = (
        f"A student {p.inputs}-{p.hidden}-{p.outputs} learns from a noisy teacher of the same"
        f" shape: N = {p.workers}, {p.batch} samples a worker and step, {p.steps} steps of"
        " momentum SGD, inputs of each worker around a centre of its own. Held-out loss over"
        f" the last tenth of the steps, mean ± standard deviation over {len(settings.seeds)}"
        f" seeds, at the rate of {', '.join(f'{rate:g}' for rate in settings.rates)} that is"
        " best on another seed (* the least or the largest of them). `against the first`:"
        " geometric mean of the ratios seed by seed; inside the spread where its 95 % interval"
        " holds 1. Where the rates differ, the coarse grid is a part of the difference."
        f" {_floor_text(settings, rows)}Of {comparisons} such intervals about"
        f" {0.05 * comparisons:.0f} would miss it by chance. Elements are what one worker sends"
        f" in a step for both matrices ({p.hidden * p.inputs + p.outputs * p.hidden}"
        " uncompressed); peak: the most in one step after the first.\n\n![Final loss by"
        " variant](losses.png)"
    )
    floor = _floor(settings, rows)
    groups = [
        text for group in settings.groups if (text := _group_text(settings, group, rows, floor))
    ]
    return "\n\n".join([about, *groups, _drift_text(settings, rows)])


def figures(settings: AblationSettings, rows: Sequence[Row]) -> dict[str, Figure]:
    """Return file stem -> figure: final losses by group, and the drift."""
    return {"losses": _draw_losses(settings, rows), "drift": _draw_drift(settings, rows)}


def _finals(rows: Sequence[Row], group: str, variant: str) -> tuple[Row | None, dict[int, float]]:
    """Return the row, and seed -> final loss of those that did not diverge."""
    for row in rows:
        if row["params"].get("group") == group and row["params"]["variant"] == variant:
            return row, {
                int(seed): loss for seed, loss in row["result"]["final"].items() if loss is not None
            }
    return None, {}


def _twins(settings: AblationSettings) -> Iterator[tuple[Group, Variant, Variant]]:
    """Return the variants that differ in `consensus_restart` alone: they are one
    algorithm in exact arithmetic.
    """
    for group in settings.groups:
        plain = [
            (variant, variant.section | {"consensus_restart": False}) for variant in group.variants
        ]
        for (one, section), (other, same) in itertools.combinations(plain, 2):
            if section == same and one.momentum == other.momentum:
                yield group, one, other


def _floor(settings: AblationSettings, rows: Sequence[Row]) -> float:
    """Return the largest relative difference of a seed between twins; 0 without any."""
    found = [0.0]
    for group, *pair in _twins(settings):
        (_, one), (_, other) = (_finals(rows, group.name, variant.name) for variant in pair)
        found += [abs(one[seed] / other[seed] - 1) for seed in one if seed in other]
    return max(found)


def _floor_text(settings: AblationSettings, rows: Sequence[Row]) -> str:
    names = [f"{one.name} and {other.name}" for _, one, other in _twins(settings)]
    if not names:
        return ""
    return (
        f"{'; '.join(names)} are one algorithm in exact arithmetic, since only the mean error"
        f" counts, and differ by up to {100 * _floor(settings, rows):.1f} % in a seed: that is what"
        " round-off grows to, and a mean ratio nearer to 1 than that is called so, whatever its"
        " interval says. "
    )


def _group_text(settings: AblationSettings, group: Group, rows: Sequence[Row], floor: float) -> str:
    reference = _finals(rows, group.name, group.variants[0].name)[1]
    lines = []
    for variant in group.variants:
        row, finals = _finals(rows, group.name, variant.name)
        if row is None:
            continue
        spread, diverged = Spread.of(list(finals.values())), len(settings.seeds) - len(finals)
        loss = (spread.text(4) if spread else "") + (
            f" ({diverged} of {len(settings.seeds)} diverged)" if diverged else ""
        )
        result = row["result"]
        counts = [f"{result['elements']:.0f}", f"{result['peak_elements']:.0f}"]
        edge = "*" if result["rate"] in (min(settings.rates), max(settings.rates)) else ""
        lines.append(
            [
                variant.name,
                f"{result['rate']:g}{edge}",
                loss,
                _against(finals, reference, floor),
                *counts,
            ]
        )
    if not lines:
        return ""
    heads = ["variant", "rate", "final loss", "against the first", "elements a step", "peak"]
    return f"## {group.question}\n\n" + table(heads, lines)


def _against(finals: dict[int, float], reference: dict[int, float], floor: float) -> str:
    """Return the ratio to the reference with its verdict. `floor` is the difference
    that round-off alone makes.
    """
    if finals == reference:
        return "equal" if finals else ""
    # Logarithms, so that a variant against another is the inverse of the other against
    # it.
    found = Spread.of(
        [math.log(finals[seed] / reference[seed]) for seed in finals if seed in reference]
    )
    if found is None or found.half_width is None:
        return ""
    low, high = math.exp(found.mean - found.half_width), math.exp(found.mean + found.half_width)
    word = {0: "inside the spread", 1: "worse", -1: "better"}[found.sign or 0]
    if found.sign and abs(math.exp(found.mean) - 1) <= floor:
        word = "no more than round-off"
    return f"{math.exp(found.mean):.3f} ({low:.3f} to {high:.3f}), {word}"


def _draw_losses(settings: AblationSettings, rows: Sequence[Row]) -> Figure:
    groups = [
        group
        for group in settings.groups
        if any(row["params"].get("group") == group.name for row in rows)
    ]
    sizes = [len(group.variants) for group in groups] or [1]
    figure = Figure(figsize=(8, 0.3 * sum(sizes) + 0.45 * len(sizes) + 1), layout="constrained")
    panels = figure.subplots(len(sizes), 1, sharex=True, squeeze=False, height_ratios=sizes)[:, 0]
    for panel, group in zip(panels, groups, strict=False):
        for place, variant in enumerate(group.variants):
            losses = list(_finals(rows, group.name, variant.name)[1].values())
            spread = Spread.of(losses)
            if spread is not None:
                panel.plot(losses, [place] * len(losses), "o", color="C7", markersize=3, alpha=0.7)
                panel.plot(
                    [spread.mean], [place], "D", color="C3" if place == 0 else "C0", markersize=6
                )
        panel.set_yticks(
            range(len(group.variants)), [variant.name for variant in group.variants], fontsize=8
        )
        panel.set_ylim(len(group.variants) - 0.4, -0.6)
        panel.set_title(group.name, fontsize=9, loc="left")
        panel.grid(alpha=0.3, axis="x", which="both")
    panels[-1].set(
        xscale="log", xlabel="final held-out loss: seeds (grey), mean (red: the reference)"
    )
    for choose in (panels[-1].xaxis.set_major_formatter, panels[-1].xaxis.set_minor_formatter):
        choose(ScalarFormatter())
    return figure


def _drift_of(rows: Sequence[Row], kind: int) -> dict[str, dict[str, Any]]:
    """Return memory -> what was measured with these gradients."""
    return {
        row["params"]["memory"]: row["result"]["gradients"][kind]
        for row in rows
        if "memory" in row["params"]
    }


def _draw_drift(settings: AblationSettings, rows: Sequence[Row]) -> Figure:
    gradients = settings.drift.gradients
    figure = Figure(figsize=(4.2 * len(gradients), 4.4), layout="constrained")
    panels = figure.subplots(1, len(gradients), sharey=True, squeeze=False)[0]
    for kind, (panel, (heterogeneity, noise)) in enumerate(zip(panels, gradients, strict=True)):
        for memory, found in _drift_of(rows, kind).items():
            steps, style = [int(t) for t in found["deviation"]], "--" if "bf16" in memory else "-"
            panel.loglog(
                steps,
                list(found["deviation"].values()),
                style,
                marker="o",
                markersize=3,
                label=memory,
            )
        panel.set(title=f"heterogeneity {heterogeneity:g}, noise {noise:g}", xlabel="step")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("rms of ||e_i - mean e|| over workers")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8
    )
    return figure


def _drift_text(settings: AblationSettings, rows: Sequence[Row]) -> str:
    kept = settings.drift
    lines = []
    for kind, (heterogeneity, noise) in enumerate(kept.gradients):
        for memory, result in _drift_of(rows, kind).items():
            lines.append(
                [f"{heterogeneity:g}, {noise:g}", memory]
                + [f"{result['deviation'][str(t)]:.4g}" for t in kept.checkpoints]
                + [f"{result['mean_error'][str(kept.checkpoints[-1])]:.3g}"]
                + [f"{result['lost'][str(kept.checkpoints[-1])]:.1e}"]
            )
    heads = [
        "heterogeneity, noise",
        "memory",
        *(f"t = {t}" for t in kept.checkpoints),
        "‖mean e‖",
        "lost / given",
    ]
    return (
        f"## Do the workers' error memories part, and does 16 bits suffice?\n\nN = {kept.workers},"
        f" {kept.m} x {kept.n}, {len(kept.seeds)} seeds, float32. A worker's gradient is C_t +"
        " heterogeneity H_i + noise xi: C_t common to all and falling like 1 / sqrt(1 + t / 100),"
        " H_i a matrix of its own, the same in every step (the H_i sum to zero), xi anew in every"
        " step; entries of H_i and xi are standard normal. Root mean square of ‖d_i‖, d_i = e_i"
        " minus its mean over the workers; then the mean error's norm, and what is neither sent"
        " nor kept, over the sum of what was given, both at the end. The averaged residual is a"
        " control, which the library does not offer.\n\n![Deviation of the error memories against"
        " step](drift.png)\n\n" + table(heads, lines)
    )
