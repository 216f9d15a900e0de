"""The page and figures of `scaling`, computed from its rows: seconds, choices, claims,
and what limits the search.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from matplotlib.figure import Figure

from lowrank_comm.lab.experiment import Row
from lowrank_comm.lab.experiments.comparison import Spread, listed, table

Problem = Literal["quadratic", "non_convex", "heterogeneous"]

LABELS = {
    "sync": "synchronous SGD",
    "inkheart": "Inkheart SGD (reconstruction)",
    "control": "control: G = n, K = d/n",
    "m4": "M4 (reconstruction)",
    "sync_momentum": "synchronous SGD with momentum",
}
SYNCHRONOUS = ("sync", "sync_momentum")
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
RELATIONS = {">": operator.gt, "<": operator.lt, "<=": operator.le}
HOMOGENEOUS = ("quadratic", "non_convex")


class Expected(NamedTuple):
    """A ratio of mean seconds that was expected before the runs.

    Attributes:
        problems: for which it is claimed.
        claim: in words.
        above, below: (method, n) of numerator and denominator.
        relation, bound: of the ratio.
    """

    problems: tuple[str, ...]
    claim: str
    above: tuple[str, int]
    below: tuple[str, int]
    relation: Literal["<", "<=", ">"]
    bound: float


EXPECTED = (
    Expected(
        HOMOGENEOUS, "synchronous SGD has come to its floor", ("sync", 64), ("sync", 16), ">", 0.9
    ),
    Expected(
        HOMOGENEOUS, "Inkheart SGD keeps falling", ("inkheart", 64), ("inkheart", 16), "<", 0.8
    ),
    Expected(
        HOMOGENEOUS, "one worker loses nothing by it", ("inkheart", 1), ("sync", 1), "<=", 1.1
    ),
    Expected(HOMOGENEOUS, "the control does not scale", ("control", 64), ("control", 4), ">", 0.85),
    Expected(
        ("heterogeneous",),
        "momentum alone has come to its floor",
        ("sync_momentum", 64),
        ("sync_momentum", 16),
        ">",
        0.9,
    ),
    Expected(("heterogeneous",), "M4 keeps falling", ("m4", 64), ("m4", 16), "<", 0.9),
    Expected(("heterogeneous",), "and further", ("m4", 256), ("m4", 16), "<", 0.75),
)
PLATEAU = (16, 8.0)
"""(n, least 2 kappa d/(h B)): where synchronous SGD counts as limited by its links,
with the B that its own search chose.
"""


@dataclass(frozen=True)
class Claim:
    """An expected ratio, and what the rows say of it.

    Attributes:
        ratio: infinite where the numerator did not reach the target.
    """

    problem: str
    claim: str
    of: str
    bound: str
    ratio: float
    holds: bool


def claims(problem: str, rows: Sequence[Row]) -> list[Claim]:
    """Return the claims about a problem for which the rows are there."""
    found = []
    for one in EXPECTED:
        a, b = _mean(problem, *one.above, rows), _mean(problem, *one.below, rows)
        if problem not in one.problems or a is None or b is None or math.isinf(b):
            continue
        holds = RELATIONS[one.relation](a / b, one.bound)
        numerator, denominator = (f"{LABELS[name]}, n = {n}" for name, n in (one.above, one.below))
        of, bound = f"{numerator}, over {denominator}", f"{one.relation} {one.bound:g}"
        found.append(Claim(problem, one.claim, of, bound, a / b, holds))
    return found


def grid(settings: Any, n: int) -> dict[str, Sequence[Any]]:
    """Return parameter name -> the search's values for n workers, in order."""
    return {
        "B": settings.batches,
        "gamma L": settings.gammas,
        "K/d": settings.fractions,
        "G": tuple(g for g in settings.groups if g <= n),
        "a": settings.weights,
    }


def ends(settings: Any, row: Row) -> dict[str, bool]:
    """Return what a search chose at an end of its grid: "B 1" -> whether that is the
    parameter's own limit, which no grid crosses.

    Without momentum the last gamma below 2/L is such an end: from 2/L on gradient
    descent on a quadratic diverges.
    """
    n, chosen = row["params"]["n"], row["result"]["chosen"]
    own = {"B": (1,), "gamma L": (), "K/d": (1 / settings.d, 1.0), "G": (1, n), "a": (1.0,)}
    found = {}
    for key, value in chosen.items():
        values = grid(settings, n)[key]
        if key == "gamma L" and "a" not in chosen:
            values = [gamma for gamma in values if gamma < 2] or values
        if value in (values[0], values[-1]):
            found[f"{key} {value:g}"] = value in own[key]
    return found


