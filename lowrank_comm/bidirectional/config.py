"""The `lowrank_comm` section of a bidirectional method.

Example:
    {
        "compressor": "inkheart",
        "uplink_fraction": 0.25,
        "downlink_groups": 8,
        "sync_probability": null,
        "mask": "window",
        "seed": 0
    }

Every key but "compressor" and "seed" is an option of the method's constructor, whose
defaults hold for what is absent.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lowrank_comm.bidirectional.base import Method
from lowrank_comm.bidirectional.inkheart import InkheartSGD
from lowrank_comm.bidirectional.m3 import M3
from lowrank_comm.bidirectional.m4 import M4
from lowrank_comm.bidirectional.marina_p import MarinaP
from lowrank_comm.errors import ConfigError, nearest
from lowrank_comm.options import Seed, check

METHODS: dict[str, type[Method]] = {cls.json_name: cls for cls in (InkheartSGD, M4, MarinaP, M3)}
"""Method by the name that configuration files use."""


def parse(section: Mapping[str, Any]) -> tuple[Method, int]:
    """Return the method and the seed of a section.

    Args:
        section: see the module's text.

    Returns:
        (method, seed).

    Raises:
        ConfigError: an unknown key, with the nearest valid one, or a value that cannot
            work.

    Example:
        >>> parse({"compressor": "marina_p", "downlink_groups": 4})
        (MarinaP(downlink_groups=4, sync_probability=None), 0)
    """
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"lowrank_comm must be an object with keys such as 'compressor', got {section!r}."
        )
    options = {key: value for key, value in section.items() if key not in ("$schema", "enabled")}
    name, seed = options.pop("compressor", None), options.pop("seed", 0)
    check("lowrank_comm.enabled", section.get("enabled", True), bool)
    if name not in METHODS:
        raise ConfigError(
            f"lowrank_comm.compressor={name!r} is no bidirectional"
            f" method{nearest(str(name), METHODS)} Known: {', '.join(sorted(METHODS))}."
        )
    check("lowrank_comm.seed", seed, Seed)
    kind = METHODS[name]
    for key, value in options.items():
        if key not in kind.options():
            owners = [other for other, cls in METHODS.items() if key in cls.options()]
            known = f" (it is one of {', '.join(owners)})" if owners else ""
            raise ConfigError(
                f"lowrank_comm.{key}={value!r} has no meaning for {name!r}{known}; remove it"
                f"{nearest(key, kind.options())} Its keys: {', '.join(kind.options())}, seed."
            )
    return kind(**options), seed
