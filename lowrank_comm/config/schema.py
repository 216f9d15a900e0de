"""The JSON Schema of the section (draft 2020-12), for editors.

It serves a file that is the section, and a DeepSpeed configuration, which has the
section under the key "lowrank_comm" and may have anything beside. Which keys a section
has depends on its compressor, so each compressor has a definition of its own.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from pydantic import BaseModel

from lowrank_comm.compressors import REGISTRY
from lowrank_comm.config.section import OPTIMIZERS, SECTION, Section, Strict, model_of
from lowrank_comm.options import Seed, descriptions

_DEEPSPEED_KEYS = (SECTION, "train_batch_size", "train_micro_batch_size_per_gpu")
"""A file with one of these is a DeepSpeed configuration."""


class MethodSection(Strict):
    """The keys that the section of every bidirectional method has.

    Args:
        compressor: the method; see docs/algorithms.md.
        enabled: false leaves the engine alone: nothing is compressed, gradients are
            averaged by the engine as without the section.
        seed: of the random draws, equal on all workers.
    """

    compressor: str
    enabled: bool = True
    seed: Seed = 0


def every_model() -> dict[str, type[BaseModel]]:
    """Return the model of a section by the name of its compressor, or of its
    bidirectional method.
    """
    methods = pkgutil.resolve_name("lowrank_comm.bidirectional.config:METHODS")
    models = {name: model_of(kind, Section) for name, kind in REGISTRY.items()}
    return models | {name: model_of(methods[name], MethodSection) for name in OPTIMIZERS}


def json_schema() -> dict[str, Any]:
    """Return the schema as a JSON object."""
    default = Section.model_fields["compressor"].default
    models = every_model()
    definitions: dict[str, Any] = {}
    for name, model in models.items():
        made = model.model_json_schema()
        definitions |= made.pop("$defs", {})
        keys = made["properties"]
        keys["compressor"] = {"const": name}
        keys["enabled"]["default"] = True
        keys["$schema"] = {"type": "string", "description": "Where an editor finds this schema."}
        definitions[name] = made
    compressor = {
        "enum": list(models),
        "default": default,
        "description": descriptions(Section)["compressor"],
    }
    definitions["section"] = {
        "type": "object",
        "properties": {"compressor": compressor},
        "allOf": [_if_compressor(name, name == default) for name in models],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"The section {SECTION}, or a DeepSpeed configuration that has it",
        "type": "object",
        "if": {"anyOf": [{"required": [key]} for key in _DEEPSPEED_KEYS]},
        "then": {"properties": {SECTION: {"$ref": "#/$defs/section"}}},
        "else": {"$ref": "#/$defs/section"},
        "$defs": dict(sorted(definitions.items())),
    }


def _if_compressor(name: str, default: bool) -> dict[str, Any]:
    """Return the keys that a section with this compressor has; of the default one, also
    where no compressor is named.
    """
    named: dict[str, Any] = {"properties": {"compressor": {"const": name}}}
    if not default:
        named["required"] = ["compressor"]
    return {"if": named, "then": {"$ref": f"#/$defs/{name}"}}
