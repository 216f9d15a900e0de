"""The fault campaign: strike a training, start it again, and compare it with one that
nothing has struck.

    # the whole matrix, resumable: a line of rows.jsonl for each fault
    python -m tests.faults.campaign run --folder runs/faults
    # a part of it
    python -m tests.faults.campaign run --folder runs/faults --engine ddp --kind SIGKILL
    # docs/reliability.md from the rows
    python -m tests.faults.campaign report --folder runs/faults

What is asked of every fault:

- no rank waits longer than the fault lasts and the group's timeout allows;
- the run goes on or ends, and started again it ends as the uninterrupted one: the loss
  of every step on every rank and all parameters to TOLERANCE, and the ranks' parameters
  equal to the bit;
- at most one save interval is done again;
- a damaged file is passed over, or refused, and the checkpoint before it loads.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from tests.faults import injectors
from tests.faults.plan import EVERY, SEEDS, STEPS, Measured, Planned, cells, plan
from tests.faults.processes import Ended, limit, start, struck_at
from tests.faults.recipes import KEPT
from tests.faults.worker import ENGINES, WORLD, Job
from tests.support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import netlab

BY_US = ("plain", "ddp", "fsdp2", "hsdp")
"""Engines whose checkpoints `save_all` writes; the others have their own."""
TOLERANCE = 1e-9
"""Of losses and parameters, relative to the largest parameter: the gradients are the
same, and float64 loses less in 12 steps."""
ROWS = "rows.jsonl"
TOLD = "no optimizer's state was loaded"
"""What the callback says where Trainer finds no optimizer.pt, and goes on."""


@dataclass(frozen=True)
class Reference:
    """The run that nothing struck: losses by rank and step, parameters, its saves."""

    losses: list[dict[int, float]]
    parameters: dict[str, torch.Tensor]
    measured: Measured


def log_of(folder: Path, rank: int) -> list[dict[str, Any]]:
    """A rank's own account; a kill may have cut the last line."""
    file = folder / "log" / f"rank{rank}.jsonl"
    if not file.is_file():
        return []
    text = file.read_text(encoding="utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def losses_of(folder: Path, world: int) -> list[dict[int, list[float]]]:
    """Every loss that was computed, by rank and step."""
    found: list[dict[int, list[float]]] = [{} for _ in range(world)]
    for rank, losses in enumerate(found):
        for line in log_of(folder, rank):
            if line.get("event") == "step":
                losses.setdefault(line["step"], []).append(line["loss"])
    return found


def reference(engine: str, folder: Path, compressed: bool = True) -> Reference:
    """Run an engine without a fault, or read what an earlier call has left."""
    world = WORLD[engine]
    if not (folder / "final.pt").is_file():
        shutil.rmtree(folder, ignore_errors=True)
        ended = start(Job(engine, str(folder), STEPS, EVERY, compressed=compressed), 0)
        if any(ended.codes):
            raise RuntimeError(f"{engine} fails without a fault: {ended.said}")
    saves = [
        [line for line in log_of(folder, rank) if line["event"] == "saved"] for rank in range(world)
    ]
    size = sum(
        file.stat().st_size for file in (folder / "checkpoints").rglob("*") if file.is_file()
    )
    measured = Measured(
        # the first save allocates
        seconds=max(save["seconds"] for save in saves[0][1:]),
        events=[rank[-1]["events"] for rank in saves],
        bytes=size // (KEPT if engine in BY_US else STEPS // EVERY),
    )
    losses = [{step: one[0] for step, one in rank.items()} for rank in losses_of(folder, world)]
    return Reference(losses, torch.load(folder / "final.pt"), measured)


@contextmanager
def disk(job: Job, size: int | None) -> Iterator[None]:
    """A small file system of its own for the checkpoints, where `size` is given."""
    if size is None:
        yield
        return
    job.checkpoints.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(job.checkpoints)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(job.checkpoints)], check=True)


@contextmanager
def network(planned: Planned) -> Iterator[tuple[Planned, Any]]:
    """Hosts with a link each, for the fault that cuts one."""
    if planned.kind != "link down":
        yield planned, None
        return
    with netlab.Lab(WORLD[planned.engine], 1000) as lab:
        fault = replace(planned.fault, link=(f"{lab.name}sw", f"p{planned.fault.rank}"))
        yield replace(planned, fault=fault), lab


