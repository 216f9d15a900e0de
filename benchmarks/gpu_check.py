"""Checks this library on a GPU, on which it was never run (docs/gpu.md), within eight
minutes, and writes one file of JSON.

    make gpu-check                       # with a Python that has torch for CUDA
    python -m benchmarks.gpu_check [--device cpu] [--minutes 8] [--json F] [--only TEXT]

One GPU is enough; all processes are started here. Beside torch it needs what the
library needs, safetensors and pydantic, and no installation of the library. The parts:

    one rank         over NCCL: engines and options, each against a simulation of the
                     same workers on the CPU
    several ranks    the same by four ranks that share the GPU, over gloo; where there
                     are more GPUs also by a rank on each, over NCCL
    costs            launches, waits of the host, memory against the plan
    times            of a step of LLaMAs of 20M, 350M and 1.3B parameters at rank 4 and
                     32, beside PyTorch's powerSGD_hook and a copy of the same bytes

Each part has a share of the time; what does not fit is skipped, and the table says so.
Exit code 1 if a check failed, 2 if it cannot begin. With `--device cpu` all of it runs
on CPU tensors, on the path that an accelerator takes and with narrower models: that
tries the checks, and measures nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from benchmarks.gpu.launch import Row

NEEDED = ("torch", "safetensors", "pydantic")
PROCESSES = ("benchmarks/gpu/worker.py",)
"""What is started by name, for the hash of the sources."""


def lacking() -> list[str]:
    """Return which of the packages that are needed are not installed."""
    return [name for name in NEEDED if importlib.util.find_spec(name) is None]


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="that all may take")
    parser.add_argument("--json", type=Path, help="default: runs/gpu_check.json")
    parser.add_argument("--only", default="", help="checks whose name contains this")
    return parser.parse_args(arguments)


def cannot_begin(device: str) -> str:
    """Return why there is nothing to check; "" where there is."""
    missing = lacking()
    if missing:
        return (
            f"{sys.executable} has no {' and no '.join(missing)}: python -m pip install"
            f" {' '.join(missing)}" + (" (torch: a build for CUDA)" if "torch" in missing else "")
        )
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        build = torch.version.cuda or "none"
        return (
            f"torch {torch.__version__} sees no GPU (built for CUDA: {build}); is there a driver,"
            " and a build of torch for it? --device cpu tries the checks without a GPU."
        )
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts, print the table, write the file."""
    options = options_of(arguments)
    reason = cannot_begin(options.device)
    if reason:
        print(f"gpu-check cannot begin: {reason}", file=sys.stderr)
        return 2
    return check(options)


def check(options: argparse.Namespace) -> int:
    """Do it, once all that is needed is there."""
    import torch

    from benchmarks.evidence import ROOT, envelope, write
    from benchmarks.gpu import launch, sizes, small_runs
    from benchmarks.gpu.parts import checks_of, parts

    begin = time.time()
    evidence = envelope(
        __file__,
        seeds=[sizes.SEED, small_runs.SEED],
        quick=options.device == "cpu",
        runs=PROCESSES,
    )
    gpus = torch.cuda.device_count() if options.device == "cuda" else 0
    chosen = [
        (part, names)
        for part in parts(options.device, gpus)
        if (names := [one.name for one in checks_of(part.name) if options.only in one.name])
    ]
    if not chosen:
        print(f"gpu-check: no check has {options.only!r} in its name", file=sys.stderr)
        return 2
    rows: list[Row] = []
    took = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (part, names) in enumerate(chosen):
            shares = sum(later.share for later, _ in chosen[number:])
            # a check that has begun in time may take a little longer
            left = 60 * options.minutes - (time.time() - begin) - launch.GRACE
            seconds, started = max(0.0, left * part.share / shares), time.time()
            print(f"{part.name}: {part.ranks} over {part.backend}, {seconds:.0f} s", flush=True)
            for row in launch.made(part, options.device, names, seconds, Path(folder)):
                print(f"  {row.status:8}{row.check} ({row.seconds:.1f} s)", flush=True)
                rows.append(row)
            took.append(vars(part) | {"allotted": seconds, "seconds": time.time() - started})
    print("\n" + "\n".join(table(rows)))
    target = options.json or ROOT / "runs" / "gpu_check.json"
    results = {"gpu": hardware(options.device), "parts": took, "checks": [vars(r) for r in rows]}
    write(target, evidence, results)
    print(f"\nwritten: {target}")
    return int(any(row.status == "failed" for row in rows))


def hardware(device: str) -> dict[str, Any] | None:
    """Return what the file tells of the GPUs beyond the envelope."""
    import torch

    if device != "cuda":
        return None
    properties = torch.cuda.get_device_properties(0)
    free, whole = torch.cuda.mem_get_info(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": whole,
        # little, where another program has a part of it
        "free_memory": free,
        "cuda": torch.version.cuda,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())),
    }


def table(rows: Sequence[Row], width: int = 118) -> list[str]:
    """Return the lines of the table, the failures once more at the end."""
    lines: list[str] = []
    for part in dict.fromkeys(row.part for row in rows):
        lines.append(f"== {part}")
        for row in rows:
            if row.part == part:
                lines += textwrap.wrap(
                    f"{row.status:8}{row.check}: {row.text}", width, subsequent_indent=" " * 10
                )
    counts = {
        one: sum(row.status == one for row in rows) for one in ("passed", "failed", "skipped")
    }
    lines.append(", ".join(f"{count} {status}" for status, count in counts.items()))
    lines += [f"FAILED  {row.part}, {row.check}" for row in rows if row.status == "failed"]
    return lines


if __name__ == "__main__":
    sys.exit(main())
