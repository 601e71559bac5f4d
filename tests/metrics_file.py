"""Reads a run's metrics.jsonl for comparison with another run's."""

import json
import os
import re
import sys
from pathlib import Path

TIMES = {"pairs_per_s", "checkpoint_s", "tflops", "mfu"}


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl without the columns that depend on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMES and not k.startswith("time/")} for line in lines]


BIN = os.path.dirname(sys.executable)


MEASURED = re.compile("pairs_per_s|checkpoint_s|tflops|mfu|time/.*")  # differs from run to run


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(folder) -> list[dict]:
    return [{k: v for k, v in line.items() if not MEASURED.fullmatch(k)} for line in lines(folder)]
