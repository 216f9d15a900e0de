"""What a section holds, and how it is checked.

Example:
    {}
    {"preset": "small", "seed": 1}
    {"compressor": "powersgd_plus", "rank": 4, "restart_every": 200, "restart": "svd",
     "error_feedback": {"form": null, "rounds": 1, "dtype": null},
     "quantization": {"factors": null, "restart": null, "dense": "int8"},
     "wire_dtype": null, "min_compression_rate": 2,
     "rules": [{"match": "lm_head.*", "treatment": "dense"}], "seed": 0,
     "topology": {"shard_size": 1}}

A section that names no compressor is a preset (`config.presets`), "balanced" unless it
names another. The keys are the common ones of `Section` and the options of the
compressor that it names; types, bounds and defaults are those of the dataclasses
(`options`). Unknown keys are errors that name the nearest valid one; so is a key that
the chosen compressor does not have, since ignoring it would be a silent fallback. The
string "auto" is a value of `restart` alone, whose default it is: Accelerate, which
fills in such values in a DeepSpeed JSON, raises on one of ours, so leave it out there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic import GetCoreSchemaHandler as SchemaHandler
from pydantic import create_model as create_pydantic_model
from pydantic.fields import FieldInfo

from lowrank_comm.communication import Group
from lowrank_comm.communication.flat_buffers import WireDtype
from lowrank_comm.communication.topology import Topology
from lowrank_comm.compressors import REGISTRY, Compressor
from lowrank_comm.config import hints
from lowrank_comm.config.presets import PRESETS, UNKNOWN_LENGTH, Preset, expanded
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.errors import ConfigError, UnsupportedError
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.options import (
    Advice,
    PositiveInt,
    Rate,
    Seed,
    complaint,
    descriptions,
    settings_of,
)
from lowrank_comm.reduction.divergence import OnDivergence
from lowrank_comm.reduction.policy import Rule
from lowrank_comm.reduction.reducer import Reducer
from lowrank_comm.reduction.skipped_steps import MAX_VETOES
from lowrank_comm.reduction.warmup import WarmupSteps, WarmupWire

SECTION = "lowrank_comm"

OPTIMIZERS = dict.fromkeys(
    ("inkheart", "m4", "marina_p", "m3"), "lowrank_comm.bidirectional:BidirectionalOptimizer"
)
"""Value of "compressor" that needs an optimizer of its own -> the class whose
`from_config` takes the section. Its module is loaded when it is asked for.
"""


def _tidy(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Take out of a JSON Schema the titles that pydantic makes of names, and all but
    the first paragraph of its description; describe the keys of base classes.
    """
    said = descriptions(model)
    del schema["title"]
    schema["description"] = " ".join(schema["description"].split("\n\n")[0].split())
    for key, setting in schema["properties"].items():
        setting.pop("title", None)
        setting.setdefault("description", said.get(key))


