"""Writes what is derived from the options; run as `python -m lowrank_comm.config`.

schema             the JSON Schema of the section, to standard output
tables FILE...     the tables of settings in these pages, in place
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from lowrank_comm.config.schema import json_schema
from lowrank_comm.config.table import filled


def main() -> None:
    parser = argparse.ArgumentParser("python -m lowrank_comm.config")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("schema", help="write the JSON Schema of the section to standard output")
    tables = commands.add_parser("tables", help="write the tables of settings in pages")
    tables.add_argument("files", nargs="+", type=Path)
    given = parser.parse_args()
    if given.command == "schema":
        print(json.dumps(json_schema(), indent=2))
    else:
        for file in given.files:
            file.write_text(filled(file.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
