"""Jobs of slurm/train.sh, and what they leave."""

import re
import sys
from pathlib import Path

from tests.ranks import ROOT
from tests.slurm.cluster import Cluster

SCRIPT = str(ROOT / "slurm" / "train.sh")


def submit(cluster: Cluster, folder: Path, sbatch: tuple[str, ...], *options: str, python: str = sys.executable) -> str:
    """Submit slurm/train.sh from `folder`; the job's id."""
    return cluster.submit(*sbatch, SCRIPT, *options, cwd=folder, DS_CMLI_PYTHON=python, OMP_NUM_THREADS="1")


def log(folder: Path, job: str) -> str:
    file = folder / f"slurm-{job}.out"
    return file.read_text() if file.exists() else ""


def finish(cluster: Cluster, folder: Path, job: str, state: str = "COMPLETED", timeout: float = 180) -> str:
    """Wait for the job's end, which must be `state`; its log."""
    try:
        result = cluster.wait(job, timeout=timeout)
    except TimeoutError as error:
        raise AssertionError(f"{error}\n{log(folder, job)}") from None
    text = log(folder, job)
    assert result["JobState"] == state, text
    return text


def steps_done(run: Path) -> int:
    """The last step in metrics.jsonl, which may be in the middle of being written; 0 before the first."""
    file = run / "metrics.jsonl"
    matches = re.findall(r'^\{"step": (\d+),', file.read_text(), re.MULTILINE) if file.exists() else []
    return int(matches[-1]) if matches else 0
