"""docs/benchmarks.md and its plots, made of the JSON files of measurements
(benchmarks/results) and of nothing else.

    python -m benchmarks.page
"""
