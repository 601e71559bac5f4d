"""Reads a run's metrics.jsonl for comparison with another run's."""

import json
import os
import sys
from pathlib import Path

BIN = os.path.dirname(sys.executable)
MEASURED = {"pairs_per_s", "time/data", "peak_memory_bytes", "tflops", "mfu"}


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def metrics(run: Path) -> list[dict]:
    """The lines without the columns that differ from run to run."""
    return [{k: v for k, v in line.items() if k not in MEASURED} for line in lines(run)]
