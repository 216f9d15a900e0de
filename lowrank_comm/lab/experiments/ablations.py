"""Ablations: one setting at a time, on a small network that learns from a teacher
(`teacher`); and how error memories drift (`drift`).

A group is a question with its variants, each a section; the first is what the others
are compared with. Every variant is trained with each learning rate of the grid. The
rate is chosen by the final loss of the tuning seed, which is then left out; the others
are reported at that rate. Variants share their seeds: data, start and noise are the
same, so differences are taken seed by seed (`comparison`), and one inside its 95 %
interval is called so.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from pydantic import Field, field_validator

from lowrank_comm.lab.experiment import Case, Experiment, LabSettings, Progress, Row
from lowrank_comm.lab.experiments.comparison import Spread, table
from lowrank_comm.lab.experiments.methods import SectionOf, names_differ
from lowrank_comm.lab.problems import drift as drift
from lowrank_comm.lab.problems import teacher as teacher
from lowrank_comm.lab.training.averaging import silent

_TRAINED: dict[str, dict[str, Any]] = {}
"""What this process has trained already, by all that it depends on."""


class Variant(SectionOf):
    """momentum: of the base optimizer, if not the problem's."""

    momentum: float | None = None


class Group(LabSettings):
    """A question: what is varied, and the variants; the first is the reference."""

    name: str
    question: str
    variants: list[Variant] = Field(min_length=2)

    @field_validator("variants")
    @classmethod
    def _names_differ(cls, variants: list[Variant]) -> list[Variant]:
        names_differ(variants)
        return variants


class Memory(SectionOf):
    """averaged: use the control that keeps the averaged residual."""

    averaged: bool = False


class Drift(LabSettings):
    """gradients: (heterogeneity, noise). Others: see `drift`."""

    memories: list[Memory]
    gradients: tuple[tuple[float, float], ...] = ((0.0, 0.5), (0.2, 0.5), (0.2, 0.05))
    workers: int = 4
    m: int = 32
    n: int = 24
    checkpoints: tuple[int, ...] = (100, 1000, 3000)
    seeds: tuple[int, ...] = (0, 1, 2)


class AblationSettings(LabSettings):
    """The problem, the seeds, the grid of learning rates, the groups, and the drift."""

    problem: teacher.TeacherProblem = teacher.TeacherProblem()
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seed: int = 100
    rates: tuple[float, ...] = (0.1, 0.3, 1.0)
    groups: list[Group]
    drift: Drift

    @field_validator("groups")
    @classmethod
    def _names_differ(cls, groups: list[Group]) -> list[Group]:
        if len({group.name for group in groups}) < len(groups):
            raise ValueError("two groups have one name")
        return groups


class Ablations(Experiment):
    """See the module's text."""

    name: ClassVar[str] = "ablations"
    title: ClassVar[str] = "Ablations: one setting at a time"
    Settings: ClassVar[type[AblationSettings]] = AblationSettings

    def cases(self, settings: AblationSettings) -> list[Case]:
        """One for each variant, and one for each memory."""
        cases = [
            Case(f"{group.name}/{variant.name}", {"group": group.name, "variant": variant.name})
            for group in settings.groups
            for variant in group.variants
        ]
        return cases + [
            Case(f"drift/{memory.name}", {"memory": memory.name})
            for memory in settings.drift.memories
        ]

    def depends_on(self, settings: AblationSettings, case: Case) -> Any:
        """The problem and the case's own section."""
        if "memory" in case.params:
            common = settings.drift.model_dump(mode="json", exclude={"memories"})
            return common | {"memory": _memory(settings, case).model_dump(mode="json")}
        common = settings.model_dump(mode="json", exclude={"groups", "drift"})
        return common | {"variant": _variant(settings, case).model_dump(mode="json")}

    def run(self, settings: AblationSettings, case: Case, progress: Progress) -> dict[str, Any]:
        """Losses by rate and seed, or how far memories have parted."""
        if "memory" in case.params:
            memory, kept = _memory(settings, case), settings.drift
            found = drift.measure(
                memory.section,
                averaged=memory.averaged,
                gradients=kept.gradients,
                workers=kept.workers,
                shape=(kept.m, kept.n),
                checkpoints=kept.checkpoints,
                seeds=kept.seeds,
                progress=progress,
            )
            return {"gradients": found}
        return _trained(settings, _variant(settings, case), progress)

    def figures(self, settings: AblationSettings, rows: Sequence[Row]) -> dict[str, Figure]:
        """Final losses by group, and the drift."""
        return {"losses": _draw_losses(settings, rows), "drift": _draw_drift(settings, rows)}

    def page(self, settings: AblationSettings, rows: Sequence[Row]) -> str:
        """A table for each group, and the drift."""
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


