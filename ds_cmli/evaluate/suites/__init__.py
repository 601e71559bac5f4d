"""Benchmarks that papers report, run by `ds-cmli-evaluate MODEL --suite FILE.toml`.

A kind of task is one file with a frozen dataclass, its settings, and one line in `registry.TASKS`.
"""
