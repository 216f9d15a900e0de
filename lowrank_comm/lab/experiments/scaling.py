"""Scaling with n on the simulated clock: synchronous SGD comes to a floor, Inkheart SGD and M4 (reconstructions) go on.

Every method is tuned for every n by the same search over the same grid, on seeds of its own; the seconds are those of other
seeds. The control has the compression of Inkheart SGD but not its balance: G = n and K = d/n.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any, ClassVar, Literal

from matplotlib.figure import Figure

from ...bidirectional import M4, InkheartSGD, MarinaP, Method
from ..experiment import Case, Experiment, LabSettings, Progress, Row
from ..simulated_clock import Choice, Objective, Trial, descend_on_grid, seconds_to_target

Problem = Literal["quadratic", "non_convex", "heterogeneous"]


class ScalingSettings(LabSettings):
    """Grids are those of the search; a parameter that a method does not have is left out of its search.

    Attributes:
        workers: n of every problem.
        d, variance, tilt, eps, window, h, kappa: see `simulated_clock`. With 2 kappa d at least 8 h B at n = 16 the floor is
            visible. The largest gamma of the grid is 1/L.
        seeds, tuning_seeds: of the seconds that are told, and of the search.
        trials: most choices that a search tries.
        limit, most_steps: seconds on the clock, and steps, at which a run is given up.
        batches, gammas, fractions, groups, weights: grids of B, gamma, K/d, G and a, in order.
    """

    problems: tuple[Problem, ...] = ("quadratic", "non_convex", "heterogeneous")
    workers: tuple[int, ...] = (1, 4, 16, 64, 256)
    d: int = 128
    variance: float = 4.0
    tilt: float = 0.1
    eps: float = 1e-2
    window: int = 10
    h: float = 1.0
    kappa: float = 3.0
    seeds: tuple[int, ...] = (0, 1, 2)
    tuning_seeds: tuple[int, ...] = (100, 101)
    trials: int = 40
    limit: float = 1e6
    most_steps: int = 20_000
    batches: tuple[int, ...] = (1, 2, 3, 5, 7, 10, 13, 18, 25, 35, 50, 70, 100, 140, 200, 280, 400)
    gammas: tuple[float, ...] = (0.03125, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0)
    fractions: tuple[float, ...] = (0.0625, 0.125, 0.25, 0.5, 1.0)
    groups: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    weights: tuple[float, ...] = (0.05, 0.1, 0.2, 0.4, 0.8)


@dataclass(frozen=True)
class Contender:
    """A method as the search sees it.

    Attributes:
        label: in tables and figures.
        tuned: names of its parameters.
        build: the method of a choice, for n workers.
    """

    label: str
    tuned: tuple[str, ...]
    build: Callable[[Choice, int], Method]


CONTENDERS: dict[str, Contender] = {
    "sync": Contender("synchronous SGD", ("B", "gamma"), lambda choice, n: MarinaP(1)),
    "inkheart": Contender(
        "Inkheart SGD (reconstruction)",
        ("B", "gamma", "K/d", "G"),
        lambda choice, n: InkheartSGD(choice["G"], uplink_fraction=choice["K/d"]),
    ),
    "control": Contender(
        "control: G = n, K = d/n", ("B", "gamma"), lambda choice, n: InkheartSGD(n, uplink_fraction=1.0 / n)
    ),
    "m4": Contender(
        "M4 (reconstruction)",
        ("B", "gamma", "K/d", "G", "a"),
        lambda choice, n: M4(choice["G"], uplink_fraction=choice["K/d"], gradient_weight=choice["a"]),
    ),
    "sync_momentum": Contender(
        "synchronous SGD with momentum",
        ("B", "gamma", "a"),
        lambda choice, n: M4(1, uplink_fraction=1.0, gradient_weight=choice["a"]),
    ),
}
OF_PROBLEM: dict[str, tuple[str, ...]] = {
    "quadratic": ("sync", "inkheart", "control"),
    "non_convex": ("sync", "inkheart", "control"),
    "heterogeneous": ("sync_momentum", "m4"),
}
TITLES = {
    "quadratic": "Quadratic, homogeneous data",
    "non_convex": "With a non-convex term, homogeneous data",
    "heterogeneous": "Quadratic, heterogeneous data (linear tilts)",
}
EXPECTED: tuple[tuple[tuple[str, ...], str, tuple[str, int], tuple[str, int], str, float], ...] = (
    (("quadratic", "non_convex"), "synchronous SGD has come to its floor", ("sync", 64), ("sync", 16), ">", 0.9),
    (("quadratic", "non_convex"), "Inkheart SGD keeps falling", ("inkheart", 64), ("inkheart", 16), "<", 0.8),
    (("quadratic", "non_convex"), "one worker loses nothing by it", ("inkheart", 1), ("sync", 1), "<=", 1.1),
    (("quadratic", "non_convex"), "the control does not scale", ("control", 64), ("control", 4), ">", 0.85),
    (("heterogeneous",), "momentum alone has come to its floor", ("sync_momentum", 64), ("sync_momentum", 16), ">", 0.9),
    (("heterogeneous",), "M4 keeps falling", ("m4", 64), ("m4", 16), "<", 0.9),
    (("heterogeneous",), "and further", ("m4", 256), ("m4", 16), "<", 0.75),
)
"""(problems, claim, numerator, denominator, relation, bound): what was expected before the runs."""


class Scaling(Experiment):
    """See the module's text."""

    name: ClassVar[str] = "scaling"
    title: ClassVar[str] = "Scaling with the number of workers on the simulated clock"
    Settings: ClassVar[type[ScalingSettings]] = ScalingSettings

    def cases(self, settings: ScalingSettings) -> list[Case]:
        """One for each problem, method and n."""
        return [
            Case(f"{problem}/{method}/{n}", {"problem": problem, "method": method, "n": n})
            for problem in settings.problems
            for method in OF_PROBLEM[problem]
            for n in settings.workers
            if method != "control" or n <= settings.d  # K = d/n is at least 1
        ]

    def depends_on(self, settings: ScalingSettings, case: Case) -> Any:
        """All settings but which problems and n there are."""
        return settings.model_dump(mode="json", exclude={"problems", "workers"})

    def run(self, settings: ScalingSettings, case: Case, progress: Progress) -> dict[str, Any]:
        """The search, and the seconds of the choice that it found."""
        problem, name, n = case.params["problem"], case.params["method"], case.params["n"]
        objective = Objective(
            settings.d, settings.variance, problem == "non_convex", settings.tilt if problem == "heterogeneous" else 0.0
        )
        grid = _grid(settings, n)
        grid = {key: grid[key] for key in CONTENDERS[name].tuned}
        tried = 0

        def cost(choice: Choice, best: float) -> float:
            nonlocal tried
            tried += 1
            progress(min(0.95, tried / settings.trials), ", ".join(f"{key}={value:g}" for key, value in choice.items()))
            spent, count = 0.0, len(settings.tuning_seeds)
            for seed in settings.tuning_seeds:
                limit = min(settings.limit, best * count - spent)
                trial = _trial(settings, objective, name, n, choice, seed, limit)
                spent += trial.seconds
                if not math.isfinite(spent):
                    return math.inf if best <= settings.limit else settings.limit * (2.0 + trial.residual)
            return spent / count

        chosen, _, trials = descend_on_grid(grid, _start(settings, grid, name, n), cost, settings.trials)
        runs = [_trial(settings, objective, name, n, chosen, seed, settings.limit) for seed in settings.seeds]
        return {
            "chosen": chosen,
            "trials": trials,
            "seconds": [run.seconds for run in runs],
            "steps": [run.steps for run in runs],
            "up": [run.up for run in runs],
            "down": [run.down for run in runs],
        }

    def figures(self, settings: ScalingSettings, rows: Sequence[Row]) -> dict[str, Figure]:
        """Seconds against n, one picture for each problem."""
        return {problem: _draw(problem, rows) for problem in settings.problems}

    def page(self, settings: ScalingSettings, rows: Sequence[Row]) -> str:
        """Tables of seconds and of what was chosen, and the ratios that were expected."""
        text = [
            f"Seconds on the simulated clock until the mean of ||grad f(x)||^2 over {settings.window} steps is at most "
            f"{settings.eps:g}, against the number of workers n. A step takes h B + kappa (K_up + K_down) seconds, h = "
            f"{settings.h:g} for one stochastic gradient and kappa = {settings.kappa:g} for one of d = {settings.d} "
            f"coordinates on a link; links work side by side. Noise sigma^2 = {settings.variance:g}. Every method was tuned "
            f"for every n by the same local search of at most {settings.trials} choices over the same grid, with step sizes "
            f"up to gamma = {max(settings.gammas):g} (1/L is 1), on the seeds {', '.join(map(str, settings.tuning_seeds))}; "
            "what stands here is mean and standard deviation over other seeds. A run is given up after "
            f"{settings.limit:g} s or {settings.most_steps} steps.",
            "Inkheart SGD and M4 are reconstructions from the abstract of their paper, not the authors' algorithms.",
        ]
        for problem in settings.problems:
            text += [f"## {TITLES[problem]}", f"![seconds against n]({problem}.png)", _seconds(settings, problem, rows)]
            text += ["What the search chose:", _choices(settings, problem, rows), _ratios(problem, rows)]
        return "\n\n".join(text)


