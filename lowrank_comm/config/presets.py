"""Named sets of settings: what a section means that names no compressor.

    balanced   int8 factors at rank 16 and a warm-up; also that of an empty section
    small      the same at half the bytes
    paper      PowerSGD+ as its paper has it: rank 4, float32 factors, SVD restarts

A compressor that is named, here or in Python, keeps its paper's settings; only a preset
brings a warm-up and codes. Further keys of a section win over the preset's, those of an
object (`quantization`) one by one.

Why these: a small study with an emulator, whose runs are not published. There int8
factors at four times the rank halved the loss gap to uncompressed training at equal
bytes, and a warm-up of 5 of 180 steps lowered the perplexity by 12 % at rank 4 (n = 3
seeds). The lab's experiment `loss_per_byte` is to confirm it and has not been run in
full. Restarts keep the convergence proof (delta = r / n, Theorem 2 of arXiv 2509.11254)
and cost a hundredth of the bytes, sent as factors and in int8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

from lowrank_comm.errors import ConfigError, nearest

Preset = Literal["balanced", "small", "paper"]
DEFAULT: Preset = "balanced"
UNKNOWN_LENGTH = 50
"""Steps of a preset's warm-up in a run of which nobody tells how long it is."""
_CODED: dict[str, Any] = {
    "compressor": "powersgd_plus",
    "restart_every": 200,
    "restart": "randomized",
    "quantization": {"factors": "int8", "restart": "int8"},
    "warmup_steps": 0.03,
    "warmup_wire": "int8",
}
PRESETS: dict[str, dict[str, Any]] = {
    "balanced": {**_CODED, "rank": 16},
    "small": {**_CODED, "rank": 8},
    "paper": {"compressor": "powersgd_plus", "rank": 4, "restart_every": 200, "restart": "svd"},
}


def expanded(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return a section with the settings of its preset written out; as it is, if it
    names a compressor.

    Raises:
        ConfigError: an unknown preset, or a compressor beside one.

    Example:
        >>> expanded({"preset": "paper", "rank": 8})["rank"]
        8
    """
    name = section.get("preset")
    if name is None and section.get("compressor") is not None:
        return dict(section)
    name = DEFAULT if name is None else name
    if not isinstance(name, str) or name not in PRESETS:
        known = get_args(Preset)
        raise ConfigError(
            f"lowrank_comm.preset={name!r} is unknown"
            f"{nearest(name, known) if isinstance(name, str) else '.'}"
            f" Known: {', '.join(known)}."
        )
    if section.get("compressor") is not None:
        raise ConfigError(
            f"lowrank_comm.preset={name!r} names its compressor"
            f" ({PRESETS[name]['compressor']}) already; leave"
            f" compressor={section['compressor']!r} out, or the preset."
        )
    whole = {**PRESETS[name], "preset": name}
    for key, value in section.items():
        if key in ("preset", "compressor"):
            continue
        before = whole.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            value = {**before, **value}
        whole[key] = value
    return whole