def _variant(settings: AblationSettings, case: Case) -> Variant:
    group = next(group for group in settings.groups if group.name == case.params["group"])
    return next(variant for variant in group.variants if variant.name == case.params["variant"])


def _memory(settings: AblationSettings, case: Case) -> Memory:
    return next(
        memory for memory in settings.drift.memories if memory.name == case.params["memory"]
    )


def _trained(settings: AblationSettings, variant: Variant, progress: Progress) -> dict[str, Any]:
    """Final loss by rate and seed, the tuned rate, and elements by step."""
    seeds = [settings.tuning_seed, *settings.seeds]
    pairs = [(seed, rate) for rate in settings.rates for seed in seeds]
    momentum = settings.problem.momentum if variant.momentum is None else variant.momentum
    done = _training(settings.problem, variant.section, pairs, momentum, progress)
    traffic = done
    if variant.section.get("stagger"):
        # Restarts are spread over all matrices there are, copies too; the peak of one
        # network is that of a copy alone.
        short = settings.problem.model_copy(update={"steps": 2 * variant.section["restart_every"]})
        traffic = _training(short, variant.section, pairs[:1], momentum, silent)
    finals = dict(zip(pairs, done["final"], strict=True))
    tuned = min(settings.rates, key=lambda rate: finals[settings.tuning_seed, rate])
    return {
        "rate": tuned,
        "final": {str(seed): finals[seed, tuned] for seed in settings.seeds},
        "by_rate": {
            f"{rate:g}": {str(seed): finals[seed, rate] for seed in seeds}
            for rate in settings.rates
        },
        "elements": done["elements"],
        "peak_elements": traffic["peak_elements"],
    }


def _training(
    problem: teacher.TeacherProblem,
    section: dict[str, Any],
    pairs: list[tuple[int, float]],
    momentum: float,
    progress: Progress,
) -> dict[str, Any]:
    """`teacher.train`, once for the same arguments: several groups have the same
    reference.
    """
    key = json.dumps([problem.model_dump(), section, pairs, momentum], sort_keys=True)
    if key not in _TRAINED:
        _TRAINED[key] = teacher.train(problem, section, pairs, momentum, progress)
    return _TRAINED[key]


def _finals(rows: Sequence[Row], group: str, variant: str) -> tuple[Row | None, dict[int, float]]:
    """The row, and seed -> final loss of those that did not diverge."""
    for row in rows:
        if row["params"].get("group") == group and row["params"]["variant"] == variant:
            return row, {
                int(seed): loss for seed, loss in row["result"]["final"].items() if loss is not None
            }
    return None, {}


def _twins(settings: AblationSettings) -> Iterator[tuple[Group, Variant, Variant]]:
    """Variants that differ in `consensus_restart` alone: one algorithm in exact
    arithmetic.
    """
    for group in settings.groups:
        plain = [
            (variant, variant.section | {"consensus_restart": False}) for variant in group.variants
        ]
        for (one, section), (other, same) in itertools.combinations(plain, 2):
            if section == same and one.momentum == other.momentum:
                yield group, one, other


def _floor(settings: AblationSettings, rows: Sequence[Row]) -> float:
    """The largest relative difference of a seed between twins; 0 without any."""
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
    """The ratio to the reference with its verdict; floor: what round-off alone makes of
    it.
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
    """Memory -> what was measured with these gradients."""
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
