"""Environments that no launcher sets: each is to be refused in one line, before the ranks wait for each other."""

import re
import subprocess
import sys

from tests.config.soak import Counts
from tests.conftest import ROOT, clean_environment

SLURM = "SLURM_STEP_ID=0 SLURM_NTASKS=2 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_JOB_ID=7 SLURM_STEP_NODELIST=localhost"
ODD = ["two", "0", "-1", "1.5", "", " ", "9" * 30, "0x1"]
ENVIRONMENTS = [
    *(f"WORLD_SIZE={value} RANK=0" for value in ODD),
    *(f"RANK={value} WORLD_SIZE=1" for value in ["x", "3", "1", "-1", "1.5", "", "9" * 30]),
    *(f"LOCAL_RANK={value}" for value in ["x", "-1", "7", ""]),
    *(f"MASTER_PORT={value}" for value in ["x", "99999", "-5", "", "1e4"]),
    "MASTER_ADDR=", "MASTER_ADDR= ", "WORLD_SIZE=2", "RANK=1", "RANK=2 WORLD_SIZE=2", "WORLD_SIZE=two", "WORLD_SIZE=0",
    "RANK=0 WORLD_SIZE=2 MASTER_PORT=0", "DS_ACCELERATOR=foo", "DS_ACCELERATOR=xpu", "DS_ACCELERATOR=cuda",
    *(SLURM.replace("=0", f"={value}", 1) for value in ["x", ""]),
    *(SLURM.replace(f"{name}=0", f"{name}=x") for name in ("SLURM_PROCID", "SLURM_LOCALID")),
    *(" ".join(w for w in SLURM.split() if not w.startswith(name))
      for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST")),
    SLURM.replace("SLURM_NTASKS=2", "SLURM_NTASKS=two"), SLURM.replace("SLURM_PROCID=0", "SLURM_PROCID=5"),
]  # fmt: skip
START = """
import sys
from datetime import timedelta
import click
from ds_cmli.common.cli import exit_code, leave, say
from ds_cmli.distributed.launchers import map_launcher_environment

@click.command()
def command():
    map_launcher_environment()
    say(" ")
    import os
    if "DS_ACCELERATOR" in os.environ:
        from ds_cmli import engine
        from ds_cmli.config.deepspeed_config import DeepSpeedConfig
        engine.on_this_device(DeepSpeedConfig.of({}))
    from ds_cmli.distributed import rendezvous
    print("MEETING", flush=True)
    rendezvous.meet(timedelta(seconds=4))

leave(exit_code(command))
"""


def soak_environments() -> Counts:
    """Every environment here is one that no launcher sets, so that none of them is to be taken."""
    result = Counts("launchers' variables")
    base = {k: v for k, v in clean_environment().items() if not k.startswith("SLURM_")} | {"PYTHONPATH": str(ROOT)}
    for words in ENVIRONMENTS:
        pairs = re.findall(r"([A-Z_]+)=( |\S*)", words)
        env = base | dict(pairs)
        try:
            done = subprocess.run(
                [sys.executable, "-c", START], env=env, cwd=ROOT, capture_output=True, text=True, timeout=90
            )
        except subprocess.TimeoutExpired:
            result.add(words, "silent")
            continue
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        if "Traceback" in done.stderr or done.returncode not in (0, 2):
            way = "traceback"
        else:
            way = "refused" if len(lines) == 1 and "MEETING" not in done.stdout else "silent"
        result.add(words, way)
    return result
