"""Rehearsals that a process of the tests has made before.

Every engine prints its plan when it is attached, and the plan's memory is found by a
rehearsal: a fifth of a second for a toy model, which is more than a test's steps take.
The processes of `gloo.py` build the same engines again and again, and rehearse each
settings once. In the tests' own process nothing is remembered.
"""

from __future__ import annotations

import functools

from lowrank_comm.reduction.rehearsal import Needs, Rehearsal


def remember_rehearsals() -> None:
    """From now on, rehearse once for the same settings, parameters and place among the
    workers.
    """
    made: dict[str, Needs] = {}
    rehearse = vars(Rehearsal)["needs"].func

    def needs(self: Rehearsal) -> Needs:
        settings = self._make.keywords  # type: ignore[attr-defined]
        group, node = self._group, self._node
        place = (group.size, group.rank, node.size, node.rank, node.scope, self._accelerator)
        key = repr(
            (type(settings["compressor"]), settings, place, self._slots, self._whole)
            + (self._checkpoints,)
        )
        if key not in made:
            made[key] = rehearse(self)
        return made[key]

    remembered = functools.cached_property(needs)
    remembered.__set_name__(Rehearsal, "needs")
    Rehearsal.needs = remembered  # type: ignore[method-assign]