def missing(kind: str) -> str | None:
    """Why a kind of fault cannot be injected on this machine, or None."""
    if kind == "link down":
        return netlab.missing()
    if kind in ("full disk", "read-only disk") and os.geteuid() != 0:
        return "mounting a small file system needs root"
    return None


def state_files(job: Job) -> list[Path]:
    """The files of the newest checkpoint that hold the compressor's state."""
    newest = newest_checkpoint(job)
    if newest is None:
        return []
    files = sorted(file for file in newest.rglob("*") if file.is_file())
    ours = [file for file in files if file.name.startswith("lowrank_comm")]
    return ours or [file for file in files if file.name == "optimizer.pt"] or files


def newest_checkpoint(job: Job) -> Path | None:
    """The checkpoint of the highest number that has its final name."""
    numbered = [
        (int(path.name.rpartition("-")[2]), path)
        for path in job.checkpoints.glob("*-*")
        if path.name.rpartition("-")[2].isdigit()
    ]
    return max(numbered)[1] if numbered else None


def remove_newest(job: Job) -> None:
    """What a person does with a checkpoint that is refused."""
    newest = newest_checkpoint(job)
    if newest is None:
        return
    shutil.rmtree(newest)
    if job.engine.startswith("zero") and (before := newest_checkpoint(job)) is not None:
        (job.checkpoints / "latest").write_text(before.name)


def repair(job: Job, planned: Planned) -> str:
    """Between two starts: what the machine's owner does about a disk, or the damage to
    a file. What was damaged, if anything.
    """
    if planned.kind == "full disk":
        (job.checkpoints / injectors.FILLER).unlink(missing_ok=True)
    elif planned.kind == "read-only disk":
        subprocess.run(["mount", "-o", "remount,rw", str(job.checkpoints)], check=True)
    elif planned.kind == "damaged file":
        files = state_files(job)
        file = files[int(planned.file * len(files))]
        injectors.damage(file, planned.damage, planned.where)
        return file.name
    return ""


def strike(
    planned: Planned, folder: Path, expected: Reference, compressed: bool = True
) -> dict[str, Any]:
    """Do one fault; its row."""
    shutil.rmtree(folder, ignore_errors=True)
    began, checkpoint = time.time(), expected.measured.bytes
    on_disk = planned.kind in ("full disk", "read-only disk")
    with network(planned) as (drawn, lab):
        job = Job(
            planned.engine, str(folder), STEPS, EVERY, drawn.timeout, compressed, fault=drawn.fault
        )
        # room for all checkpoints, and for one that is being written
        with disk(job, int(checkpoint * 6 + 2e6) if on_disk else None):
            first = start(job, 0, lab=lab)
            damaged = repair(job, planned)
            ends, refusals = [first], []
            again = replace(job, fault=None, timeout=60.0)
            while any(ends[-1].codes) and len(ends) < 5 and struck_at(folder) is not None:
                before = len(starts(folder))
                ends.append(start(again, len(ends)))
                if any(ends[-1].codes):
                    refusals.append(ends[-1].said)
                    if len(starts(folder)) == before:
                        remove_newest(job)
                elif not any(ended_well(folder, rank) for rank in range(WORLD[job.engine])):
                    break
    row = judge(job, planned, expected, ends, refusals)
    return row | {"damaged": damaged, "wall": round(time.time() - began, 1)}


def struck(planned: Planned, folder: Path, expected: Reference) -> dict[str, Any]:
    """Do a fault; again if the run ended before it came, as on a machine so busy that a
    short timeout of the group was over first.
    """
    for _ in range(2):
        row = strike(planned, folder, expected)
        if row["struck"]:
            return row
    return strike(planned, folder, expected)


def starts(folder: Path) -> list[int]:
    """First steps of all starts, as rank 0 tells them."""
    return [line["first"] for line in log_of(folder, 0) if line["event"] == "start"]


def ended_well(folder: Path, rank: int) -> str | None:
    """The hash of the parameters that a rank ended with, if it has."""
    digests = [line["digest"] for line in log_of(folder, rank) if line["event"] == "end"]
    return digests[-1] if digests else None


