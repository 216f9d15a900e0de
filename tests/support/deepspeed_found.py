"""What the cases of DeepSpeed found: all run once in one set of processes, and each
test looks at its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.gloo import CaseFailed, GlooPool

Found = dict[int, dict[str, Any]]
Look = Callable[[str], list[Any]]


@contextmanager
def everything_found(
    run: Callable[..., Any], world: int, folder: Path, timeout: float
) -> Iterator[Found]:
    """`run(rank, folder)` in `world` processes: what they found, by rank and case. The
    last cases are told if one dies.
    """
    pool = GlooPool(world)
    try:
        yield dict(enumerate(pool.run(run, world, str(folder), timeout=timeout)))
    except CaseFailed as failure:
        died = {path.name: path.read_text() for path in folder.glob("running_*")}
        raise CaseFailed(f"last cases: {died}\n{failure}") from None
    finally:
        pool.close()


def looking_into(results: Found) -> Look:
    """`look(case)`: its values by rank, or a failure with the traceback of every rank
    on which it raised.
    """

    def look(case: str) -> list[Any]:
        errors = [
            f"rank {rank}:\n{found[case]['error']}"
            for rank, found in results.items()
            if "error" in found[case]
        ]
        assert not errors, "\n".join(errors)
        return [found[case]["value"] for found in results.values()]

    return look
