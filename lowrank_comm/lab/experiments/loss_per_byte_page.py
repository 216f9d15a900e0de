"""The page of `loss_per_byte`, computed from its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lowrank_comm.lab.experiment import Row
from lowrank_comm.lab.experiments.comparison import Spread, listed, magnitude, table
from lowrank_comm.lab.experiments.loss_per_byte_results import (
    DENSE,
    GOAL_GAP,
    GOAL_RATIO,
    Final,
    Point,
    Ratio,
    best,
    factors_of,
    mean_loss,
    tuning,
)

HEADS = ("", "method", "sent a step", "times less", "ratio", "gap", "n", "rate", "seconds")


def page(settings: Any, rows: Sequence[Row]) -> str:
    """Return the page below its heading."""
    parts = [Final(settings, rows, base) for base in settings.bases]
    text = [_about(settings, rows), "## Does the goal hold?", listed(_goal(parts))]
    text.append("![Gap to uncompressed training against bytes, by base optimizer](pareto.png)")
    text.append(
        "Numbers are those of the tables below. Diamonds are the library's presets, circles"
        " PowerSGD in float32; filled marks and the line are the front of the means: no method"
        " that sends less ends lower. Bars are 95 % intervals; dotted lines are the goal."
    )
    for part in parts:
        text += [f"## {part.base}", table(HEADS, _lines(part))]
    text += [
        _legend(parts, settings),
        "## At equal bytes",
        "Each preset against PowerSGD with float32 factors that sends at least as much, perplexity"
        " over perplexity, seed by seed.",
        listed([line for part in parts for line in _against_rivals(part)]),
        "Expected, and what came out:",
        listed([line for part in parts for line in _claims(part)]),
        "## Where this library is not on the front",
        listed([line for part in parts for line in _beaten(part)]),
    ]
    if settings.curves:
        text.append("![Training loss, uncompressed and compressed](curves.png)")
    text += ["## The ruler", *_ruler(settings, rows)]
    return "\n\n".join(text)


def _about(settings: Any, rows: Sequence[Row]) -> str:
    training, recipe = settings.training, settings.training.recipe
    tokens = settings.workers * training.batch * settings.text.sequence_length
    text = (
        settings.text.hub or settings.text.documents or settings.text.file or "Shakespeare's plays"
    )
    sizes = {row["result"]["parameters"] for row in rows}
    size = f" ({max(sizes) / 1e6:.2f}M parameters)" if sizes else ""
    bases = {"adamw": "AdamW", "muon": "Muon on hidden matrices with AdamW on the rest"}
    tuned = any(settings.is_tuned(base, DENSE) for base in settings.bases)
    how = (
        f"Uncompressed training is tuned on the seeds {_list(settings.tuning_seeds)}, then the"
        " learning rate of each method on the same seeds, judged on one half of the held-out text;"
        if tuned
        else "Nothing is tuned here;"
    )
    return (
        f"LLaMA {training.model}{size} from random weights on {text}: {settings.workers} workers,"
        f" {recipe.steps} steps of {tokens:,} tokens, {recipe.schedule} schedule with"
        f" {recipe.warmup_steps} steps of rising learning rate, clipping at {recipe.clip}; bases:"
        f" {' and '.join(bases[base] for base in settings.bases)}. {how} results are of the seeds"
        f" {_list(settings.seeds)}, judged on the other half"
        f" ({settings.text.held_out_tokens // 2:,} tokens). A ratio is of perplexities, to"
        " uncompressed training under the same base and seed: exp of the mean difference of losses,"
        " with Student's 95 % interval over n seeds."
    )


def _lines(part: Final) -> list[list[str]]:
    """Return the lines of a base's table."""
    lines = []
    for number, point in enumerate(part.points):
        own = part.settings.methods.get(point.name)
        diverged = f" ({point.diverged} diverged)" if point.diverged else ""
        few = " (few seeds)" if own is not None and own.few else ""
        lines.append(
            [
                str(number),
                point.label + few + (" ‡" if point.gathered else ""),
                magnitude(point.sent),
                f"{point.times_less:.1f}",
                f"{point.gap.value:.3f}",
                point.gap.percent if point.name != DENSE else "-",
                f"{point.gap.n}{diverged}",
                f"{point.rate:g}",
                f"{point.seconds:.0f}",
            ]
        )
    return lines


