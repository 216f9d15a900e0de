"""Scaling with n on the simulated clock: synchronous SGD comes to a floor, Inkheart SGD
and M4 (reconstructions) go on.

Every method is tuned for every n by the same search over the same grid, on seeds of its
own; the seconds are those of other seeds. The control has the compression of Inkheart
SGD but not its balance: G = n and K = d/n.

The claims are about slow links: synchronous SGD has a floor, T_0 (h + 2 kappa d) with
T_0 the steps without noise, but its seconds still fall with n where h B of the batch
that it wants is not small beside 2 kappa d. Whether kappa is large enough is judged by
synchronous SGD alone, at n = 16: see `scaling_page.PLATEAU`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from lowrank_comm.bidirectional import M4, InkheartSGD, MarinaP, Method
from lowrank_comm.lab.experiment import Case, Experiment, LabSettings, Progress, Row
from lowrank_comm.lab.experiments import scaling_page as pages
from lowrank_comm.lab.experiments.scaling_page import OF_PROBLEM, SYNCHRONOUS, Problem
from lowrank_comm.lab.problems.simulated_clock import (
    Choice,
    Objective,
    Search,
    Trial,
    descend_on_grid,
    seconds_to_target,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIRST_SEED = 1.5
"""A choice is given up by the search when its first seed takes more than this times the
best mean so far.
"""


class ScalingSettings(LabSettings):
    """Grids are those of the search; a parameter that a method does not have is left
    out of its search.

    Attributes:
        workers: n of every problem.
        d, variance, tilt, eps, window, h, kappa: see `simulated_clock`. kappa is to be
            large enough that 2 kappa d is at least 8 h B for synchronous SGD at n = 16;
            the page says whether it is.
        seeds, tuning_seeds: of the seconds that are reported, and of the search.
        trials: most choices that a search tries.
        limit, most_steps: seconds on the clock, and steps, at which a run is given up.
        batches, gammas, fractions, groups, weights: grids of B, gamma L, K/d, G and a,
            in order. Momentum is stable up to gamma L = 2 (2 - a)/a, far above the 2 of
            plain SGD.
    """

    problems: tuple[Problem, ...] = ("quadratic", "non_convex", "heterogeneous")
    workers: tuple[int, ...] = (1, 4, 16, 64, 256)
    d: int = 128
    variance: float = 4.0
    tilt: float = 0.1
    eps: float = 1e-2
    window: int = 10
    h: float = 1.0
    kappa: float = 24.0
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    tuning_seeds: tuple[int, ...] = (100, 101, 102, 103)
    trials: int = 200
    limit: float = 1e7
    most_steps: int = 20_000
    batches: tuple[int, ...] = (
        *(1, 2, 3, 5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160, 224, 320),
        *(448, 640, 896, 1280, 1792, 2560, 3584, 5120),
    )
    gammas: tuple[float, ...] = (
        *(0.0078125, 0.015625, 0.03125, 0.0625, 0.125, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 1.9),
        *(2.2, 2.5, 3.0, 3.5, 5.0, 7.0, 10.0, 14.0, 20.0),
    )
    fractions: tuple[float, ...] = (0.015625, 0.03125, 0.0625, 0.125, 0.25, 0.5, 1.0)
    groups: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    weights: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, 1.0)


@dataclass(frozen=True)
class Contender:
    """A method as the search sees it.

    Attributes:
        tuned: names of its parameters.
        build: the method of a choice, for n workers.
    """

    tuned: tuple[str, ...]
    build: Callable[[Choice, int], Method]


CONTENDERS: dict[str, Contender] = {
    "sync": Contender(("B", "gamma L"), lambda choice, n: MarinaP(1)),
    "inkheart": Contender(
        ("B", "gamma L", "K/d", "G"),
        lambda choice, n: InkheartSGD(choice["G"], uplink_fraction=choice["K/d"]),
    ),
    "control": Contender(
        ("B", "gamma L"), lambda choice, n: InkheartSGD(n, uplink_fraction=1.0 / n)
    ),
    "m4": Contender(
        ("B", "gamma L", "K/d", "G", "a"),
        lambda choice, n: M4(
            choice["G"], uplink_fraction=choice["K/d"], gradient_weight=choice["a"]
        ),
    ),
    "sync_momentum": Contender(
        ("B", "gamma L", "a"),
        lambda choice, n: M4(1, uplink_fraction=1.0, gradient_weight=choice["a"]),
    ),
}


class Scaling(Experiment):
    name: ClassVar[str] = "scaling"
    title: ClassVar[str] = "Scaling with the number of workers on the simulated clock"
    paper: ClassVar[str] = (
        "The paper is that of Inkheart SGD and M4: Grigory Begunov and Alexander Tyurin,"
        ' "Scalable Distributed Stochastic Optimization via Bidirectional Compression: Beyond'
        ' Pessimistic Limits", arXiv 2605.07795.'
    )
    Settings: ClassVar[type[ScalingSettings]] = ScalingSettings

    def cases(self, settings: ScalingSettings) -> list[Case]:
        """Return one case for each problem, method and n."""
        return [
            Case(f"{problem}/{method}/{n}", {"problem": problem, "method": method, "n": n})
            for problem in settings.problems
            for method in OF_PROBLEM[problem]
            for n in settings.workers
            # K = d/n is at least 1
            if method != "control" or n <= settings.d
        ]

    def depends_on(self, settings: ScalingSettings, case: Case) -> Any:
        """Return all settings but which problems and n there are."""
        return settings.model_dump(mode="json", exclude={"problems", "workers"})

    def run(self, settings: ScalingSettings, case: Case, progress: Progress) -> dict[str, Any]:
        """Search, and measure the seconds of the choice that was found; for a
        synchronous method also its floor.
        """
        problem, name, n = case.params["problem"], case.params["method"], case.params["n"]
        tilt = settings.tilt if problem == "heterogeneous" else 0.0
        objective = Objective(settings.d, settings.variance, problem == "non_convex", tilt)
        found = _search(settings, objective, name, n, progress)
        runs = [
            _trial(settings, objective, name, n, found.chosen, seed, settings.limit)
            for seed in settings.seeds
        ]
        result = {
            "chosen": found.chosen,
            "trials": found.trials,
            "capped": found.capped,
            "smoothness": objective.smoothness,
            "seconds": [run.seconds for run in runs],
            "steps": [run.steps for run in runs],
            "up": [run.up for run in runs],
            "down": [run.down for run in runs],
        }
        if name in SYNCHRONOUS:
            changes = {"batches": (1,), "tuning_seeds": settings.tuning_seeds[:1]}
            alone = settings.model_copy(update=changes)
            noiseless = replace(objective, variance=0.0, tilt=0.0)
            result["floor"] = _search(alone, noiseless, name, 1, progress).cost
        return result

    def figures(self, settings: ScalingSettings, rows: Sequence[Row]) -> dict[str, Figure]:
        """Draw seconds against n, one figure for each problem."""
        return {problem: pages.draw(problem, rows) for problem in settings.problems}

    def page(self, settings: ScalingSettings, rows: Sequence[Row]) -> str:
        """Write tables of seconds and of choices, and the ratios that were expected."""
        return pages.page(settings, rows)


def _search(
    settings: ScalingSettings, objective: Objective, name: str, n: int, progress: Progress
) -> Search:
    grid = {key: pages.grid(settings, n)[key] for key in CONTENDERS[name].tuned}
    tried = 0

    def cost(choice: Choice, best: float) -> float:
        nonlocal tried
        tried += 1
        progress(
            min(0.95, tried / settings.trials),
            ", ".join(f"{key}={value:g}" for key, value in choice.items()),
        )
        spent, count = 0.0, len(settings.tuning_seeds)
        for seed in settings.tuning_seeds:
            limit = min(
                settings.limit, best * count - spent, best * FIRST_SEED if spent == 0 else math.inf
            )
            trial = _trial(settings, objective, name, n, choice, seed, limit)
            spent += trial.seconds
            if not math.isfinite(spent):
                if best <= settings.limit:
                    return math.inf
                return settings.limit * (2.0 + trial.residual)
        return spent / count

    best = Search({}, math.inf, 0, False)
    for start in _starts(settings, grid, name, n):
        found = descend_on_grid(grid, start, cost, settings.trials - best.trials)
        better = found if found.cost < best.cost or not best.chosen else best
        trials = best.trials + found.trials
        best = Search(better.chosen, better.cost, trials, found.capped)
        if best.capped:
            break
    return best


def _starts(
    settings: ScalingSettings, grid: dict[str, Sequence[Any]], name: str, n: int
) -> list[Choice]:
    """Return where the search starts: near what the theory has, up to constants.

    gamma is half of the largest stable one, but about 1/(n L) for the control.
    B = sigma^2 (d/K)/(n eps) without momentum. With it larger steps want less noise:
    B = sqrt(2 kappa d sigma^2/(h n eps)), at which h B balances the links.

    From gamma = 1/L the search for M4 at n = 256 ended in a valley far above
    synchronous SGD with its step size. For the same reason a method that compresses
    both ways has two starts: the downlink alone, and both.
    """
    least = settings.variance / (n * settings.eps)
    a, balanced = 0.3, math.sqrt(2 * settings.kappa * settings.d * least / settings.h)
    found: list[Choice] = []
    for fraction, groups in ((1.0, n), (0.25, 8)):
        wanted = {
            "B": balanced if "a" in grid else least / (fraction if "K/d" in grid else 1.0),
            "gamma L": (2.0 - a) / a if "a" in grid else 2.0 / n if name == "control" else 1.0,
            "K/d": fraction,
            "G": groups,
            "a": a,
        }
        start = {
            key: min(values, key=lambda value: abs(math.log(value / wanted[key])))
            for key, values in grid.items()
        }
        if start not in found:
            found.append(start)
    return found


def _trial(
    settings: ScalingSettings,
    objective: Objective,
    name: str,
    n: int,
    choice: Choice,
    seed: int,
    limit: float,
) -> Trial:
    first = math.ceil(choice["B"] / choice["a"]) if "a" in choice else choice["B"]
    return seconds_to_target(
        objective,
        CONTENDERS[name].build(choice, n),
        n,
        batch=choice["B"],
        first_batch=first,
        gamma=choice["gamma L"] / objective.smoothness,
        h=settings.h,
        kappa=settings.kappa,
        eps=settings.eps,
        window=settings.window,
        seed=seed,
        limit=limit,
        most_steps=settings.most_steps,
    )
