"""The `lowrank_comm` section of a JSON or YAML file, or the same as a dict: one schema
for every engine.

Example:
    {"compressor": "powersgd_plus", "rank": 4, "restart_every": 200, "restart": "svd",
     "error_feedback": {"form": null, "rounds": 1, "dtype": null, "rounding": "nearest",
         "offload": false},
     "quantization": {"factors": null, "restart": null, "dense": null, "rounding":
         "nearest"}, "wire_dtype": null,
     "min_compression_rate": 2, "rules": [{"match": "lm_head.*", "treatment": "dense"}],
         "seed": 0,
     "topology": {"shard_size": 1}}

Unknown keys are errors that name the nearest valid one; so is a key that the chosen
compressor does not have, since ignoring it would be a silent fallback. The string
"auto" is never a value: Accelerate raises on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model

from lowrank_comm.communication import Group
from lowrank_comm.communication.intra_node import SCOPES
from lowrank_comm.compressors import REGISTRY, Compressor
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.errors import ConfigError, UnsupportedError, nearest
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.reduction.policy import Rule
from lowrank_comm.reduction.reducer import Reducer

SECTION = "lowrank_comm"

OPTIMIZERS = dict.fromkeys(
    ("inkheart", "m4", "marina_p", "m3"), "lowrank_comm.bidirectional:BidirectionalOptimizer"
)
"""Value of "compressor" that needs an optimizer of its own -> the class whose
`from_config` takes the section. Its module is loaded when it is asked for.
"""


class _Strict(BaseModel):
    """No unknown keys, no conversions of one type into another."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class ErrorFeedbackSection(_Strict):
    """What happens to what was not sent, and how it is kept; see
    `error_feedback.ErrorFeedback`.
    """

    form: str | None = None
    momentum: float = 0.1
    rounds: int = 1
    dtype: str | None = None
    rounding: str = "nearest"
    offload: bool = False


class QuantizationSection(_Strict):
    """What travels as codes; see `quantization.Quantization`."""

    factors: str | None = None
    restart: str | None = None
    dense: str | None = None
    rounding: str = "nearest"


class RuleSection(_Strict):
    """An exception by parameter name; see `policy.Rule`."""

    match: str
    treatment: str | None = None
    rank: int | None = None
    min_compression_rate: float | None = None


class TopologySection(_Strict):
    """Who is a worker: every rank (shard_size 1), or the node (its size, or "node"),
    reduced exactly inside; and whether each rank's block of rows is compressed alone
    ("shard"), or whole matrices together ("matrix").
    """

    shard_size: int | str = 1
    shard_scope: str = "shard"


class _Common(_Strict):
    """The keys that every compressor has."""

    compressor: str = "powersgd_plus"
    rank: int = 4
    error_feedback: ErrorFeedbackSection = Field(default_factory=ErrorFeedbackSection)
    quantization: QuantizationSection = Field(default_factory=QuantizationSection)
    wire_dtype: str | None = None
    min_compression_rate: float = 2.0
    rules: list[RuleSection] = Field(default_factory=list)
    seed: int = 0
    topology: TopologySection = Field(default_factory=TopologySection)


def _types_of_options() -> dict[str, Any]:
    """Option of some compressor -> its type and that of others with an option of that
    name, or None where it is absent.
    """
    types: dict[str, Any] = {}
    for kind in REGISTRY.values():
        hints = get_type_hints(kind)
        for option in kind.options():
            if option != "rank":
                types[option] = (
                    types[option] | hints[option] if option in types else hints[option] | None
                )
    return types


# A compressor's options are its fields: one that is added needs no line here.
_OPTIONS = _types_of_options()
_OPTIONAL: dict[str, Any] = {option: (hint, None) for option, hint in _OPTIONS.items()}
_Keys = create_model("_Keys", __base__=_Common, **_OPTIONAL)


