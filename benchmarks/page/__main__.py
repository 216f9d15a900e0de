"""The command that writes docs/benchmarks.md, docs/demo_cluster.md and their plots."""

from __future__ import annotations

from benchmarks.page import building, demo
from benchmarks.page.building import not_current

if __name__ == "__main__":
    for path in [*building.write_all(), *demo.write_all()]:
        print(path)
    for name in not_current():
        print(f"{name}: its sources have changed since it was measured")
