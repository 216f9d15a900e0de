"""The page and figures of `counterexamples`, computed from its rows."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

from lowrank_comm.lab.experiment import Row
from lowrank_comm.lab.experiments.comparison import table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lowrank_comm.lab.experiments.counterexamples import (
        CounterexampleSettings,
        Figure1,
        GaloreTrap,
    )

OPTIMIZERS = ("MSGD", "Adam")


def page(settings: CounterexampleSettings, rows: Sequence[Row]) -> str:
    """Return the body of the page: its three parts."""
    parts = (_figure1_text, _window_text, _galore_text)
    return "\n\n".join(part(settings, rows) for part in parts)


def figures(settings: CounterexampleSettings, rows: Sequence[Row]) -> dict[str, Figure]:
    """Return file stem -> figure: the losses of Figure 1, GaLore's gradient norms."""
    return {
        "figure1": _draw_figure1(settings.figure1, rows),
        "galore": _draw_galore(settings.galore, rows),
    }


def _of(rows: Sequence[Row], **params: Any) -> list[Row]:
    """Return the rows with these params."""
    return [
        row for row in rows if all(row["params"].get(key) == value for key, value in params.items())
    ]


def _curves(axes: Axes, rows: Sequence[Row], curve: str) -> None:
    """Draw a line for each row. A line that falls below the panel's lower end leaves
    the panel.
    """
    for number, row in enumerate(rows):
        values = row["result"][curve]
        axes.semilogy(
            [row["result"]["every"] * k for k in range(len(values))],
            [max(value, 1e-30) for value in values],
            # some lie on one another
            ("-", "--", ":")[number % 3],
            label=row["params"]["method"],
            linewidth=1.3,
        )
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(4.8 * count, 4.2), layout="constrained")
    return figure, list(figure.subplots(1, count, sharey=True, squeeze=False)[0])


def _legend(figure: Figure, panels: Sequence[Axes]) -> None:
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)


def _draw_figure1(part: Figure1, rows: Sequence[Row]) -> Figure:
    figure, panels = _panels(len(OPTIMIZERS))
    for panel, optimizer in zip(panels, OPTIMIZERS, strict=True):
        _curves(panel, _of(rows, part="figure1", optimizer=optimizer), "losses")
        panel.set(title=optimizer, ylim=(1e-8, 30))
    panels[0].set_ylabel("loss f(X)")
    _legend(figure, panels)
    return figure


def _draw_galore(part: GaloreTrap, rows: Sequence[Row]) -> Figure:
    figure, panels = _panels(len(part.sigmas))
    for panel, sigma in zip(panels, part.sigmas, strict=True):
        _curves(panel, _of(rows, part="galore", sigma=sigma), "curve")
        panel.set(title=f"noise {sigma:g}, gradient 0.5", ylim=(1e-8, 5))
    panels[0].set_ylabel("||grad f(X)||², mean over seeds")
    _legend(figure, panels)
    return figure


def _figure1_text(settings: CounterexampleSettings, rows: Sequence[Row]) -> str:
    part = settings.figure1
    found = _of(rows, part="figure1")
    lines = [
        [
            row["params"]["optimizer"],
            row["params"]["method"],
            f"{row['result']['first_loss']:.3g}",
            f"{row['result']['last_loss']:.2e}",
            f"{row['result']['last_squared_gradient']:.2e}",
            (
                "no part of the gradient, exactly"
                if row["result"]["trapped_exactly"]
                else "reach the gradient"
            ),
        ]
        for row in found
    ]
    trapped = sorted({row["params"]["method"] for row in found if row["result"]["trapped_exactly"]})
    return (
        "## PowerSGD's trap (Theorem 1, Figure 1)\n\nf(X) = psi(D^T X D), psi(x) = x^2 for |x| <="
        " 1 and 2|x| - 1 beyond; a worker's gradient is G + xi (sigma B - G), G the true one, B"
        f" all ones, xi = +1 or -1 by a fair coin. Rank 1, N = {part.workers}, sigma ="
        f" {part.sigma:g}, {part.steps} steps of momentum SGD (MSGD) or Adam; all coins of the"
        " first step show +1, as the theorem supposes. Every entry of the paper's 2 x 2 example is"
        " repeated in a 2 x 2 block, so that float64 is exact arithmetic for PowerSGD: whether an"
        " update holds any of the gradient is then a question of bits, not of a tolerance. Trapped"
        f" in that sense: {', '.join(trapped) or 'none'}.\n\n![Loss against step, cut off at"
        " 1e-8](figure1.png)\n\n"
        + table(["optimizer", "method", "first loss", "last loss", "last ‖∇f‖²", "updates"], lines)
    )


def _window_text(settings: CounterexampleSettings, rows: Sequence[Row]) -> str:
    part = settings.window
    lines = [
        [row["params"]["coordinates"], row["params"]["dtype"], row["params"]["method"]]
        + [
            "never" if (t := row["result"]["first_visible"][str(n)]) is None else str(t)
            for n in part.workers
        ]
        for row in _of(rows, part="window")
    ]
    return (
        "## The same at the paper's size, and round-off\n\nX is 2 x 2, SGD with rate"
        f" {part.rate:g}. The first step at which D^T X D has moved by more than {part.change:g},"
        f" within {part.steps} steps. Theorem 1 holds in exact arithmetic. In floating point every"
        " power iteration multiplies what round-off has brought into the subspace; with error"
        " feedback the memory grows in the hidden direction besides, and its round-off with it. In"
        " the paper's coordinates both entries of the basis are rounded alike; in rotated ones,"
        " which change nothing in the theorem, they are not.\n\n"
        + table(
            ["coordinates", "number type", "method"] + [f"N = {n}" for n in part.workers], lines
        )
    )


def _galore_text(settings: CounterexampleSettings, rows: Sequence[Row]) -> str:
    part = settings.galore
    lines = []
    for method in part.methods:
        cells = [method.name]
        for sigma in part.sigmas:
            for row in _of(rows, part="galore", sigma=sigma, method=method.name):
                last = row["result"]["last"].values()
                cells.append(
                    f"{row['result']['first']:.3f} → {mean(last):.2e} ({min(last):.1e} to"
                    f" {max(last):.1e})"
                )
        lines.append(cells + [""] * (1 + len(part.sigmas) - len(cells)))
    return (
        f"## GaLore's trap\n\nf(X) = ½‖AX‖² on {part.size} x {part.size} matrices, all singular"
        f" values of the gradient 0.5 at the start; noise of singular value sigma in a {part.block}"
        f" x {part.block} block that f does not see. SGD with rate {part.rate:g}, {part.steps}"
        f" steps, one worker. ‖∇f‖² at the start and at the end, mean over {len(part.seeds)} seeds,"
        " least and largest in brackets. Where the noise is stronger than the gradient, the"
        " leading singular vectors are the noise's at every refresh.\n\n![Squared gradient norm"
        " against step, cut off at 1e-8](galore.png)\n\n"
        + table(["method"] + [f"sigma = {sigma:g}" for sigma in part.sigmas], lines)
    )
