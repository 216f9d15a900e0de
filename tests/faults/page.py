# ruff: noqa: E501 - the sentences of a page
"""`docs/reliability.md` from what a campaign has left in its folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.injectors import KINDS
from tests.faults.judge import TARGETS
from tests.faults.plan import EVERY, IMPOSSIBLE, STEPS
from tests.faults.soak import growth
from tests.faults.worker import ENGINES, WORLD
from tests.support import ROOT

PAGE = ROOT / "docs" / "reliability.md"

NAMES = {
    "plain": "plain loop", "ddp": "DDP", "fsdp2": "FSDP2", "hsdp": "HSDP", "zero1": "ZeRO-1",
    "zero3": "ZeRO-3", "trainer": "Trainer",
}  # fmt: skip
WHAT = {
    "SIGKILL": "a rank is killed: in a step, at a change of a file in a save, at any time in a"
    " save, right after one",
    "SIGSTOP": "a rank stands still for 30 s; the group waits 90 s or 15 s",
    "exception": "a rank raises, in a step or before a save",
    "exit 0": "a rank leaves by `sys.exit(0)`",
    "link down": "a host's cable is out for 10 s (network namespaces); the group waits 90 s or 5 s",
    "full disk": "the checkpoints' file system is full, but for some bytes, before a save",
    "read-only disk": "the checkpoints' file system becomes read-only before a save",
    "damaged file": "a file of the newest checkpoint is cut short, flipped in a bit, zeroed,"
    " extended or removed between two starts: any file of a save by `save_all`, else the one that holds"
    " the compressor's state (ZeRO: our own beside DeepSpeed's; Trainer: optimizer.pt)",
}


PUBLISHED = Path(__file__).with_name("published.json")
"""What the page in docs was written from: the rows without what the ranks said."""

Found = dict[str, list[dict[str, Any]]]
"""Rows of faults, soaks, verdicts ("judged") and machines, in a fixed order."""


def read(folder: Path) -> Found:
    """Read what a campaign has left; of the ranks' words, only those of bad ends."""
    file = folder / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
    rows.sort(key=lambda row: (KINDS.index(row["kind"]), ENGINES.index(row["engine"]), row["seed"]))
    for row in rows:
        if not row["wrong"]:
            row["said"] = row["refusal"] = []
        for name in ("point", "step", "codes", "limit", "wall", "struck", "key"):
            del row[name]
    soaks = [json.loads(one.read_text()) for one in sorted(folder.glob("soak/*/soak-0.json"))]
    judged = [json.loads(one.read_text()) for one in folder.glob("judge/*/verdicts.json")]
    judged.sort(key=lambda one: (one["name"].startswith("plain"), one["name"]))
    machines = sorted({json.dumps(row.pop("machine")) for row in rows})
    return {
        "rows": rows,
        "soaks": soaks,
        "judged": judged,
        "machines": [json.loads(one) for one in machines],
    }


def write(folder: Path, page: Path) -> None:
    """Write the page, and what it was written from."""
    found = read(folder)
    page.write_text(text(found), encoding="utf-8")
    if page == PAGE:
        lines = [
            f"{json.dumps(name)}: [\n" + ",\n".join(json.dumps(one) for one in several) + "\n]"
            for name, several in found.items()
        ]
        PUBLISHED.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
    print(f"{page} written")


def text(found: Found) -> str:
    """The whole page."""
    rows = found["rows"]
    parts = [_head(rows, found["machines"]), _matrix(rows), _incidents(rows), TORCHRUN]
    parts += [_soak(found["soaks"]), _judged(found["judged"])]
    return "\n".join(line for part in parts for line in part)


TORCHRUN = [
    "## What the engines do by themselves", "",
    "Seen while the campaign was written:", "",
    "- **DeepSpeed** names a tag in `latest` before it waits for the other ranks. If one of them cannot write its part (seen once: ZeRO-1, a full"
    " disk), `latest` names a tag that does not load; write the tag before it into `latest`.",
    "- **Trainer** resumes from the folder with the highest number, complete or not; where optimizer.pt is missing, it goes on with a new"
    " optimizer. `examples/checkpoints.py` finds the newest complete one, and `CompressionCallback` says when the optimizer starts anew.",
    "- **torch.load** checks no sums: a flipped bit in the data of optimizer.pt is loaded. `save_all` keeps a SHA-256 of every file, and our own"
    " file beside DeepSpeed's checkpoint a checksum.", "",
    "## torchrun --max-restarts", "",
    "`tests/faults/test_elastic.py` kills a rank of two in mid-step. With `--max-restarts` both start again and go on from the newest"
    " save; without, the job comes back with one rank. Both end within 1e-9 of the uninterrupted run's parameters (DDP, float64).", "",
    "A restart fails some of the time before any training begins, with or without this library: the agent's store outlives the restart, and the"
    " ranks of the next start read the dead ones' gloo addresses in it (torch 2.13: `Gloo connectFullMesh failed`). torchrun counts that as"
    " one more restart. A name of its own for each start helps: `store, rank, world = next(dist.rendezvous(\"env://\"))`, then"
    " `init_process_group(store=dist.PrefixStore(os.environ[\"TORCHELASTIC_RESTART_COUNT\"], store), rank=rank, world_size=world)`.", "",
]  # fmt: skip