def _grid(settings: ScalingSettings, n: int) -> dict[str, Sequence[Any]]:
    return {
        "B": settings.batches,
        "gamma": settings.gammas,
        "K/d": settings.fractions,
        "G": tuple(g for g in settings.groups if g <= n),
        "a": settings.weights,
    }


def _start(settings: ScalingSettings, grid: dict[str, Sequence[Any]], name: str, n: int) -> Choice:
    """B = sigma^2/(n eps), and gamma = 1/n for the control, as the theory has it up to constants; the rest between."""
    gamma = 2.0 / n if name == "control" else 0.75
    wanted = {"B": settings.variance / (n * settings.eps), "gamma": gamma, "K/d": 1.0 if n < 64 else 0.5, "G": 8, "a": 0.2}
    return {key: min(values, key=lambda value: abs(math.log(value / wanted[key]))) for key, values in grid.items()}


def _trial(
    settings: ScalingSettings, objective: Objective, name: str, n: int, choice: Choice, seed: int, limit: float
) -> Trial:
    first = math.ceil(choice["B"] / choice["a"]) if "a" in choice else choice["B"]
    return seconds_to_target(
        objective,
        CONTENDERS[name].build(choice, n),
        n,
        batch=choice["B"],
        first_batch=first,
        gamma=choice["gamma"],
        h=settings.h,
        kappa=settings.kappa,
        eps=settings.eps,
        window=settings.window,
        seed=seed,
        limit=limit,
        most_steps=settings.most_steps,
    )