class Strict(BaseModel):
    """Refuses unknown keys, and converts no type into another."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, json_schema_extra=_tidy)


class _Object:
    """Metadata of a field that holds a dataclass of options: in a section it is an
    object with the dataclass's fields as keys.
    """

    def __get_pydantic_core_schema__(self, options: type, handler: SchemaHandler) -> Any:
        made = AfterValidator(lambda parsed: options(**dict(parsed)))
        return handler.generate_schema(Annotated[model_of(options), made])


@functools.cache
def model_of(options: type, base: type[BaseModel] = Strict) -> type[BaseModel]:
    """Return the pydantic model whose fields are those of a dataclass of options."""
    said = descriptions(options)
    fields: dict[str, Any] = {
        key: (
            hint,
            Field(... if default is dataclasses.MISSING else default, description=said[key]),
        )
        for key, hint, default in settings_of(options)
    }
    name = f"{options.__name__}Section"
    return create_pydantic_model(name, __base__=base, __doc__=options.__doc__, **fields)


_FORM = Advice('write {{"form": {value}}}', when=lambda value: isinstance(value, str))
_NO_FORM = Advice('for none write {{"form": "none"}}', when=lambda value: value is False)
_FORMAT = Advice('write for example {{"dense": {value}}}', when=lambda v: isinstance(v, str))
_SIZE = Advice('write {{"shard_size": {value}}}', when=lambda v: isinstance(v, int | str))
_RULES = Advice("write a list of rules", when=lambda value: isinstance(value, dict))


class Section(Strict):
    """The whole section: the keys that every compressor has. `parse` returns one of the
    subclasses, which have the options of a compressor too.

    Args:
        preset: settings to start from, "balanced", "small" or "paper"; null for
            "balanced" where no compressor is named, else for none. Further keys win.
        compressor: the algorithm, with its paper's settings; see docs/algorithms.md.
        enabled: false leaves the engine alone: nothing is compressed, gradients are
            averaged by the engine as without the section.
        rank: r of the factors; cut to min(m, n) matrix by matrix. What is then not
            worth it by `min_compression_rate` stays dense.
        error_feedback: its form, and how the error memory is kept.
        quantization: what is sent quantized; `dense` lifts the ceiling that embeddings
            set.
        wire_dtype: dtype on the wire; null for the wider of float32 and the
            parameter's. What a narrower wire rounds off the sum of several workers is
            lost.
        min_compression_rate: compress a matrix when m n over the elements that a step
            sends for it, r (m + n) for PowerSGD, is above it; 0 compresses every
            matrix.
        rules: exceptions by parameter name, for example {"match":
            "*.embed_tokens.weight", "treatment": "dense"}; the first match wins, and
            the plan names patterns without a match.
        warmup_steps: the first steps, which average everything while bases follow the
            means: a number, or a fraction below 1 of the run (at least 5 steps), where
            its length is known.
        warmup_wire: "bfloat16" or "int8" for what these steps send of matrices; what
            that rounds off stays in the error memory. Null: as other steps.
        seed: of the random draws, equal on all workers.
        max_vetoes: after how many skipped steps in a row to raise on all ranks; null
            for never. With a loss scale s, which is lowered first, 2 log2(s) more.
        check_every: compare parameters, bases and step between ranks that should hold
            the same bits, each time that many steps were called; null for never. On
            unlike processors, whose roundings differ, leave it off.
        on_divergence: what to do where they differ: "error" raises on all ranks;
            "resync" copies parameters, the optimizer's state and bases from the
            majority, and raises where there is none.
        topology: who is a worker: every rank, or the node.
    """

    preset: Preset | None = None
    compressor: str = "powersgd_plus"
    # by a factory, as everything that is neither a number nor a word
    enabled: bool = Field(default_factory=lambda: True)
    rank: PositiveInt = 4
    error_feedback: Annotated[ErrorFeedback, _Object(), _FORM, _NO_FORM] = Field(
        default_factory=ErrorFeedback
    )
    quantization: Annotated[Quantization, _Object(), _FORMAT] = Field(default_factory=Quantization)
    wire_dtype: WireDtype | None = None
    min_compression_rate: Rate = 2.0
    rules: Annotated[list[Annotated[Rule, _Object()]], _RULES] = Field(default_factory=list)
    warmup_steps: WarmupSteps = 0
    warmup_wire: WarmupWire = None
    seed: Seed = 0
    max_vetoes: PositiveInt | None = MAX_VETOES
    check_every: PositiveInt | None = None
    on_divergence: OnDivergence = "error"
    topology: Annotated[Topology, _Object(), _SIZE] = Field(default_factory=Topology)

    @classmethod
    def parse(cls, section: Mapping[str, Any]) -> Section:
        """Check a mapping and everything that follows from it.

        Args:
            section: the value of the key "lowrank_comm". "$schema" is ignored, and so
                is an option of another compressor that is null.

        Returns:
            The checked section.

        Raises:
            ConfigError: an unknown key (with the nearest valid one), a wrong type, or a
                value that cannot work.
            UnsupportedError: a bidirectional method, whose section is another.
        """
        kind = algorithm_of(section)
        section = expanded(section)
        if isinstance(kind, str):
            name = section["compressor"]
            if section.get("enabled") is False:
                return cls(compressor=name, enabled=False)
            raise UnsupportedError(
                f"{SECTION}.compressor={name!r} cannot be used here: in the bidirectional methods"
                f" ({', '.join(sorted(OPTIMIZERS))}) every worker has weights of its own, while"
                " this engine needs the same on all ranks. In a plain training loop use"
                " CompressedOptimizer.from_config(base, section), or"
                " lowrank_comm.bidirectional.BidirectionalOptimizer."
            )
        # of other compressors
        optional = hints.all_options() - set(kind.options())
        given = {
            key: value
            for key, value in section.items()
            if key != "$schema" and not (value is None and key in optional)
        }
        model = model_of(kind, Section)
        try:
            parsed = model.model_validate(given)
        except ValidationError as error:
            raise ConfigError("; ".join(_complaints(error, kind, model))) from None
        assert isinstance(parsed, Section)
        # what does not go together fails here
        Reducer([], parsed.make_compressor(), Group(), **parsed.reducer_options())
        return parsed

    def make_compressor(self) -> Compressor:
        """Make the compressor that the section names, with its options."""
        kind = REGISTRY[self.compressor]
        return kind(**{key: getattr(self, key) for key in kind.options()})

    def reducer_options(self, training_steps: int | None = None) -> dict[str, Any]:
        """Return the keyword arguments of `Reducer` (and of `CompressedOptimizer`) in a
        run of so many optimizer steps, None if nobody knows that.
        """
        warmup_steps = self.warmup_steps
        of_the_preset = PRESETS[self.preset].get("warmup_steps") if self.preset else None
        if training_steps is None and of_the_preset and warmup_steps == of_the_preset:
            warmup_steps = UNKNOWN_LENGTH
        return {
            "warmup_steps": warmup_steps,
            "warmup_wire": self.warmup_wire,
            "training_steps": training_steps,
            "min_compression_rate": self.min_compression_rate,
            "rules": tuple(self.rules),
            "error_feedback": self.error_feedback,
            "quantization": self.quantization,
            "wire_dtype": self.wire_dtype,
            "seed": self.seed,
        }


def algorithm_of(section: Mapping[str, Any]) -> type[Compressor] | str:
    """Return what the value of "compressor" names: the class of a compressor, or where
    the optimizer is that the section needs, see `OPTIMIZERS`.

    Raises:
        ConfigError: the section is no mapping with words as keys, or the name is
            unknown.
    """
    if not isinstance(section, Mapping):
        raise ConfigError(
            f"{SECTION} must be an object with keys such as 'compressor', got {section!r}."
        )
    for key in section:
        if not isinstance(key, str):
            raise ConfigError(
                f"{SECTION}: the key {key!r} is no word; write settings such as"
                ' "compressor" and "rank".'
            )
    name = section.get("compressor", Section.model_fields["compressor"].default)
    known: dict[str, type[Compressor] | str] = {**REGISTRY, **OPTIMIZERS}
    if not isinstance(name, str) or name not in known:
        meant = hints.nearest_compressor(name, sorted(known)) if isinstance(name, str) else "."
        raise ConfigError(
            f"{SECTION}.compressor={name!r} is unknown{meant} Known: {', '.join(sorted(known))}."
        )
    return known[name]


def _complaints(
    error: ValidationError, kind: type[Compressor], model: type[BaseModel]
) -> Iterator[str]:
    """Yield pydantic's errors as sentences with the key, the value and the fix, one for
    each key.
    """
    told = set()
    for detail in error.errors():
        path = detail["loc"]
        if detail["type"] == "extra_forbidden":
            _, _, _, keys = _found(path[:-1], model)
            yield hints.unknown_key(_name(path), detail["input"], list(keys), kind)
        elif detail["type"] == "missing":
            yield f"{_name(path)} is missing; a rule needs it."
        elif detail["type"] == "value_error":
            # of a dataclass that has checked itself
            yield str(detail["ctx"]["error"])
        else:
            path, hint, default, _ = _found(path, model)
            if path not in told:
                told.add(path)
                yield complaint(_name(path), detail["input"], hint, default)


def _name(path: tuple[int | str, ...]) -> str:
    return ".".join(map(str, (SECTION, *path)))


def _found(
    path: tuple[int | str, ...], model: type[BaseModel]
) -> tuple[tuple[int | str, ...], Any, Any, dict[str, FieldInfo]]:
    """Return the setting at a path of pydantic's: its own path, since a part of a union
    has a name at the end; its type and default; and the keys that it has, if it is an
    object.
    """
    hint: Any = model
    default, keys = None, model.model_fields
    for depth, part in enumerate(path):
        if isinstance(part, int):
            hint, default = inner_type(hint), None
        elif part in keys:
            hint, default = keys[part].rebuild_annotation(), keys[part].default
        else:
            return path[:depth], hint, default, keys
        keys = fields_of(hint)
    return path, hint, default, keys


def fields_of(hint: Any) -> dict[str, FieldInfo]:
    """Return the keys of the object that a setting of this type is, or is a list of."""
    options = inner_type(hint)
    if isinstance(options, type) and dataclasses.is_dataclass(options):
        return model_of(options).model_fields
    return {}


def inner_type(hint: Any) -> Any:
    """Return a type without its metadata, and of a list that of its members."""
    while get_origin(hint) in (Annotated, list):
        hint = get_args(hint)[0]
    return hint
