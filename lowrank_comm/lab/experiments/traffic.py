"""Table 2: elements that a worker sends per iteration for one m x n matrix, measured by
the ledger, against the formulas.

Each case runs one method on one matrix for whole periods, on random gradients, and
reads the worker's ledger: all bytes but the control numbers (a flag and a mask for each
step) and the fingerprint of the settings, over the bytes of an element. Two formulas
stand beside it, in the preset: what this library sends, which must agree to the last
element, and what the paper's Table 2 prints for the method, where it prints something.
What an all-gather receives from the other workers, and what a ring carries for each
element, is not in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar

import torch
from matplotlib.figure import Figure
from pydantic import Field
from torch import Tensor

from lowrank_comm.compressors import REGISTRY
from lowrank_comm.lab.experiment import Case, Experiment, Progress, Row
from lowrank_comm.lab.experiments.comparison import table
from lowrank_comm.lab.experiments.formulas import evaluate
from lowrank_comm.lab.experiments.methods import SectionOf, WithMethods
from lowrank_comm.lab.training.averaging import Backend, Crew, parsed_section, together
from lowrank_comm.numerics.randomness import gaussian

OVERHEAD = ("control", "fingerprint", "consolidation")
"""Kinds of bytes that do not grow with the matrix."""


class TrafficMethod(SectionOf):
    """A method with its formulas.

    Attributes:
        sent: elements per iteration in this library, a formula in m, n, r, tau, N, s =
            min(m, n), l = max(m, n).
        paper: what Table 2 of the paper prints; None where it has no such row.
        period: steps after which the traffic repeats; tau if it restarts, else 2.
    """

    sent: str
    paper: str | None = None
    period: int | None = None


class TrafficSettings(WithMethods):
    """The matrices and the methods.

    Attributes:
        shapes: of the matrix.
        rank, restart_every: r and tau of every method that has them.
    """

    methods: list[TrafficMethod] = Field(min_length=1)  # type: ignore[assignment]
    shapes: tuple[tuple[int, int], ...] = ((64, 48), (48, 64))
    rank: int = 4
    restart_every: int = 10
    workers: int = 2
    backend: Backend = "simulation"
    seed: int = 0


class Traffic(Experiment):
    name: ClassVar[str] = "traffic"
    title: ClassVar[str] = "Traffic: elements sent per iteration (Table 2)"
    Settings: ClassVar[type[TrafficSettings]] = TrafficSettings

    def cases(self, settings: TrafficSettings) -> list[Case]:
        """Return one case for each method and shape."""
        return [
            Case(f"{method.name}/{m}x{n}", {"method": method.name, "m": m, "n": n})
            for method in settings.methods
            for m, n in settings.shapes
        ]

    def depends_on(self, settings: TrafficSettings, case: Case) -> Any:
        """Return the settings without the other methods and shapes."""
        common = settings.model_dump(mode="json", exclude={"methods", "shapes"})
        return common | {"method": settings.method(case.params["method"]).model_dump(mode="json")}

    def run(self, settings: TrafficSettings, case: Case, progress: Progress) -> dict[str, Any]:
        """Return elements by kind over whole periods."""
        method = settings.method(case.params["method"])
        m, n = case.params["m"], case.params["n"]
        section = _section(settings, method)
        names = {
            "m": m,
            "n": n,
            "r": min(settings.rank, m, n),
            "tau": settings.restart_every,
            "N": settings.workers,
            "s": min(m, n),
            "l": max(m, n),
        }
        period = method.period or section.get("restart_every") or 2
        steps = 2 * period
        elements = together(
            settings.backend, settings.workers, elements_sent, section, m, n, steps, settings.seed
        )
        measured = Fraction(sum(elements.values()), steps)
        sent = evaluate(method.sent, names)
        return {
            "steps": steps,
            "elements": elements,
            "measured": float(measured),
            "sent": float(sent),
            "agrees": measured == sent,
            "paper": None if method.paper is None else float(evaluate(method.paper, names)),
        }

    def figures(self, settings: TrafficSettings, rows: Sequence[Row]) -> dict[str, Figure]:
        """Draw measured elements and Table 2's, for the first shape, as shares of the
        matrix.
        """
        m, n = settings.shapes[0]
        shown = [row for row in rows if (row["params"]["m"], row["params"]["n"]) == (m, n)]
        figure = Figure(figsize=(8, 0.34 * len(shown) + 1.6), layout="constrained")
        axes = figure.subplots()
        places = range(len(shown))
        axes.barh(
            places,
            [row["result"]["measured"] / (m * n) for row in shown],
            color="C0",
            label="measured",
        )
        marked = [k for k in places if shown[k]["result"]["paper"] is not None]
        axes.plot(
            [shown[k]["result"]["paper"] / (m * n) for k in marked],
            marked,
            "kD",
            markersize=5,
            label="Table 2 of the paper",
        )
        axes.set_yticks(places, [row["params"]["method"] for row in shown])
        axes.invert_yaxis()
        axes.set_xlabel(
            f"elements per iteration / mn, for {m} x {n}, r = {settings.rank}, tau ="
            f" {settings.restart_every}"
        )
        axes.grid(alpha=0.3, axis="x")
        axes.legend()
        return {"traffic": figure}

    def page(self, settings: TrafficSettings, rows: Sequence[Row]) -> str:
        """Write one table for each shape."""
        parts = [
            (
                f"r = {settings.rank}, tau = {settings.restart_every}, N = {settings.workers}"
                f" ({settings.backend}), two whole periods. Elements that one worker hands to the"
                " collectives per iteration, without a step's control numbers (one flag and one"
                " mask of missing gradients). `library` is this library's own count, which must"
                " agree with what was measured to the last element; `Table 2` is what the paper"
                " prints. s = min(m, n), l = max(m, n). Where the two differ: a restart by SVD"
                " sends m n + m r here in the place of that step's factors and not beside them;"
                " GaLore's basis lies on the short side by default, so that a step sends r l,"
                " where Table 2 has the long side."
            ),
            "![Elements per iteration](traffic.png)",
        ]
        for m, n in settings.shapes:
            lines = [
                _line(settings, row)
                for row in rows
                if (row["params"]["m"], row["params"]["n"]) == (m, n)
            ]
            heads = [
                "method",
                "library's formula",
                "library",
                "measured",
                "Table 2's formula",
                "Table 2",
                "measured / Table 2",
            ]
            parts.append(f"## {m} x {n}, {m * n} elements\n\n" + table(heads, lines))
        wrong = [row["key"] for row in rows if not row["result"]["agrees"]]
        verdict = f"**not for {', '.join(wrong)}**" if wrong else f"in all {len(rows)} cases"
        covered = {method.section["compressor"] for method in settings.methods}
        rest = sorted(set(REGISTRY) - covered)
        parts.append(
            f"Measured = the library's formula, exactly: {verdict}."
            + (f" Registered, but not in this preset: {', '.join(rest)}." if rest else "")
        )
        return "\n\n".join(parts)


def elements_sent(
    crew: Crew, section: dict[str, Any], m: int, n: int, steps: int, seed: int
) -> dict[str, int]:
    """Return kind -> elements that a worker passes to the collectives in `steps` steps
    on random gradients.
    """
    averager = crew.averager(section, {"X": (m, n)})

    def gradient(worker: int, t: int) -> Tensor:
        purpose = f"gradient of worker {worker}"
        return gaussian(seed, ["X"], t, purpose, (m, n), torch.float64, torch.device("cpu"))[0]

    for t in range(steps):
        averager.average([{"X": gradient(worker, t)} for worker in crew.local_workers])
    counted = {kind: sent for kind, sent in averager.ledger.bytes.items() if kind not in OVERHEAD}
    return {kind: sent // torch.float64.itemsize for kind, sent in sorted(counted.items())}


def _section(settings: TrafficSettings, method: TrafficMethod) -> dict[str, Any]:
    """Return the method's section with the common rank and period, where its compressor
    has them.
    """
    kind = parsed_section({"compressor": method.section["compressor"]}).make_compressor()
    common = {"rank": settings.rank, "restart_every": settings.restart_every}
    return {key: value for key, value in common.items() if key in kind.options()} | method.section


def _line(settings: TrafficSettings, row: Row) -> list[str]:
    method, result = settings.method(row["params"]["method"]), row["result"]
    paper = result["paper"]
    return [
        method.name,
        f"`{method.sent}`",
        f"{result['sent']:.1f}",
        f"{result['measured']:.1f}",
        f"`{method.paper}`" if method.paper else "",
        "" if paper is None else f"{paper:.1f}",
        "" if paper is None else f"{result['measured'] / paper:.3f}",
    ]