def _legend(parts: Sequence[Final], settings: Any) -> str:
    """Return what the columns are, and that gathered bytes weigh more."""
    text = (
        "Sent a step: what a worker hands to collectives, over the whole model and all steps,"
        " warm-up among them; times less: than uncompressed. Rate: the tuned learning rate."
        " Seconds: of a run."
    )
    if any(point.gathered for part in parts for point in part.points):
        text += (
            " ‡ What it sends is gathered: over each link go N / 2 ="
            f" {settings.workers / 2:g} times as many bytes as in an all-reduce of the same number."
        )
    return text


def _goal(parts: Sequence[Final]) -> list[str]:
    """State for each base how far the library's settings come: the best one at the
    ratio asked for, and the highest ratio at which the gap asked for is had.
    """
    said, limit = [], 1 + GOAL_GAP
    aim = f"at most {100 * GOAL_GAP:g} % behind at {GOAL_RATIO:g} times fewer bytes or more"
    for part in parts:
        ours = [point for point in part.compressed if point.ours]
        near = [point for point in ours if point.times_less >= GOAL_RATIO]
        if not near:
            said.append(f"{part.base}, {aim}: not measured.")
            continue
        first = min(near, key=lambda point: point.gap.value)
        said.append(
            f"{part.base}, {aim}: {_reached(first)}. The lowest gap of {len(near)} settings there"
            f" is that of {_described(first)}."
        )
        enough = [point for point in ours if point.gap.value <= limit]
        if enough:
            most = max(enough, key=lambda point: point.times_less)
            said.append(
                f"{part.base}: the fewest bytes with a mean gap of at most {100 * GOAL_GAP:g} % are"
                f" those of {_described(most)}: {_reached(most)}."
            )
        else:
            said.append(f"{part.base}: no setting has a mean gap of {100 * GOAL_GAP:g} % or less.")
    return said


def _reached(point: Point) -> str:
    """Return whether a gap is inside the goal, outside, or too near to say."""
    limit, gap = 1 + GOAL_GAP, point.gap
    if gap.high is None or gap.low is None:
        return f"{'seen' if gap.value <= limit else 'not seen'} on one seed"
    if gap.high <= limit:
        return "**reached**"
    if gap.low > limit:
        return "**missed**"
    return f"undecided, {100 * GOAL_GAP:g} % is inside the interval"


def _described(point: Point) -> str:
    return (
        f"{point.label} ({magnitude(point.sent)} a step, {point.times_less:.1f} times less,"
        f" {point.gap.percent}, {point.gap.evidence})"
    )


def _against_rivals(part: Final) -> list[str]:
    """Hold each preset against PowerSGD in float32 that sends at least as much."""
    said = []
    rivals = [point for point in part.compressed if point.group == "rival"]
    for point in part.compressed:
        if point.group != "preset":
            continue
        dearer = [rival for rival in rivals if rival.sent >= point.sent]
        if not dearer:
            said.append(f"{part.base}, {point.label}: no such PowerSGD was run.")
            continue
        rival = min(dearer, key=lambda one: one.sent)
        found = part.ratio(point.name, rival.name)
        said.append(
            f"{part.base}, {point.label} ({magnitude(point.sent)}) against {rival.label}"
            f" ({magnitude(rival.sent)}): {_compared(found)}."
        )
    return said


