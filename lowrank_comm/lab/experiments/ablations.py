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

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field, field_validator

from lowrank_comm.lab.experiment import Case, Experiment, LabSettings, Progress, Row
from lowrank_comm.lab.experiments import ablations_page as pages
from lowrank_comm.lab.experiments.methods import SectionOf, names_differ
from lowrank_comm.lab.problems import drift, teacher
from lowrank_comm.lab.training.averaging import silent

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRAINED: dict[str, dict[str, Any]] = {}
"""What this process has trained already, by all that it depends on."""


class Variant(SectionOf):
    """A variant of a group.

    Attributes:
        momentum: of the base optimizer, if not the problem's.
    """

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
    """A form of the error memory.

    Attributes:
        averaged: use the control that keeps the averaged residual.
    """

    averaged: bool = False


class Drift(LabSettings):
    """How the drift of error memories is measured; see `drift`.

    Attributes:
        gradients: (heterogeneity, noise) of each kind.
    """

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
    name: ClassVar[str] = "ablations"
    title: ClassVar[str] = "Ablations: one setting at a time"
    Settings: ClassVar[type[AblationSettings]] = AblationSettings

    def cases(self, settings: AblationSettings) -> list[Case]:
        """Return one case for each variant, and one for each memory."""
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
        """Return the problem and the case's own section."""
        if "memory" in case.params:
            common = settings.drift.model_dump(mode="json", exclude={"memories"})
            return common | {"memory": _memory(settings, case).model_dump(mode="json")}
        common = settings.model_dump(mode="json", exclude={"groups", "drift"})
        return common | {"variant": _variant(settings, case).model_dump(mode="json")}

    def run(self, settings: AblationSettings, case: Case, progress: Progress) -> dict[str, Any]:
        """Return losses by rate and seed, or how far memories have drifted apart."""
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
        """Draw the final losses by group, and the drift."""
        return pages.figures(settings, rows)

    def page(self, settings: AblationSettings, rows: Sequence[Row]) -> str:
        """Write a table for each group, and the drift."""
        return pages.page(settings, rows)


def _variant(settings: AblationSettings, case: Case) -> Variant:
    group = next(group for group in settings.groups if group.name == case.params["group"])
    return next(variant for variant in group.variants if variant.name == case.params["variant"])


def _memory(settings: AblationSettings, case: Case) -> Memory:
    return next(
        memory for memory in settings.drift.memories if memory.name == case.params["memory"]
    )


def _trained(settings: AblationSettings, variant: Variant, progress: Progress) -> dict[str, Any]:
    """Train a variant; return its final loss by rate and seed, the tuned rate, and
    elements by step.
    """
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
    """Call `teacher.train` once for the same arguments: several groups have the same
    reference.
    """
    key = json.dumps([problem.model_dump(), section, pairs, momentum], sort_keys=True)
    if key not in _TRAINED:
        _TRAINED[key] = teacher.train(problem, section, pairs, momentum, progress)
    return _TRAINED[key]
