"""Reads a run's metrics.jsonl for comparison with another run's."""

import json
import os
import re
import sys
from pathlib import Path

BIN = os.path.dirname(sys.executable)
MEASURED = re.compile("pairs_per_s|checkpoint_s|tflops|mfu|time/.*")  # differs from run to run


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def metrics(run: Path) -> list[dict]:
    """The lines without the columns that depend on the clock."""
    return [{k: v for k, v in line.items() if not MEASURED.fullmatch(k)} for line in lines(run)]
