"""Somebody else's judge: `ckpt-chaos` (PyPI, MIT) kills a script before, and in the
middle of, every change of a file, starts it again, and compares what it ends with.

Its verdicts: PASS; HARD_FAIL, the second start fails; SILENT_DIVERGENCE, the result is
another one; LOST_WORK, the second start goes on from an older checkpoint than the
newest complete one. Each script is judged with compression and without.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.faults.processes import free_port
from tests.support import ROOT

VERDICTS = ("PASS", "HARD_FAIL", "SILENT_DIVERGENCE", "LOST_WORK")
STEPS, EVERY = 6, 2


@dataclass(frozen=True)
class Target:
    """A script that is judged.

    command: after the interpreter, with {out} for its folder. checkpoints, result: what
    ckpt-chaos calls --checkpoint-glob and --result-file. regex: --step-regex. points:
    how many are taken of all that there are.
    """

    name: str
    command: list[str]
    checkpoints: str
    result: str
    regex: str
    points: int
    ranks: int = 2
    modes: str = "before,torn"
    environment: dict[str, str] = field(default_factory=dict)


def loop(name: str, engine: str, compressed: bool, points: int = 9, ranks: int = 2) -> Target:
    """The worker of this folder, which saves by the documented recipe. A save after
    each step: ckpt-chaos takes the number in a save's name for its step.
    """
    job = {"engine": engine, "folder": "{out}", "steps": 3, "every": 1}
    words = json.dumps({**job, "compressed": compressed})
    return Target(
        name,
        ["-m", "tests.faults.worker", words],
        "{out}/checkpoints/save-*[0-9]",
        "{out}/final.pt",
        r"going on from step (\d+)",
        points,
        ranks,
        "before,torn,unsynced",
    )


def example(name: str, *flags: str) -> Target:
    """`examples/train.py` as it is: the same command starts it and goes on with it."""
    settings = {
        "output_dir": "{out}", "max_steps": STEPS, "save_steps": EVERY, "sequence_length": 16,
        "held_out_tokens": 1000, "eval_on_start": False, "logging_steps": 100,
        "disable_tqdm": True, "use_cpu": True, "resume_from_checkpoint": "auto",
        "cache_dir": ROOT / "runs" / "judge_cache",
    }  # fmt: skip
    words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    return Target(
        name,
        ["examples/train.py", *flags, *words],
        "{out}/checkpoint-*",
        f"{{out}}/checkpoint-{STEPS}/model.safetensors",
        r"going on from \S*checkpoint-(\d+)",
        6,
    )


TARGETS = (
    loop("plain loop, 2 ranks", "plain", True),
    loop("plain loop, 2 ranks, uncompressed", "plain", False),
    example("examples/train.py, DeepSpeed", "--deepspeed", "configs/ds_powersgd_plus.json"),
    example(
        "examples/train.py, DeepSpeed, uncompressed", "--deepspeed", "configs/ds_uncompressed.json"
    ),
    example("examples/train.py, Trainer", "--compression", "configs/powersgd_plus.json"),
    example("examples/train.py, Trainer, uncompressed"),
)


def judge(
    target: Target, folder: Path, points: int | None = None, jobs: int = 1, timeout: int = 300
) -> dict[str, Any]:
    """Let ckpt-chaos judge a script; the verdicts' counts, and what was not a PASS."""
    here = {
        **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **target.environment,
    }  # fmt: skip
    if target.ranks == 1:
        here |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        here |= {"MASTER_PORT": str(free_port())}
    options = {
        "ranks": target.ranks, "max-points": points or target.points, "jobs": jobs,
        "timeout": timeout, "work": folder, "modes": target.modes,
        "checkpoint-glob": target.checkpoints, "step-regex": target.regex,
        "result-file": target.result,
    }  # fmt: skip
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "ckpt_chaos", "run", *words, "--", sys.executable, *target.command],
        cwd=ROOT, env=here, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if not (folder / "pt_control" / "result.json").is_file():
        raise RuntimeError(f"{target.name} was not judged: {(done.stdout + done.stderr)[-3000:]}")
    return verdicts(target, folder)


def verdicts(target: Target, folder: Path) -> dict[str, Any]:
    """Read what ckpt-chaos has left in its folder, by its own rules."""
    from ckpt_chaos.invariants import ResumeOutcome, classify

    counts: Counter[str] = Counter()
    failed: list[str] = []
    control, complete = "", 0
    for file in sorted(folder.glob("pt_*/result.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        verdict = classify(ResumeOutcome(**record["outcome"]))
        if record["label"].startswith("no crash"):
            control = verdict
            continue
        counts[verdict] += 1
        complete = max(complete, record["outcome"]["newest_complete_step"])
        if verdict != "PASS":
            outcome, tail = record["outcome"], record["resume_tail"].strip().splitlines()
            said = outcome["raised"] or f"went on from step {outcome['resumed_from_step']}"
            failed.append(f"{record['label']}: {verdict}, {said}: {(tail or [''])[-1][:200]}")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return {
        "name": target.name, "points": sum(counts.values()), "control": control,
        "counts": {verdict: counts[verdict] for verdict in VERDICTS}, "failed": failed,
        # it knows a complete checkpoint by names and sizes of files, which differ from
        # run to run where the save is part of a file's name
        "judges lost work": complete > 0,
        "versions": meta["versions"],
    }  # fmt: skip