def _found(problem: str, method: str, n: int, rows: Sequence[Row]) -> dict[str, Any] | None:
    for row in rows:
        if row["key"] == f"{problem}/{method}/{n}":
            result: dict[str, Any] = row["result"]
            return result
    return None


def _mean(problem: str, method: str, n: int, rows: Sequence[Row]) -> float | None:
    """Mean seconds, infinite where some seed did not arrive; None where the case is missing."""
    found = _found(problem, method, n, rows)
    if found is None:
        return None
    return math.inf if None in found["seconds"] else mean(found["seconds"])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _head(settings: ScalingSettings) -> list[str]:
    return [_line(["n", *map(str, settings.workers)]), _line(["---"] * (len(settings.workers) + 1))]


def _seconds(settings: ScalingSettings, problem: str, rows: Sequence[Row]) -> str:
    lines = _head(settings)
    for method in OF_PROBLEM[problem]:
        cells = [CONTENDERS[method].label]
        for n in settings.workers:
            found = _found(problem, method, n, rows)
            if found is None:
                cells.append("")
            elif None in found["seconds"]:
                cells.append("not reached")
            else:
                spread = stdev(found["seconds"]) if len(found["seconds"]) > 1 else 0.0
                cells.append(f"{mean(found['seconds']) / 1e3:.1f}k ± {spread / 1e3:.1f}k")
        lines.append(_line(cells))
    return "\n".join(lines)


def _choices(settings: ScalingSettings, problem: str, rows: Sequence[Row]) -> str:
    lines = _head(settings)
    for method in OF_PROBLEM[problem]:
        cells = [CONTENDERS[method].label]
        for n in settings.workers:
            found = _found(problem, method, n, rows)
            chosen = {} if found is None else found["chosen"]
            cells.append(", ".join(f"{key} {value:g}" for key, value in chosen.items()))
        lines.append(_line(cells))
    return "\n".join(lines)


def _ratios(problem: str, rows: Sequence[Row]) -> str:
    lines = [_line(["expected", "ratio", "bound", "measured", "holds"]), _line(["---"] * 5)]
    for problems, claim, above, below, relation, bound in EXPECTED:
        a, b = _mean(problem, *above, rows), _mean(problem, *below, rows)
        if problem not in problems or a is None or b is None or math.isinf(b):
            continue
        ratio = a / b
        holds = {">": ratio > bound, "<": ratio < bound, "<=": ratio <= bound}[relation]
        of = f"{CONTENDERS[above[0]].label}, n = {above[1]}, over {CONTENDERS[below[0]].label}, n = {below[1]}"
        lines.append(
            _line(
                [
                    claim,
                    of,
                    f"{relation} {bound:g}",
                    "not reached" if math.isinf(ratio) else f"{ratio:.3f}",
                    "yes" if holds else "**no**",
                ]
            )
        )
    return "\n".join(lines)


def _draw(problem: str, rows: Sequence[Row]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for method in OF_PROBLEM[problem]:
        own = [row for row in rows if (row["params"]["problem"], row["params"]["method"]) == (problem, method)]
        points = [(row["params"]["n"], row["result"]["seconds"]) for row in own if None not in row["result"]["seconds"]]
        if points:
            heights = [mean(seconds) for _, seconds in points]
            spreads = [stdev(seconds) if len(seconds) > 1 else 0.0 for _, seconds in points]
            axes.errorbar([n for n, _ in points], heights, spreads, marker="o", capsize=3, label=CONTENDERS[method].label)
    axes.set(xscale="log", yscale="log", xlabel="workers n", ylabel="simulated seconds", title=TITLES[problem])
    axes.legend()
    return figure
