"""The `lowrank_comm` section of a JSON or YAML file, or the same as a dict: one schema
for every engine.

    section    what a section holds, and how it is checked
    enabled    what "enabled": false means
    hints      what to write in the place of a key or a word that is unknown
    schema     the JSON Schema for editors, and
    table      the table of settings in the docs, both derived from the options

`python -m lowrank_comm.config schema` and `... tables FILE...` write the last two.
"""

from __future__ import annotations

from lowrank_comm.config.section import OPTIMIZERS, SECTION, Section

__all__ = ["OPTIMIZERS", "SECTION", "Section"]