def judge(
    job: Job, planned: Planned, expected: Reference, ends: list[Ended], refusals: list[list[str]]
) -> dict[str, Any]:
    """Compare with the uninterrupted run; the row, with what was not as it must be."""
    folder, world = Path(job.folder), WORLD[job.engine]
    logs = [log_of(folder, rank) for rank in range(world)]
    done = [[line["step"] for line in log if line["event"] == "step"] for log in logs]
    # of the rank that got furthest: in each start, and in all
    executed = max(len(steps) for steps in done)
    resumed = starts(folder)[1:]
    lost = 0
    for first in resumed:
        lost = max(lost, _reached_before(logs, first) - (first - 1))
    wrong, worst = [], 0.0
    if any(ended.hung for ended in ends):
        wrong.append("hang")
    for rank, losses in enumerate(losses_of(folder, world)):
        for step, several in losses.items():
            for loss in several:
                worst = max(worst, _relative(loss, expected.losses[rank][step]))
    final = folder / "final.pt"
    told = planned.kind == "damaged file" and any(
        TOLD in output.read_text(errors="replace") for output in folder.glob("output-[1-9]*.txt")
    )
    if any(ends[-1].codes) or not final.is_file():
        wrong.append("not finished")
        apart = float("nan")
    else:
        parameters = torch.load(final)
        apart = max(
            float((parameters[name] - one).abs().max() / one.abs().max())
            for name, one in expected.parameters.items()
        )
        if max(worst, apart) > TOLERANCE and not told:
            wrong.append("diverged")
        if len({ended_well(folder, rank) for rank in range(world)}) > 1:
            wrong.append("ranks differ")
    if lost > EVERY:
        wrong.append("more than one save interval lost")
    if refusals and planned.kind != "damaged file":
        wrong.append("a checkpoint had to be removed by hand")
    if len(refusals) > 1:
        wrong.append("more than one checkpoint refused")
    outcome = "went on" if len(ends) == 1 else "resumed"
    if planned.kind == "damaged file" and lost:
        outcome = "refused, resumed from the one before" if refusals else "passed over"
    if told:
        outcome = "told that the optimizer starts anew"
    return {
        "key": planned.key, "engine": planned.engine, "kind": planned.kind, "seed": planned.seed,
        "struck": struck_at(folder) is not None, "outcome": outcome, "wrong": wrong,
        "rank": planned.fault.rank, "point": planned.fault.point, "step": planned.fault.step,
        "timeout": planned.timeout, "damage": planned.damage, "codes": ends[0].codes,
        "seconds": round(max(ends[0].seconds), 2), "limit": limit(job),
        "lost": lost, "executed": executed, "worst loss": worst, "worst parameter": apart,
        "said": [line[:160] for line in ends[0].said],
        "refusal": [line[:240] for line in refusals[0]] if refusals else [],
    }  # fmt: skip


def _reached_before(logs: list[list[dict[str, Any]]], first: int) -> int:
    """The last step that any rank had done before the start that began with `first`."""
    reached = 0
    for log in logs:
        seen = 0
        for line in log:
            if line["event"] == "start" and line["first"] == first and seen:
                break
            if line["event"] == "step":
                seen = max(seen, line["step"])
        reached = max(reached, seen)
    return reached


def _relative(one: float, other: float) -> float:
    return abs(one - other) / max(abs(other), 1e-12)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    describe = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False)
    packages = ("torch", "deepspeed", "transformers", "accelerate", "safetensors")
    return {
        "commit": commit.stdout.strip(),
        "cores": len(os.sched_getaffinity(0)),
        "system": platform.system() + " " + platform.release(),
        "python": platform.python_version(),
        **{package: version(package) for package in packages},
    }


app = typer.Typer(add_completion=False, help=__doc__)