def _upstream(row: dict[str, Any]) -> bool:
    """Whether the engine alone, without this library, ends the same fault as badly."""
    return bool(row["wrong"]) and set(row["wrong"]) <= set(row.get("wrong without compression", []))


def _head(rows: list[dict[str, Any]], machines: list[dict[str, Any]]) -> list[str]:
    commits = sorted({one["commit"] for one in machines})
    here = machines[0] if machines else {}
    versions = ", ".join(
        f"{name} {here[name]}"
        for name in ("torch", "deepspeed", "transformers", "accelerate", "safetensors")
        if name in here
    )
    seeds = Counter((row["engine"], row["kind"]) for row in rows)
    least = min(seeds.values(), default=0)
    went, back = (sum(row["outcome"] == o for row in rows) for o in ("went on", "resumed"))
    refused = sum(row["outcome"].startswith(("refused", "passed")) for row in rows)
    bad = [row for row in rows if row["wrong"]]
    ours = [row for row in bad if not _upstream(row)]
    useful, done = STEPS * len(rows), sum(row["executed"] for row in rows)
    told = [row for row in rows if row["outcome"].startswith("told")]
    finite = [row for row in rows if not row["wrong"] and row not in told]
    worst, anew = (
        max((max(row["worst loss"], row["worst parameter"]) for row in some), default=0.0)
        for some in (finite, told)
    )
    slowest = max(
        (
            row["seconds"]
            for row in rows
            if row["outcome"] != "went on" and row["kind"] not in ("SIGSTOP", "link down")
        ),
        default=0.0,
    )
    return [
        "# Reliability", "",
        "What happens to a run when a process, a link, a disk or a file fails. Written by `make faults`"
        " (`python -m tests.faults.campaign run`, `soak`, `judge`, `report`;"
        " [tests/faults](../tests/faults/README.md)) from what it found; nothing here is edited by hand.", "",
        f"**{len(rows)} faults** were injected: {len(seeds)} cells of {len(NAMES)} engines and {len(KINDS)} kinds, at least {least} seeds a cell."
        + (" No cell is impossible." if not IMPOSSIBLE else f" Impossible: {IMPOSSIBLE}."),
        "", "| | |", "| --- | ---: |",
        f"| the run went on, nothing lost | {went} |",
        f"| it ended on all ranks, and was started again from its newest checkpoint | {back} |",
        f"| a damaged checkpoint was passed over or refused, and the one before it loaded | {refused} |",
        f"| the optimizer's file was gone: told, and the optimizer started anew | {len(told)} |",
        f"| **hung** beyond the fault's length and the group's timeout | **{sum('hang' in row['wrong'] for row in rows)}** |",
        f"| **diverged** from the uninterrupted run | **{sum('diverged' in row['wrong'] or 'ranks differ' in row['wrong'] for row in rows)}** |",
        f"| lost more than one save interval | {sum('more than one save interval lost' in row['wrong'] for row in rows)} |",
        f"| not as it must be, in any way; of these the engine alone does the same | {len(bad)}; {len(bad) - len(ours)} |",
        f"| largest difference to the uninterrupted run, of all losses and parameters | {f'{worst:.1e}' if worst else '0, to the bit'} |",
        f"| the same where the optimizer started anew | {f'{anew:.1e}' if told else 'no such run'} |",
        f"| longest until all ranks had ended (SIGSTOP and links aside) | {slowest:.1f} s |",
        f"| goodput: useful steps over all steps, a fault in every {STEPS} steps | {useful / max(done, 1):.1%} |",
        "",
        f"A run has {STEPS} steps with a checkpoint every {EVERY}, in float64 (DeepSpeed: float32), on {WORLD['ddp']} gloo ranks ({WORLD['hsdp']} for HSDP)."
        " The fault strikes one rank at a seeded moment (a hang: ranks that live on for 20 s after fault and timeout are over); then the same command starts the run again until it ends. Every loss that any rank"
        " computed and all parameters at the end are compared with those of a run that nothing struck (tolerance 1e-9, relative), and the"
        " ranks' parameters with each other (bit by bit). Checkpoints follow the documented recipes.", "",
        f"Machine: {here.get('cores')} cores, shared with other work while the campaign ran; {here.get('system')}, Python {here.get('python')}, {versions}."
        f" Checkout: {', '.join(commits)}. Seeds: 0 to {max((row['seed'] for row in rows), default=0)} of each cell; rank, step, moment and damage follow from engine, kind and seed.",
        "",
    ]  # fmt: skip


