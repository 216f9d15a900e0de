"""The treatment of every parameter: compressed or not, and why. The first matching rule
decides, else the compression rate.

A tensor of two or more dimensions is seen as a matrix (shape[0], -1), in its own
orientation. Its rank r is cut to min(m, n). It is compressed when

    m n / (elements sent) > min_compression_rate        PowerSGD: m n / (r (m + n))

and else all-reduced uncompressed ("dense"); term and default are those of PyTorch's
hook. A rate of 0 compresses every matrix. Embeddings are matrices like others. Tensors
of fewer dimensions, and empty ones, are dense. What is dense may be sent quantized
(`quantization.dense`, or a rule), and an embedding row by row, by a rule.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from lowrank_comm.compressors.base import Compressor
from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.quantization import FORMATS
from lowrank_comm.options import Advice, PositiveInt, Rate, check, check_options


@dataclass(frozen=True)
class Rule:
    """An exception to the policy for parameters whose name matches.

    Args:
        match: shell-style pattern of the whole parameter name, e.g.
            "*.embed_tokens.weight" or "lm_head.*".
        treatment: "dense" (in the wire dtype), "low_rank" (at any rate), "int8", "int4"
            or "sign" (sent quantized, with error feedback), "row_sparse" (only rows
            that are not zero; exact), or null to leave that to the rate.
        rank: of these parameters, or null for the compressor's.
        min_compression_rate: of these parameters, or null for the general one.

    Raises:
        ConfigError: an unknown treatment, a bad rank or rate, or a rank for something
            that goes dense.
    """

    match: Annotated[str, Advice('write a pattern of parameter names such as "lm_head.*"')]
    treatment: Literal["dense", "low_rank", "int8", "int4", "sign", "row_sparse"] | None = None
    rank: PositiveInt | None = None
    min_compression_rate: Rate | None = None

    def __post_init__(self) -> None:
        where = f"rules[match={self.match!r}]"
        check_options(self, f"{where}.")
        if self.treatment not in (None, "low_rank") and (
            self.rank is not None or self.min_compression_rate is not None
        ):
            raise ConfigError(
                f"{where}: a parameter that is {self.treatment!r} has no rank or rate; leave them"
                " out, or the treatment."
            )

    @property
    def says_nothing(self) -> bool:
        """Whether the rule leaves its parameters to the rate, as if it were not
        there.
        """
        return self.treatment is self.rank is self.min_compression_rate is None

    def matches(self, name: str) -> bool:
        """Return whether the pattern fits the whole name."""
        return fnmatch.fnmatchcase(name, self.match)


@dataclass(frozen=True)
class Treatment:
    """What happens to one parameter.

    Attributes:
        scheme: "low_rank", "dense", a format of `quantization`, or "row_sparse".
        m, n: the matrix it is seen as; (numel, 1) where it is none and goes dense, (1,
            numel) where it is sent quantized.
        rank: r after the cut to min(m, n); 0 where it is not low-rank.
        elements: that a worker hands to the collectives for it in an ordinary step.
        reason: why, for the plan.
    """

    scheme: str
    m: int
    n: int
    rank: int
    elements: int
    reason: str

    @property
    def low_rank(self) -> bool:
        """Whether the compressor of the run compresses it."""
        return self.scheme == "low_rank"

    @property
    def batched(self) -> bool:
        """Whether some compressor has it; else it is all-reduced as it is."""
        return self.scheme != "dense"


@dataclass(frozen=True)
class Policy:
    """Decides the treatment of every parameter from its name and shape.

    Args:
        compressor: of the low-rank parameters.
        min_compression_rate: see this file's first lines.
        rules: exceptions by name; the first that matches wins.
        codes: format of what would go dense, or None for the wire dtype.

    Raises:
        ConfigError: a bad rate, or a last rule that says nothing.
    """

    compressor: Compressor
    min_compression_rate: float = 2.0
    rules: Sequence[Rule] = ()
    codes: str | None = None

    def __post_init__(self) -> None:
        check("min_compression_rate", self.min_compression_rate, Rate)
        if self.rules and self.rules[-1].says_nothing:
            raise ConfigError(
                f"rules[match={self.rules[-1].match!r}] has no effect: it says nothing of its"
                " parameters, and no rule follows from which it would except them. Give it a"
                ' treatment such as "dense", a rank or a min_compression_rate, or leave it out.'
            )

    def treat(self, name: str, shape: Sequence[int]) -> Treatment:
        """Return the treatment of the parameter `name` of full shape `shape`."""
        numel = math.prod(shape)
        rule = next((rule for rule in self.rules if rule.matches(name)), None)
        because = f"rule {rule.match!r}" if rule else ""
        asked = rule.treatment if rule else None

        def dense(reason: str) -> Treatment:
            if self.codes is None or not numel:
                return _dense(numel, reason)
            # a block is longer than these few numbers in float32
            if FORMATS[self.codes].bytes(numel) >= 4 * numel:
                return _dense(numel, f"{reason}, shorter than as {self.codes}")
            return _by_rows(self.codes, shape, f"{reason}, as {self.codes}")

        if numel == 0:
            return dense("empty")
        if asked == "dense":
            return _dense(numel, because)
        if asked == "row_sparse" and len(shape) != 2:
            raise ConfigError(
                f"{because} asks for row_sparse, but {name} has the shape {tuple(shape)} and no"
                " rows; match matrices only."
            )
        if asked is not None and asked != "low_rank":
            return _by_rows(asked, shape, f"{because}: {asked}")
        if not self.compressor.low_rank:
            return dense(f"{self.compressor.json_name} compresses nothing")
        if len(shape) < 2:
            return dense(f"{len(shape)}-D")
        wanted = rule.rank if rule and rule.rank is not None else self.compressor.rank
        found = self._low_rank(shape, wanted, because)
        rate = self.min_compression_rate
        if rule and rule.min_compression_rate is not None:
            rate = rule.min_compression_rate
        if asked != "low_rank" and not numel / found.elements > rate:
            return dense(
                f"rate {numel / found.elements:.2f} is not above {rate:g}"
                + (f" ({because})" if rule else "")
            )
        return found

    def _low_rank(self, shape: Sequence[int], rank: int, because: str) -> Treatment:
        m, n = shape[0], math.prod(shape) // shape[0]
        r = min(rank, m, n)
        cut = f"rank {rank} cut to {r}" if r < rank else ""
        reason = ", ".join(filter(None, (because, cut)))
        return Treatment("low_rank", m, n, r, self.compressor.elements(m, n, r), reason)

    def treat_block(self, name: str, shape: Sequence[int], largest: Sequence[int]) -> Treatment:
        """Return the treatment of one of several blocks of a parameter, each of which
        is a matrix of its own.

        The largest block decides between low-rank and dense, so that all ranks decide
        alike; rank and elements are the block's own.
        """
        decided = self.treat(name, largest)
        numel = math.prod(shape)
        if numel == 0:
            return _dense(0, "no rows of it on this rank")
        if not decided.batched:
            return _dense(numel, decided.reason)
        if not decided.low_rank:
            return _by_rows(decided.scheme, shape, decided.reason)
        return self._low_rank(shape, decided.rank, decided.reason)

    def idle_rules(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the patterns of rules that match none of the names."""
        return tuple(
            rule.match for rule in self.rules if not any(rule.matches(name) for name in names)
        )


def _dense(numel: int, reason: str) -> Treatment:
    return Treatment("dense", numel, 1, 0, numel, reason)


def _by_rows(scheme: str, shape: Sequence[int], reason: str) -> Treatment:
    """Treat a tensor as sent quantized or row by row: a matrix as it is, everything
    else as one row.
    """
    m, numel = shape[0] if len(shape) > 1 else 1, math.prod(shape)
    return Treatment(scheme, m, numel // m, 0, numel, reason)
