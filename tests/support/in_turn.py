r"""Several runs of a script of examples/ in one start of its processes, since starting
takes longer than a short run.

    torchrun --nproc_per_node 4 tests/support/in_turn.py train_engines \
        "--engine ddp" "--engine zero1"

Each further argument is a command line of the script. The runs share the process group,
which DeepSpeed takes only once in a process; what a run says stands between two lines
of `BETWEEN`.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
BETWEEN = "=== next run in the same processes ==="


def main() -> None:
    # DeepSpeed's launcher adds it
    words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    name, *runs = words
    script: Any = importlib.import_module(name)
    import torch.distributed as dist

    start, leave, script.leave = dist.init_process_group, script.leave, lambda: None

    def start_once(*given: Any, **more: Any) -> None:
        if not dist.is_initialized():
            start(*given, **more)

    dist.init_process_group = start_once
    for run in runs:
        if os.environ["RANK"] == "0":
            print(BETWEEN, flush=True)
        sys.argv = [f"{name}.py", *run.split()]
        script.main()
        # for the next Trainer
        if "accelerate" in sys.modules:
            from accelerate.state import AcceleratorState, GradientState

            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()
    leave()


if __name__ == "__main__":
    main()
