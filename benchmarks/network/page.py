"""The tables of `benchmarks.bench_network`, as Markdown: what it prints, and its
section of docs/benchmarks.md. All figures and names are those of the JSON file.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Cells = dict[str, dict[str, dict[str, dict[str, Any]]]]
"""Network -> model -> method -> figures, or {"reason": why there are none}."""


def section(evidence: dict[str, Any]) -> str:
    """Return the section of a run's JSON file."""
    results = evidence["results"]
    cells: Cells = results["cells"]
    networks: dict[str, str] = results["networks"]
    labels: dict[str, str] = results["methods"]
    lines = [
        "## Peers on a shaped network",
        "",
        *_how(results),
        "",
        "Seconds of a step, and in brackets its ratio to DDP in fp32 (the median of the paired",
        "ratios, with quartiles; below 1 is faster). **lost**: a peer is faster by both quartiles;",
        "level: the quartiles lie on both sides of 1.",
        "",
    ]
    for model, parameters in results["models"].items():
        of = {method: [cells[one][model][method] for one in networks] for method in labels}
        lines += [f"### LLaMA {model}, {parameters / 1e6:.2f}M parameters", ""]
        lines += _table(
            ["", *networks.values()],
            [[labels[method], *map(_time, found)] for method, found in of.items()],
        )
        lines += ["", "MB that a step puts on a host's link, over all networks:", ""]
        lines += _table(
            ["", "by the kernel", "by the ledger", "kernel / expected"],
            [[labels[method], *_bytes(found)] for method, found in of.items()],
        )
        lines.append("")
    lines += [*_about_bytes(results), "", "### Where a peer wins", ""]
    lines += list(_lost(cells, networks, labels)) or ["In no cell of this run."]
    restarts = list(_restarts(cells, networks))
    if restarts:
        lines += [
            "",
            f"### PowerSGD+ with its restarts, every {results['restart_every']} steps",
            "",
            "A step above is an ordinary one. The first step restarts, and was timed once:",
            "",
            *restarts,
        ]
    return "\n".join(lines) + "\n"


def _how(results: dict[str, Any]) -> list[str]:
    return [
        f"{results['hosts']} hosts (network namespaces, gloo, TCP {results['congestion_control']}),"
        f" a sequence of {results['sequence']} tokens a host and",
        f"step, SGD, DeepSpeed {results['deepspeed']}; {results['repetitions']} repetitions, in"
        " each of which every method takes its",
        "turn in an order drawn anew. All hosts compute on the same cores, so a step has more",
        f"computation in it than on machines of their own. HSDP's {results['nodes']} nodes are"
        " joined inside by the same",
        "links as between, which is not what HSDP is for.",
    ]


def _time(found: dict[str, Any]) -> str:
    if "reason" in found:
        return found["reason"]
    text = f"{found['seconds']['median']:.3g}"
    if "over_ddp" in found:
        ratio = found["over_ddp"]
        text += f" ({ratio['median']:.3g}; {ratio['low']:.3g}-{ratio['high']:.3g})"
    stands = found["against_peers"]
    word = stands["verdict"] if stands is not None else "won"
    return f"{text} {'**lost**' if word == 'lost' else word}" if word != "won" else text


def _bytes(of_networks: list[dict[str, Any]]) -> list[str]:
    there = [found for found in of_networks if "reason" not in found]
    if not there:
        return ["", "", ""]
    ledger = there[0]["ledger_bytes"]
    return [
        _range([found["sent_bytes"] / 1e6 for found in there]),
        "" if ledger is None else f"{ledger / 1e6:.3g}",
        _range([found["kernel_over_expected"] for found in there]),
    ]


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low}-{high}"


def _about_bytes(results: dict[str, Any]) -> list[str]:
    allowance = results["allowance"]
    return [
        f"The ledger counts payloads, of which a ring sends {2 * (results['hosts'] - 1)}/"
        f"{results['hosts']}. Expected is that, and what the",
        "engine's or the peer's own collectives send by gloo's algorithms, and an allowance of",
        f"{allowance['headers']:.1%} for TCP/IP headers and acknowledgements and of"
        f" {allowance['message_bytes']} bytes for each of gloo's",
        "messages (`benchmarks/network/traffic.py`).",
    ]


def _lost(cells: Cells, networks: dict[str, str], labels: dict[str, str]) -> Iterator[str]:
    for network, name in networks.items():
        for model, methods in cells[network].items():
            for method, found in methods.items():
                stands = found.get("against_peers")
                if stands is not None and stands["verdict"] == "lost":
                    ratio = stands["ratio"]
                    yield (
                        f"- {name}, {model}: {labels[method]} takes {ratio['median']:.2f}"
                        f" ({ratio['low']:.2f}-{ratio['high']:.2f}) times as long as"
                        f" {labels[stands['peer']]}"
                    )


def _restarts(cells: Cells, networks: dict[str, str]) -> Iterator[str]:
    for network, name in networks.items():
        for model, methods in cells[network].items():
            for found in methods.values():
                if "restart_seconds" in found:
                    yield (
                        f"- {name}, {model}: {found['restart_seconds']:.3g} s; a step is then"
                        f" {found['seconds_with_restarts']:.3g} s on average"
                    )


def _table(heads: list[str], rows: list[list[str]]) -> list[str]:
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return ["| " + " | ".join(cell or " " for cell in line) + " |" for line in lines]