def _matrix(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## The matrix", "",
        "Faults that ended as they must / faults injected; beside it what the runs did: `c` went on, `r` resumed, `p` passed over a"
        " damaged checkpoint by itself, `x` refused it, and a person had to remove it; `t` Trainer found no"
        " optimizer.pt and went on with a new optimizer, which the callback says.", "",
        "| | " + " | ".join(NAMES[engine] for engine in ENGINES) + " |",
        "| --- |" + " --- |" * len(ENGINES),
    ]  # fmt: skip
    for kind in KINDS:
        cells = []
        for engine in ENGINES:
            mine = [row for row in rows if (row["engine"], row["kind"]) == (engine, kind)]
            if not mine:
                cells.append(IMPOSSIBLE.get((engine, kind), "not run"))
                continue
            marks = Counter(
                {
                    "went on": "c",
                    "resumed": "r",
                    "passed over": "p",
                    "told that the optimizer starts anew": "t",
                }.get(row["outcome"], "x")
                for row in mine
            )
            good = sum(not row["wrong"] for row in mine)
            did = " ".join(f"{count}{mark}" for mark, count in sorted(marks.items()))
            cells.append(f"{good}/{len(mine)} ({did})")
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- **{kind}**: {WHAT[kind]}." for kind in KINDS), ""]
    lines += [
        "Steps done twice, mean and most, and seconds from the fault to the end of the last rank (median, most):",
        "",
    ]
    lines += ["| kind | steps again | seconds |", "| --- | ---: | ---: |"]
    for kind in KINDS:
        mine = [row for row in rows if row["kind"] == kind]
        if mine:
            seconds = sorted(row["seconds"] for row in mine)
            lost = [row["lost"] for row in mine]
            lines.append(
                f"| {kind} | {sum(lost) / len(lost):.1f}, {max(lost)} |"
                f" {seconds[len(seconds) // 2]:.1f}, {seconds[-1]:.1f} |"
            )
    return [*lines, ""]


def _incidents(rows: list[dict[str, Any]]) -> list[str]:
    bad = [row for row in rows if row["wrong"]]
    lines = ["## What did not end as it must", ""]
    if not bad:
        return [*lines, "Nothing.", ""]
    lines += [
        "Each of these was done again without this library, by the engine's own averaging.", "",
        "| fault | what | without this library | said |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in bad:
        said = (row["refusal"] or row["said"] or [""])[-1][:140].replace("|", "/")
        what = ", ".join(row["wrong"]) + (
            f" ({row['damage']}: {row['damaged']})" if row["damage"] else ""
        )
        bare = ", ".join(row.get("wrong without compression", ["not run"])) or "as it must"
        lines.append(
            f"| {NAMES[row['engine']]}, {row['kind']}, seed {row['seed']} | {what} | {bare} | {said} |"
        )
    return [*lines, ""]


def _soak(soaks: list[dict[str, Any]]) -> list[str]:
    if not soaks:
        return ["## Soak", "", "Not run.", ""]
    lines = [
        "## Soak", "",
        "Two ranks; about every seventh step a fault that the run survives (a gradient that is not finite, a batch given up, an"
        " exception, a state dict taken and loaded, a save that fails, a save and its load). From a fifth of the run to its end the process"
        " grew by:", "",
        "| engine | steps | faults | RSS | live tensors | file descriptors | threads | goodput |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for one in soaks:
        grown, last = growth(one["held"]), one["held"][-1]
        lines.append(
            f"| {NAMES[one['engine']]} | {one['steps']:,} | {sum(one['faults'].values())} |"
            f" {grown['RSS (kB)'] / 1000:+.1f} MB of {last['RSS (kB)'] / 1000:.0f} |"
            f" {grown['live tensors']:+d} of {last['live tensors']} |"
            f" {grown['file descriptors']:+d} of {last['file descriptors']} |"
            f" {grown['threads']:+d} of {last['threads']} | {one['goodput']:.1%} |"
        )
    return [*lines, ""]


def _judged(judged: list[dict[str, Any]]) -> list[str]:
    lines = ["## Somebody else's judge", ""]
    if not judged:
        return [*lines, "Not run.", ""]
    versions = judged[0]["versions"]
    lines += [
        "[ckpt-chaos](https://pypi.org/project/ckpt-chaos/) (MIT) kills rank 0 before a change of a file, with that file cut in half, or with"
        " all that was not fsynced gone (loops only), starts the same command again, and compares. Points were taken evenly over all that there"
        " are. `examples/train.py` runs on two ranks with `--resume_from_checkpoint auto`; lost work (`-`) is not judged where a save is part of"
        f" its files' names, as with DeepSpeed and compression. Python {versions['python']}, the versions above.", "",
        "| script | points | PASS | HARD_FAIL | SILENT_DIVERGENCE | LOST_WORK |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for one in judged:
        shown = dict(one["counts"])
        if not one["judges lost work"]:
            shown["LOST_WORK"] = "-"
        counts = " | ".join(map(str, shown.values()))
        lines.append(f"| {one['name']} | {one['points']} | {counts} |")
    left = [one.name for one in TARGETS if one.name not in {other["name"] for other in judged}]
    if left:
        lines += ["", f"Not run in this campaign, for want of time: {'; '.join(left)}."]
    failed = [(one["name"], line) for one in judged for line in one["failed"]]
    lines += ["", *(f"- {name}: {line.replace('|', '/')}" for name, line in failed)]
    return [*lines, ""]