def _never_compressed_up(rows: Sequence[Row]) -> str:
    """State which methods' uplink no search compressed: the page cannot judge it."""
    shares: dict[str, set[float]] = {}
    for row in rows:
        chosen = row["result"]["chosen"]
        if "K/d" in chosen:
            shares.setdefault(LABELS[row["params"]["method"]], set()).add(chosen["K/d"])
    dense = [name for name, found in shares.items() if found == {1.0}]
    return (
        f" For {', '.join(dense)} that was so at every n: nothing here speaks of its compressed"
        " uplink."
        if dense
        else ""
    )


def page(settings: Any, rows: Sequence[Row]) -> str:
    """Return the Markdown below the heading."""
    text = [
        (
            "Seconds on the simulated clock until the mean of ||grad f(x)||^2 over"
            f" {settings.window} steps is at most {settings.eps:g}, against the number of workers"
            f" n. A step takes h B + kappa (K_up + K_down) seconds, h = {settings.h:g} for one"
            f" stochastic gradient and kappa = {settings.kappa:g} for one of d = {settings.d}"
            " coordinates on a link; links work side by side. B: mini-batch of a worker; gamma:"
            " step size; K: coordinates that a worker sends (RandK), of d; G: blocks into which"
            " the server's update is cut, of which a worker gets one; K_up and K_down: coordinates"
            " on the busiest link; a: weight of a new gradient in a momentum. The methods are told"
            f" in [bidirectional.md](../bidirectional.md). Noise sigma^2 = {settings.variance:g}."
            " Every method was tuned for every n by the same local search of at most"
            f" {settings.trials} choices over the same grid, with step sizes from"
            f" {min(settings.gammas):g}/L to {max(settings.gammas):g}/L, on the seeds"
            f" {', '.join(map(str, settings.tuning_seeds))}; what stands here is mean and standard"
            f" deviation over other seeds. A run is given up after {settings.limit:g} s or"
            f" {settings.most_steps} steps."
        ),
        (
            "The claims are about slow links. The floor of synchronous SGD is what it takes"
            " without noise and with B = 1, its step size tuned: what it comes to with ever more"
            " workers. It counts as limited by its links where 2 kappa d is at least"
            f" {PLATEAU[1]:g} h B at n = {PLATEAU[0]}, with the B that its own search chose there."
            " kappa was chosen by this alone, before Inkheart SGD and M4 were run at it. With"
            " faster links more of a step is computing, of which more workers need less, and"
            " synchronous SGD goes on falling beyond that n."
        ),
        "Where K/d is 1, only the downlink is compressed, and a step still costs half of the 2"
        " kappa d of synchronous SGD." + _never_compressed_up(rows),
        (
            "Inkheart SGD and M4 are reconstructions from the abstract of their paper, not the"
            " authors' algorithms."
        ),
    ]
    contradicted = [
        claim for problem in settings.problems for claim in claims(problem, rows) if not claim.holds
    ]
    if contradicted:
        text += ["What contradicts the expectation:"]
        text += [
            listed(
                [
                    f"{TITLES[c.problem]}: {c.claim}: {_ratio(c)}, expected {c.bound} ({c.of})"
                    for c in contradicted
                ]
            )
        ]
    else:
        text += ["All expected ratios hold."]
    text += [_searched(settings, rows)]
    for problem in settings.problems:
        smoothness = {
            row["result"]["smoothness"] for row in rows if row["params"]["problem"] == problem
        }
        text += [f"## {TITLES[problem]}", *(f"L = {value:.4g}." for value in sorted(smoothness))]
        text += [f"![seconds against n]({problem}.png)", _table(settings, problem, rows, _seconds)]
        text += [
            *_floor(settings, problem, rows),
            "What the search chose (gamma L: step size in multiples of 1/L):",
        ]
        text += [_table(settings, problem, rows, _choice)]
        heads = ("expected", "ratio", "bound", "measured", "holds")
        cells = [
            (c.claim, c.of, c.bound, _ratio(c), "yes" if c.holds else "**no**")
            for c in claims(problem, rows)
        ]
        text += [table(heads, cells)]
    return "\n\n".join(text)