class Section(_Keys):  # type: ignore[misc, valid-type]
    """The whole section. Options of a compressor that are absent take the compressor's
    own defaults.
    """

    @classmethod
    def parse(cls, section: Mapping[str, Any]) -> Section:
        """Check a mapping and everything that follows from it.

        Args:
            section: the value of the key "lowrank_comm".

        Returns:
            The checked section.

        Raises:
            ConfigError: an unknown key (with the nearest valid one), a wrong type, or a
                value that cannot work.
        """
        if not isinstance(section, Mapping):
            raise ConfigError(
                f"{SECTION} must be an object with keys such as 'compressor', got {section!r}."
            )
        # their keys are others
        if section.get("compressor") in OPTIMIZERS:
            section = {"compressor": section["compressor"]}
        try:
            parsed = cls.model_validate(dict(section))
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(detail) for detail in error.errors())) from None
        size, scope = parsed.topology.shard_size, parsed.topology.shard_scope
        if size != "node" and (isinstance(size, str) or size < 1):
            raise ConfigError(
                f"{SECTION}.topology.shard_size={size!r} must be a number of ranks (1: no levels)"
                ' or "node".'
            )
        if scope not in SCOPES:
            raise ConfigError(
                f'{SECTION}.topology.shard_scope={scope!r} is unknown; use "shard" or "matrix".'
            )
        # bad values fail here
        Reducer([], parsed.make_compressor(), Group(), **parsed.reducer_options())
        return parsed

    @staticmethod
    def of(compressor: Compressor) -> dict[str, Any]:
        """The section that says the same as a compressor; everything else of it has its
        default.
        """
        return compressor.describe()

    def make_compressor(self) -> Compressor:
        """The compressor that the section names, with its options."""
        if self.compressor in OPTIMIZERS:
            raise UnsupportedError(
                f"{SECTION}.compressor={self.compressor!r} cannot be used here: in the"
                f" bidirectional methods ({', '.join(sorted(OPTIMIZERS))}) every worker has weights of"
                " its own, while this engine needs the same on all ranks. In a plain training loop"
                " use CompressedOptimizer.from_config(base, section), or"
                " lowrank_comm.bidirectional.BidirectionalOptimizer."
            )
        if self.compressor not in REGISTRY:
            raise ConfigError(
                f"{SECTION}.compressor={self.compressor!r} is"
                f" unknown{nearest(self.compressor, [*REGISTRY, *OPTIMIZERS])} Known:"
                f" {', '.join(sorted([*REGISTRY, *OPTIMIZERS]))}."
            )
        kind = REGISTRY[self.compressor]
        options = {key: getattr(self, key) for key in _OPTIONS if getattr(self, key) is not None}
        for key in options:
            if key not in kind.options():
                owners = [name for name, cls in REGISTRY.items() if key in cls.options()]
                raise ConfigError(
                    f"{SECTION}.{key}={options[key]!r} has no meaning for compressor"
                    f" {self.compressor!r}; remove it, or use a compressor that has it"
                    f" ({', '.join(owners)})."
                )
        return kind(rank=self.rank, **options)

    def reducer_options(self) -> dict[str, Any]:
        """Keyword arguments of `Reducer` (and of `CompressedOptimizer`)."""
        return {
            "min_compression_rate": self.min_compression_rate,
            "rules": tuple(Rule(**rule.model_dump()) for rule in self.rules),
            "error_feedback": ErrorFeedback(**self.error_feedback.model_dump()),
            "quantization": Quantization(**self.quantization.model_dump()),
            "wire_dtype": self.wire_dtype,
            "seed": self.seed,
        }


def _explain(detail: Any) -> str:
    """One pydantic error as a sentence with the key, the value and the fix."""
    path = ".".join(str(part) for part in (SECTION, *detail["loc"]))
    if detail["type"] == "extra_forbidden":
        model: type[BaseModel] = Section
        for part in detail["loc"][:-1]:
            model = _SUB_MODELS.get(part, model)
        if detail["loc"] == (SECTION,):
            return (
                f"{path} is not a known key: give what stands under {SECTION!r}, and not the object"
                " around it."
            )
        return f"{path} is not a known key{nearest(str(detail['loc'][-1]), model.model_fields)}"
    if detail["type"] == "missing":
        return f"{path} is missing; a rule needs it."
    return f"{path}={detail['input']!r} is not possible: {detail['msg'].lower()}."


_SUB_MODELS: dict[Any, type[BaseModel]] = {
    "error_feedback": ErrorFeedbackSection,
    "quantization": QuantizationSection,
    "rules": RuleSection,
    "topology": TopologySection,
}
