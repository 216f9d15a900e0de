"""One run of the main job, examples/train.py, on the hosts of a lab.

What comes back is plain figures: the command, the loss and the seconds of every step,
and the bytes that the kernel counted at each host's interface.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from report import LOG, SUMMARY, Summary, logged_steps

from benchmarks.evidence import ROOT
from benchmarks.netlab import Lab


@dataclass(frozen=True)
class Job:
    """What is trained, equal for all runs of a comparison.

    Attributes:
        model: S, M or L of `lowrank_comm.lab.data.models`.
        batch: sequences of a host and step.
        sequence: tokens of a sequence.
        learning_rate: the highest of the schedule.
        seed: of the weights and the order of the data.
    """

    model: str = "M"
    batch: int = 1
    sequence: int = 128
    learning_rate: float = 2e-3
    seed: int = 42


def train(lab: Lab, job: Job, config: Path, steps: int, folder: Path) -> dict[str, Any]:
    """Run examples/train.py with a DeepSpeed JSON on all hosts of the lab.

    Raises:
        LabError: a host failed.
    """
    options = {
        "deepspeed": config.relative_to(ROOT),
        "max_steps": steps,
        "model_size": job.model,
        "per_device_train_batch_size": job.batch,
        "sequence_length": job.sequence,
        "learning_rate": job.learning_rate,
        "seed": job.seed,
        "use_cpu": True,
        "save_strategy": "no",
        "eval_on_start": False,
        "held_out_tokens": 10000,
    }
    words = ["examples/train.py"]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    # a run that fails must not be mistaken for the last one that did not
    for old in (LOG, SUMMARY):
        (folder / old).unlink(missing_ok=True)
    quiet = {
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONUNBUFFERED": "1",
        "DS_ACCELERATOR": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    load = os.getloadavg()
    command = [sys.executable, *words, "--output_dir", str(folder)]
    network = lab.run(command, env=quiet, cwd=ROOT)
    summary, logged = Summary.load(folder), logged_steps(folder)
    return {
        # where the run is written does not matter
        "command": shlex.join(["python", *words]),
        "load_before": load,
        "whole_seconds": network.seconds,
        "setup": summary.setup,
        "section": summary.compressor,
        "loss": [step["loss"] for step in logged],
        "seconds": [step["seconds"] for step in logged],
        "settled": [not step["warm_up"] for step in logged],
        "held_out_perplexity": summary.last_perplexity,
        "sent_by_host": network.sent,
        "received_by_host": network.received,
        "counted_bytes": summary.bytes,
        "uncompressed_bytes": summary.uncompressed_bytes,
    }


def prepare_text(job: Job) -> None:
    """Tokenize once, before all hosts would do so at the same time."""
    code = f"""if True:
        import sys; sys.path.insert(0, "examples")
        import train
        cache = train.Path(train.ExampleArguments.cache_dir)
        train.load_corpus(cache, None, train.LLAMAS[{job.model!r}]["vocab_size"])
    """
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
