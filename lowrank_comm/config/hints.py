"""Suggestions of what to write in the place of a key or a word that is unknown."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Sequence
from typing import Any

from lowrank_comm.communication.topology import Topology
from lowrank_comm.compressors import REGISTRY, Compressor
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.errors import nearest
from lowrank_comm.numerics.quantization import Quantization

_OTHER_NAMES = {
    # the papers', GaLore's and those of PyTorch's PowerSGD hook
    "tau": "restart_every",
    "update_proj_gap": "restart_every",
    "r": "rank",
    "matrix_approximation_rank": "rank",
    "algorithm": "compressor",
    "method": "compressor",
    "error_memory": "error_feedback",
    "start_powerSGD_iter": "warmup_steps",
    "start_compress_step": "warmup_steps",
    "warmup": "warmup_steps",
}
_OBJECTS = {"error_feedback": ErrorFeedback, "quantization": Quantization, "topology": Topology}
_OTHER_COMPRESSORS = {
    "acpsgd": "acp",
    "inkheartsgd": "inkheart",
    "none": "identity",
    "dense": "identity",
    "uncompressed": "identity",
}


@functools.cache
def all_options() -> frozenset[str]:
    """Return every option that some compressor has."""
    return frozenset(key for kind in REGISTRY.values() for key in kind.options())


def nearest_compressor(word: str, known: Sequence[str]) -> str:
    """Do as `errors.nearest`, for names of compressors as papers and classes write
    them: "PowerSGD+", "powersgd+", "PowerSGDPlus", "marina-p".
    """
    meant = _meant(word, known)
    return f"; did you mean {meant!r}?" if meant else nearest(word, known)


def _meant(word: str, known: Sequence[str]) -> str | None:
    squeezed = re.sub(r"[^a-z0-9]", "", word.lower().replace("+", "plus"))
    squeezed = _OTHER_COMPRESSORS.get(squeezed, squeezed)
    return next((name for name in known if name.replace("_", "") == squeezed), None)


def nearest_class(given: object) -> str:
    """Do as `errors.nearest`, for a name or a class where a compressor is wanted."""
    word = given if isinstance(given, str) else getattr(given, "__name__", "")
    meant = _meant(word, list(REGISTRY))
    return f"; did you mean {REGISTRY[meant].__name__}(rank=4)?" if meant else "."


def unknown_key(path: str, value: Any, known: Sequence[str], kind: type[Compressor]) -> str:
    """Say what to do about a key that an object of a section does not have.

    Args:
        path: of the key, "lowrank_comm.error_feedback.dtyp".
        value: what stands there.
        known: the keys that the object has.
        kind: the compressor of the section.

    Returns:
        A sentence.
    """
    section, *objects, key = path.split(".")
    if objects:
        return f"{path} is not a known key{nearest(key, known)}"
    if key == section:
        return (
            f"{path} is not a known key: give what stands under {section!r}, and not the object"
            " around it."
        )
    owners = [name for name, other in REGISTRY.items() if key in other.options()]
    if owners:
        return (
            f"{path}={value!r} has no meaning for compressor {kind.json_name!r}; remove it, or use"
            f" a compressor that has it ({', '.join(owners)})."
        )
    if key in _OTHER_NAMES:
        return f"{path} is not a known key; did you mean {_OTHER_NAMES[key]!r}?"
    for name, options in _OBJECTS.items():
        if key in (field.name for field in dataclasses.fields(options)):
            written = json.dumps({name: {key: value}}, default=repr)
            return f"{path} is not a known key; write {written[1:-1]}."
    return f"{path} is not a known key{nearest(key, [*known, *sorted(all_options())])}"