def _claims(part: Final) -> list[str]:
    """State what was expected of pairs of methods, and what came out."""
    said = []
    for left, right in part.settings.claims:
        a, b = part.point(left), part.point(right)
        if part.base not in part.settings.methods[left].bases:
            continue
        claim = f"{part.base}, {part.label(left)} ends lower than {part.label(right)}"
        if a is None or b is None:
            said.append(f"{claim}: not measured.")
            continue
        found = part.ratio(left, right)
        word = "undecided"
        if found is not None and found.sign is not None:
            word = {-1: "holds", 0: "undecided", 1: "**contradicted**"}[found.sign]
        said.append(
            f"{claim} ({magnitude(a.sent)} and {magnitude(b.sent)} a step): {word},"
            f" {_compared(found)}."
        )
    return said


def _compared(found: Ratio | None) -> str:
    return "no seed in common" if found is None else f"{found.percent}, {found.evidence}"


def _beaten(part: Final) -> list[str]:
    """State which presets another method beats at no more bytes."""
    said = []
    for point in part.compressed:
        if point.group != "preset":
            continue
        other = part.beaten_by(point)
        if other is None:
            said.append(f"{part.base}, {point.label}: on the front.")
            continue
        found = part.ratio(other.name, point.name)
        said.append(
            f"{part.base}, {point.label} is **not on the front**: {other.label} sends"
            f" {magnitude(other.sent)} against {magnitude(point.sent)} and ends lower by"
            f" {_compared(found)}."
        )
    return said


def _ruler(settings: Any, rows: Sequence[Row]) -> list[str]:
    """Return the tables of dense tuning, and of the methods' learning rates."""
    parts = []
    for base, grid in settings.bases.items():
        if not settings.is_tuned(base, DENSE):
            parts.append(
                f"Uncompressed training with {base}: learning rate {grid.learning_rates[0]:g},"
                f" beta2 {grid.beta2[0]:g}, not tuned here."
            )
            continue
        tuned = tuning(rows, base, DENSE)
        chosen = best(tuned, settings.tuning_seeds)
        lines = [
            [
                f"{rate:g}",
                *(
                    _cell(tuned.get((rate, beta2), {}), settings, (rate, beta2) == chosen)
                    for beta2 in grid.beta2
                ),
            ]
            for rate in grid.learning_rates
        ]
        parts.append(
            f"Uncompressed training with {base} on the seeds {_list(settings.tuning_seeds)}: mean"
            " held-out loss ± standard deviation; the chosen point in bold."
            + _edge(chosen, grid.learning_rates)
        )
        parts.append(
            table(["learning rate", *(f"beta2 = {beta2:g}" for beta2 in grid.beta2)], lines)
        )
    lines, edges = [], []
    for base in settings.bases:
        for name, method in settings.methods.items():
            if base not in method.bases or not settings.is_tuned(base, name):
                continue
            tuned = tuning(rows, base, name)
            chosen, factors = best(tuned, settings.tuning_seeds), factors_of(settings, name)
            cells = [
                f"×{factor:g}: {_cell(tuned[factor], settings, factor == chosen)}"
                for factor in factors
                if factor in tuned
            ]
            if cells:
                lines.append([base, method.label, "; ".join(cells)])
            if chosen is not None and chosen in (min(factors), max(factors)):
                edges.append(f"{method.label} ({base}, ×{chosen:g})")
    if lines:
        parts.append(
            "Learning rates of the methods, as factors of the uncompressed one, on the same seeds."
            + (f" Chosen at the edge of the grid: {', '.join(edges)}." if edges else "")
        )
        parts.append(table(["base", "method", "mean held-out loss"], lines))
    return parts


def _cell(losses: dict[int, float | None], settings: Any, chosen: bool) -> str:
    mean = mean_loss(losses, settings.tuning_seeds)
    if mean is None:
        return "diverged" if None in losses.values() else "-"
    found = Spread.of([losses[seed] for seed in settings.tuning_seeds])  # type: ignore[misc]
    text = f"{mean:.3f}" if found is None else found.text(3)
    return f"**{text}**" if chosen else text


def _edge(chosen: tuple[float, float] | None, rates: Sequence[float]) -> str:
    if chosen is None or len(rates) < 2 or chosen[0] not in (min(rates), max(rates)):
        return ""
    return " It lies at the edge of the grid, so perhaps it is not the best there is."


def _list(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)