def draw(problem: str, rows: Sequence[Row]) -> Figure:
    """Draw seconds against n, and the floor of synchronous SGD."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    for method in OF_PROBLEM[problem]:
        own = [
            row
            for row in rows
            if (row["params"]["problem"], row["params"]["method"]) == (problem, method)
        ]
        points = [
            (row["params"]["n"], spread) for row in own if (spread := _spread(row)) is not None
        ]
        if points:
            heights = [spread.mean for _, spread in points]
            bars = [spread.deviation or 0.0 for _, spread in points]
            axes.errorbar(
                [n for n, _ in points], heights, bars, marker="o", capsize=3, label=LABELS[method]
            )
        floors = {row["result"]["floor"] for row in own if row["result"].get("floor") is not None}
        for floor in floors:
            axes.axhline(floor, color="grey", linestyle=":", label=f"floor of {LABELS[method]}")
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="workers n",
        ylabel="simulated seconds",
        title=TITLES[problem],
    )
    axes.legend(fontsize="small")
    return figure


def _found(problem: str, method: str, n: int, rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row["key"] == f"{problem}/{method}/{n}"), None)


def _spread(row: Row) -> Spread | None:
    """Return the spread of the seconds; None where a seed did not reach the target."""
    seconds = row["result"]["seconds"]
    return None if None in seconds else Spread.of(seconds)


def _mean(problem: str, method: str, n: int, rows: Sequence[Row]) -> float | None:
    """Return the mean seconds, infinite where a seed did not reach the target; None
    where the case is missing.
    """
    row = _found(problem, method, n, rows)
    if row is None:
        return None
    spread = _spread(row)
    return math.inf if spread is None else spread.mean


def _table(settings: Any, problem: str, rows: Sequence[Row], cell: Any) -> str:
    """Return a table of one cell for each method and n."""
    lines = []
    for method in OF_PROBLEM[problem]:
        found = [_found(problem, method, n, rows) for n in settings.workers]
        lines.append([LABELS[method], *("" if row is None else cell(row) for row in found)])
    return table(["n", *map(str, settings.workers)], lines)


def _seconds(row: Row) -> str:
    spread = _spread(row)
    if spread is None:
        return "not reached"
    return f"{spread.mean / 1e3:.1f}k ± {(spread.deviation or 0.0) / 1e3:.1f}k"


def _choice(row: Row) -> str:
    return ", ".join(f"{key} {value:g}" for key, value in row["result"]["chosen"].items())


def _ratio(claim: Claim) -> str:
    return "not reached" if math.isinf(claim.ratio) else f"{claim.ratio:.3f}"


def _floor(settings: Any, problem: str, rows: Sequence[Row]) -> list[str]:
    """State how near synchronous SGD is to its floor, and whether links limit it."""
    n, least = PLATEAU
    text = []
    for method in SYNCHRONOUS:
        row = _found(problem, method, n, rows)
        if row is None or row["result"].get("floor") is None or (spread := _spread(row)) is None:
            continue
        floor = row["result"]["floor"]
        share = 2 * settings.kappa * settings.d / (settings.h * row["result"]["chosen"]["B"])
        text.append(
            f"The floor of {LABELS[method]} is {floor / 1e3:.1f}k s; at n = {n} it takes"
            f" {spread.mean / floor:.2f} times that, and 2 kappa d is {share:.1f} h B:"
            f" {'limited' if share >= least else '**not** limited'} by its links."
        )
    return text


def _searched(settings: Any, rows: Sequence[Row]) -> str:
    """State what may keep a choice from being the best: the cap of the search, and the
    ends of its grid.
    """
    capped = [f"`{row['key']}`" for row in rows if row["result"].get("capped")]
    found = {row["key"]: ends(settings, row) for row in rows}
    parts: dict[bool, list[str]] = {
        kind: [
            f"`{key}` ({', '.join(name for name, own in at.items() if own == kind)})"
            for key, at in found.items()
            if kind in at.values()
        ]
        for kind in (False, True)
    }
    return listed(
        [
            (
                f"Searches that the cap of {settings.trials} choices ended:"
                f" {', '.join(capped) or 'none'}."
            ),
            (
                "Choices at an end of the grid (without momentum also at the last step size below"
                " 2/L, from which gradient descent on a quadratic diverges):"
                f" {', '.join(parts[False]) or 'none'}."
            ),
            (
                "Choices at a limit of the parameter itself (B = 1, one coordinate, K = d, G = 1,"
                f" G = n, a = 1), which no wider grid moves: {', '.join(parts[True]) or 'none'}."
            ),
        ]
    )
