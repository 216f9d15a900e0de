"""The command that writes docs/benchmarks.md and its plots."""

from __future__ import annotations

from benchmarks.page.building import not_current, write_all

if __name__ == "__main__":
    for path in write_all():
        print(path)
    for name in not_current():
        print(f"{name}: its sources have changed since it was measured")
