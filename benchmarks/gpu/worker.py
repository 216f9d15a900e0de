"""A rank of a part of the check: makes the checks that its job names, and writes what
each of them gave.

    python -m benchmarks.gpu.worker JOB RANK

The job is a file of JSON that `launch` writes. One line of JSON is written when a check
begins, one when it has ended. All ranks make the same checks: whether there is time for
another one is decided by rank 0.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.gpu.device import Device
from benchmarks.gpu.outcome import Check, Failed, Found, Skipped
from lowrank_comm.communication import leave

BROKEN = 3
"""Exit code after an exception: the ranks may be in different collectives."""


def main(job_file: str, rank: int) -> int:
    """Make the checks of the job."""
    job = json.loads(Path(job_file).read_text(encoding="utf-8"))
    ranks, limit = job["ranks"], timedelta(seconds=job["collective_seconds"])
    device = Device.of_a_rank(job["device"], rank)
    store = dist.FileStore(f"{job_file}.store", ranks)
    store.set_timeout(limit)
    dist.init_process_group(job["backend"], store=store, rank=rank, world_size=ranks, timeout=limit)
    checks_of = importlib.import_module(job["module"]).checks_of
    checks = {check.name: check for check in checks_of(job["part"])}
    with Path(f"{job_file}.{rank}").open("a", encoding="utf-8") as file:

        def write(line: dict[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        for number, name in enumerate(job["checks"]):
            if rank == 0:
                store.set(f"begin {number}", str(int(time.time() < job["deadline"])))
            if store.get(f"begin {number}") == b"0":
                break
            write({"check": name, "at": time.time()})
            begin = time.perf_counter()
            status, found = outcome_of(checks[name], device)
            seconds = round(time.perf_counter() - begin, 2)
            # optimizers and engines hold each other
            gc.collect()
            torch.cuda.empty_cache()
            broken = status == "broken"
            told = "failed" if broken else status
            line = {"check": name, "status": told, "text": found.text, "figures": found.figures}
            write(line | {"seconds": seconds, "at": time.time()})
            if broken:
                # at once, and without a word to the others, who may be waiting for this
                # rank in a collective; after an error of CUDA nothing works any more
                os._exit(BROKEN)
    leave()
    return 0


def outcome_of(check: Check, device: Device) -> tuple[str, Found]:
    """Return passed, skipped, failed or broken, and the numbers or the reason."""
    try:
        return "passed", check.make(device)
    except Skipped as reason:
        return "skipped", Found(str(reason))
    except Failed as failure:
        return "failed", failure.found
    except Exception as error:
        traceback.print_exc()
        first = (str(error).splitlines() or [""])[0]
        return "broken", Found(f"{type(error).__name__}: {first}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], int(sys.argv[2])))
