"""On which machine a result was made: for runs of the lab and for benchmarks, also
where no extra of the library is installed.
"""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from lowrank_comm import __version__


def machine() -> dict[str, Any]:
    """Return processor, cores and versions; not the machine's name."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        models = [
            text.split(":", 1)[1].strip()
            for text in info.read_text().splitlines()
            if text.startswith("model name")
        ]
        cpu = models[0] if models else cpu
    accelerator = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "accelerator": accelerator,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "lowrank_comm": __version__,
    }
