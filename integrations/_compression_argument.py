"""The argument `compression` of Trainer's and Accelerate's adapters: what a user may
give, and what becomes of it.

a CompressedOptimizer       is taken as it is
a compressor                with everything else at its default
a section, as in JSON       see `lowrank_comm.config`
a plain optimizer           only one that `CompressedOptimizer.from_config` has returned
                            for a section with "enabled": false
None                        only with DeepSpeed, whose JSON then has the section
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from lowrank_comm import CompressedOptimizer, Compressor, ConfigError
from lowrank_comm.config import SECTION, Section
from lowrank_comm.config.enabled import is_left_alone

if TYPE_CHECKING:
    # DeepSpeed's adapter works without it
    from accelerate import Accelerator

Compression = Optimizer | Compressor | Mapping[str, Any] | None


def check(compression: Compression, who: str) -> None:
    """Raise ConfigError, in the name of `who`, for what is none of the above, or a
    section that cannot work.
    """
    if isinstance(compression, Mapping):
        Section.parse(compression)
    elif not (
        compression is None
        or isinstance(compression, CompressedOptimizer | Compressor)
        or is_left_alone(compression)
    ):
        raise ConfigError(
            f"{who}: compression={compression!r} must be a CompressedOptimizer, a compressor such"
            " as PowerSGDPlus(rank=4), or a section such as {'compressor': 'powersgd_plus',"
            " 'rank': 4}."
        )


def is_disabled(compression: Any) -> bool:
    """Return whether nothing is to be compressed: a section has "enabled": false, or a
    base optimizer comes from `CompressedOptimizer.from_config` with such a section.
    """
    if isinstance(compression, Mapping):
        return compression.get("enabled") is False
    return is_left_alone(compression)


def around(
    base: Optimizer,
    compression: Compressor | Mapping[str, Any],
    training_steps: int | None = None,
) -> Any:
    """Return a compressed optimizer around a plain one, of a run of so many steps, if
    they are known; the plain one for a section with "enabled": false.
    """
    if isinstance(compression, Compressor):
        return CompressedOptimizer(base, compression)
    return CompressedOptimizer.from_config(base, compression, training_steps=training_steps)


def put_into_deepspeed(accelerator: Accelerator, compression: Compression, who: str) -> Any:
    """Put the section into the DeepSpeed configuration of an accelerator from which no
    engine was made yet, and switch the adapter on.

    Returns:
        The section that is there now; `compression` where there is none.

    Raises:
        ConfigError: a CompressedOptimizer, which cannot go with DeepSpeed; or there is
            another section already, or none.
    """
    if isinstance(compression, CompressedOptimizer):
        raise ConfigError(
            f"{who}: a CompressedOptimizer cannot go with DeepSpeed, which averages gradients"
            f" itself. Give the base optimizer (or none), and the compressor to {who}; or put a"
            f' section "{SECTION}" with its settings into the DeepSpeed JSON, for example'
            f" {{{SECTION!r}: {compression.compressor.describe()}}}."
        )
    config = accelerator.state.deepspeed_plugin.deepspeed_config
    there = config.get(SECTION)
    if compression is None and there is None:
        raise ConfigError(
            f"{who}: there is nothing to compress with: the DeepSpeed configuration has no"
            f' section "{SECTION}", and {who} was given no compressor. Add the section, or give'
            " one such as PowerSGDPlus(rank=4)."
        )
    if isinstance(compression, Compressor | Mapping):
        if isinstance(compression, Compressor):
            compression = compression.describe()
        given = dict(compression)
        if there is not None and Section.parse(there) != Section.parse(given):
            raise ConfigError(
                f'{who}: the DeepSpeed configuration has a section "{SECTION}" already, {there},'
                f" and {who} was given {given}. Say it in one of the two places."
            )
        there = given
    if isinstance(there, Mapping):
        Section.parse(there)
        # it is the default, and Accelerate raises where it cannot fill an "auto" in
        config[SECTION] = {k: v for k, v in there.items() if (k, v) != ("restart", "auto")}
    import lowrank_comm.integrations.deepspeed  # noqa: F401  (switches it on)

    return config.get(SECTION, compression)
