"""Run a training script that knows nothing of this library, with its DeepSpeed adapter
switched on.

    deepspeed --module lowrank_comm.integrations.launch train.py --its-own-arguments
    torchrun --nproc_per_node 2 -m lowrank_comm.integrations.launch train.py --arguments

A script that is a module is started by `-m package.train` in the place of `train.py`.
The script gets the arguments, the name `__main__` and the import path that it would
have without the wrapper. On a machine without an accelerator DeepSpeed compiles an
extension for a minute or two that serves inference only; that is skipped.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path


def parse(arguments: Sequence[str]) -> tuple[bool, str, list[str]]:
    """Return whether the script is a module, the script, and the arguments that it
    gets.

    `deepspeed` puts `--local_rank=N` before the script; it moves behind it, where
    `deepspeed train.py` would put it. Words may not be abbreviated, since a script's
    own options must never be taken for the wrapper's.
    """
    parser = argparse.ArgumentParser(
        prog="lowrank_comm.integrations.launch",
        description="Run a script with the lowrank_comm section of its DeepSpeed JSON switched on.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--local_rank", "--local-rank", help="set by the launcher, and handed on to the script"
    )
    parser.add_argument(
        "-m", "--module", action="store_true", help="the script is a module, as in python -m"
    )
    parser.add_argument("script", help="path of the script, or name of the module")
    parser.add_argument(
        "arguments", nargs=argparse.REMAINDER, help="handed on to the script as they are"
    )
    given = parser.parse_args(arguments)
    rank = [] if given.local_rank is None else [f"--local_rank={given.local_rank}"]
    return given.module, given.script, rank + given.arguments


def main(arguments: Sequence[str] | None = None) -> None:
    """Switch the adapter on, and run the script in this process as `__main__`."""
    is_module, script, rest = parse(sys.argv[1:] if arguments is None else arguments)
    from lowrank_comm.communication import leave
    from lowrank_comm.integrations import deepspeed

    deepspeed.skip_shm_extension()
    sys.argv = [script, *rest]
    try:
        if is_module:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        else:
            # `python -m` put the working directory there
            sys.path[0] = str(Path(script).resolve().parent)
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        if end.code in (None, 0):
            leave()
        raise
    leave()


if __name__ == "__main__":
    main()
