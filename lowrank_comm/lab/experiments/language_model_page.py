"""The page of `language_model`, computed from its rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from lowrank_comm.lab.experiment import Row
from lowrank_comm.lab.experiments.comparison import listed, table
from lowrank_comm.lab.experiments.language_model_results import Part, chosen_rate, tuning

HEADS = (
    "method",
    "learning rate",
    "perplexity",
    "ratio to full precision",
    "the paper's ratio",
    "against PowerSGD",
    "sent a step",
    "times less",
)


def page(settings: Any, rows: Sequence[Row]) -> str:
    parts = [
        _about(settings, rows),
        "![Gap to full precision by method, and against the bytes sent](gap.png)",
    ]
    final = Part(settings, rows, "final")
    for rank in final.ranks:
        parts += [f"## Rank {rank}", table(HEADS, final.lines(rank))]
    parts += [
        "Perplexity: mean ± standard deviation over the seeds. Ratio: of each seed's perplexities,"
        f" in the same way; beside it that of the paper's Table 3 (LLaMA {settings.paper} on C4,"
        " one seed; its GaLore runs are reported as diverged). Against PowerSGD: mean of the"
        " seeds' relative differences ± half of the 95 % confidence interval (Student's t); where"
        " that holds zero, the difference is inside the spread. Sent a step: the ledger's count of"
        " a worker; times less: than uncompressed, both as handed to the collectives."
        + _gathered(settings, rows),
        "## The paper's order",
        listed([claim for rank in final.ranks for claim in final.claims(rank)]),
        "## Does the gap shrink with the rank?",
        listed(final.shrinking()),
        f"![Training loss of every method at rank {final.ranks[0]}](curves.png)",
        "## Learning rates",
        _tuning_table(settings, rows),
    ]
    if settings.larger is not None:
        parts += _larger(settings, rows)
    return "\n\n".join(parts)


def _gathered(settings: Any, rows: Sequence[Row]) -> str:
    """State that gathered bytes weigh more than all-reduced ones."""
    final = [row for row in rows if row["params"]["part"] != "tune"]
    gathering = {
        row["params"]["method"] for row in final if "gather" in row["result"]["sent"]["bytes"]
    }
    names = [name for name in settings.methods if name in gathering]
    if not names:
        return ""
    return (
        f" What {', '.join(settings.methods[name].label for name in names)} sends is gathered: over"
        f" each link go N / 2 = {settings.workers / 2:g} times as many bytes as in an all-reduce of"
        " the same number."
    )


def _periods(settings: Any) -> str:
    """State tau, where all methods that restart have the same."""
    periods = {
        method.section["restart_every"]
        for method in settings.methods.values()
        if "restart_every" in method.section
    }
    return f", tau = {periods.pop()} for all that restart" if len(periods) == 1 else ""


def _about(settings: Any, rows: Sequence[Row]) -> str:
    training, recipe = settings.training, settings.training.recipe
    tokens = settings.workers * training.batch * settings.text.sequence_length
    text = (
        settings.text.hub or settings.text.documents or settings.text.file or "Shakespeare's plays"
    )
    sizes = {row["result"]["parameters"] for row in rows if row["params"]["part"] != "larger"}
    size = f" ({max(sizes) / 1e6:.2f}M parameters)" if sizes else ""
    return (
        f"LLaMA {training.model}{size} from random weights on {text}: {settings.workers} workers,"
        f" {recipe.steps} steps of {tokens:,} tokens, AdamW with {recipe.schedule} schedule,"
        f" {recipe.warmup_steps} steps of warm-up, clipping at {recipe.clip}{_periods(settings)}."
        f" The learning rate of each method is the best of {_list(settings.learning_rates)} at rank"
        f" {settings.tuning_rank} on seed {settings.tuning_seed}, judged on one half of the"
        f" held-out text; results are of the seeds {_list(settings.seeds)}, judged on the other"
        f" half ({settings.text.held_out_tokens // 2:,} tokens)."
    )


def _tuning_table(settings: Any, rows: Sequence[Row]) -> str:
    found, rates = tuning(rows), settings.learning_rates
    lines, edges = [], []
    for name, method in settings.methods.items():
        best = chosen_rate(found.get(name, {}))
        cells = [method.label]
        for rate in rates:
            if rate not in found.get(name, {}):
                cells.append("-")
                continue
            perplexity = found[name][rate]
            shown = "diverged" if perplexity is None else f"{perplexity:.2f}"
            cells.append(f"**{shown}**" if rate == best else shown)
        if best is not None and len(rates) > 1 and best in (min(rates), max(rates)):
            edges.append(f"{method.label} ({best:g})")
        lines.append(cells)
    note = (
        f"\n\nChosen at the edge of the grid, so perhaps not the best there is: {', '.join(edges)}."
        if edges
        else ""
    )
    runs = f"rank {settings.tuning_rank}, seed {settings.tuning_seed}"
    told = f"Held-out perplexity of the tuning runs ({runs}); the chosen one in bold."
    return f"{told}\n\n{table(['method', *(f'{rate:g}' for rate in rates)], lines)}{note}"


def _larger(settings: Any, rows: Sequence[Row]) -> list[str]:
    part, training = Part(settings, rows, "larger"), settings.larger.training
    sizes = {row["result"]["parameters"] for row in rows if row["params"]["part"] == "larger"}
    size = f" ({max(sizes) / 1e6:.2f}M parameters)" if sizes else ""
    parts = [
        f"## A larger model\n\nLLaMA {training.model}{size}, {training.recipe.steps} steps of"
        f" {settings.workers * training.batch * settings.text.sequence_length:,} tokens, with the"
        f" learning rates found for {settings.training.model}; seeds"
        f" {_list(settings.larger.seeds)}. Beside them the paper's LLaMA {part.column}."
    ]
    for rank in part.ranks:
        parts += [table(HEADS, part.lines(rank)), listed(part.claims(rank))]
    return parts


def _list(values: Iterable[Any]) -> str:
    return ", ".join(f"{value:g}" for value in values)