@app.command()
def run(
    folder: Annotated[Path, typer.Option(help="Where rows and runs lie.")] = Path("runs/faults"),
    engine: Annotated[list[str] | None, typer.Option(help="Only these engines.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Only these kinds.")] = None,
    seeds: Annotated[int, typer.Option(help="Seeds of a cell.")] = SEEDS,
    jobs: Annotated[int, typer.Option(help="Faults side by side.")] = 3,
    keep: Annotated[bool, typer.Option(help="Keep the folders of faults that went well.")] = False,
) -> None:
    """Do all faults that are not in rows.jsonl yet."""
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    rows, lock = folder / ROWS, threading.Lock()
    had = (
        {json.loads(line)["key"] for line in rows.read_text().splitlines()}
        if rows.is_file()
        else set()
    )
    wanted = [
        (one, what, seed)
        for seed in range(seeds)
        for one, what in cells()
        if (not engine or one in engine) and (not kind or what in kind)
    ]
    wanted = [(one, what, seed) for one, what, seed in wanted if f"{one}/{what}/{seed}" not in had]
    expected = {
        one: reference(one, folder / "references" / one)
        for one in ENGINES
        if any(one == cell[0] for cell in wanted)
    }
    here = machine()

    def without(one: str) -> Reference:
        with lock:
            return reference(one, folder / "references" / f"{one}-bare", compressed=False)

    def do(cell: tuple[str, str, int]) -> dict[str, Any]:
        planned = plan(*cell, expected[cell[0]].measured)
        if (why := missing(planned.kind)) is not None:
            return {"key": planned.key, "skipped": why}
        place = folder / planned.key.replace(" ", "-").replace("/", "_")
        row = struck(planned, place, expected[planned.engine])
        if not row["struck"]:
            return {"key": planned.key, "skipped": "the run ended before the fault came"}
        if row["wrong"]:
            # whose is it? the same again, without the library
            bare = strike(planned, place.with_name(place.name + "-bare"), without(cell[0]), False)
            row["wrong without compression"] = bare["wrong"]
        if not row["wrong"] and not keep:
            shutil.rmtree(place, ignore_errors=True)
        return row | {"machine": here}

    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(do, cell) for cell in wanted]
        for count, one in enumerate(as_completed(running), 1):
            row = one.result()
            if "skipped" not in row:
                with lock, rows.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            told = row.get("skipped") or ", ".join(row["wrong"]) or row["outcome"]
            print(f"{count}/{len(running)} {row['key']}: {told}", flush=True)
    done = [json.loads(line) for line in rows.read_text().splitlines()] if rows.is_file() else []
    useful, executed = STEPS * len(done), sum(row["executed"] for row in done)
    print(f"{len(done)} faults, goodput {useful / max(executed, 1):.1%}")


@app.command()
def soak(
    folder: Annotated[Path, typer.Option(help="Where the results lie.")] = Path("runs/faults"),
    steps: Annotated[int, typer.Option(help="Steps of each engine.")] = 5000,
    engine: Annotated[list[str] | None, typer.Option(help="Only these engines.")] = None,
) -> None:
    """Soak a plain model, DDP and FSDP2; print goodput and growth."""
    from tests.faults.soak import growth

    for one in engine or ["plain", "ddp", "fsdp2"]:
        place = folder.resolve() / "soak" / one
        if (place / "soak-0.json").is_file():
            continue
        shutil.rmtree(place, ignore_errors=True)
        ended = start(Job(one, str(place), steps, soak=True), 0, patience=3600)
        if any(ended.codes):
            raise typer.Exit(f"{one}: {ended.said}")
        found = json.loads((place / "soak-0.json").read_text())
        print(
            f"{one}: goodput {found['goodput']:.1%}, grown by {growth(found['held'])}", flush=True
        )


@app.command("judge")
def judge_scripts(
    folder: Annotated[Path, typer.Option(help="Where the results lie.")] = Path("runs/faults"),
    target: Annotated[list[str] | None, typer.Option(help="Only names with these words.")] = None,
    jobs: Annotated[int, typer.Option(help="Kills side by side.")] = 1,
    timeout: Annotated[int, typer.Option(help="Seconds of a start.")] = 300,
) -> None:
    """Let ckpt-chaos judge the loop of this folder and examples/train.py."""
    from tests.faults import judge as judging

    for one in judging.TARGETS:
        place = folder.resolve() / "judge" / "".join(c if c.isalnum() else "_" for c in one.name)
        if (place / "verdicts.json").is_file() or (
            target and not any(word in one.name for word in target)
        ):
            continue
        shutil.rmtree(place, ignore_errors=True)
        found = judging.judge(one, place, jobs=jobs, timeout=timeout)
        (place / "verdicts.json").write_text(json.dumps(found, indent=1))
        print(found["name"], found["counts"], *found["failed"], sep="\n  ", flush=True)


@app.command()
def report(
    folder: Annotated[Path, typer.Option(help="Where the rows lie.")] = Path("runs/faults"),
    page: Annotated[Path, typer.Option(help="What is written.")] = ROOT / "docs" / "reliability.md",
) -> None:
    """Write the page from the rows."""
    from tests.faults.page import write

    write(folder, page)


if __name__ == "__main__":
    app()
