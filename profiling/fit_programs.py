#!/usr/bin/env python
"""Runs the programs of `programs/` through `ds-cmli-memory fits`, and prints a table.

Each is a few lines that start a public package as its users do, with random weights. With `--null`, each program that fits
runs also on the null GPU of `tests/null_gpu`, and the table has the differences of `fits` from what PyTorch counted there.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import click

from ds_cmli.common.cli import run_command
from profiling.scripts import processor

PROGRAMS = Path(__file__).parent / "programs"
GPU, CARD = "A100 80GB", "a100"  # the same one by its name in gpus.json, and on the null GPU
RANKS = dict.fromkeys(
    ("ddp_gpt2", "fsdp2_llama", "deepspeed_zero2", "deepspeed_zero3", "trainer_deepspeed"), 2
)
FITS = "import sys; sys.argv[0] = 'fits'; from ds_cmli.fits.command import main; main()"
# Runs a program until each of its optimizers has done a number of steps, and prints what the allocator counted.
COUNTED = """
import collections, json, runpy, sys, torch
from torch.optim.optimizer import register_optimizer_step_post_hook
steps, sys.argv, done = int(sys.argv[1]), sys.argv[2:], collections.Counter()

class Done(BaseException):
    pass

def after(optimizer, *_):
    done[id(optimizer.param_groups[0]["params"][0])] += 1
    if min(done.values()) >= steps:
        raise Done

register_optimizer_step_post_hook(after)
sys.path[0] = sys.argv[0].rpartition("/")[0]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except (Done, SystemExit):
    pass
stats = torch.cuda.memory_stats()
kinds = ("requested", "allocated", "reserved")
print("COUNTED" + json.dumps({kind: stats[f"{kind}_bytes.all.peak"] for kind in kinds}), flush=True)
import os
os._exit(0)
"""


@dataclass
class Ended:
    """A process that has ended."""

    code: int
    out: str
    error: str
    seconds: float  # of the processor
    host: int  # bytes, the most that were resident


def run(command: list[str], env: dict[str, str], limit: int) -> Ended:
    """Run a command until it ends, or is ended after `limit` seconds."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as error:
        process = subprocess.Popen(
            command, env=env, stdout=out, stderr=error, cwd=tempfile.gettempdir()
        )
        began = time.monotonic()
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        while not ended:
            if time.monotonic() - began > limit:
                process.kill()
            time.sleep(0.05)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0), error.seek(0)
        return Ended(
            process.returncode,
            out.read(),
            error.read(),
            usage.ru_utime + usage.ru_stime,
            usage.ru_maxrss << 10,
        )


def fitted(name: str, steps: int, limit: int) -> tuple[dict[str, int], Ended]:
    """What `fits` tells of a program: its totals, empty if there are none."""
    ranks = ["--world-size", str(RANKS[name])] if name in RANKS else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "answer.json"
        options = ["--gpu", GPU, "--steps", str(steps), "--json", str(path), *ranks]
        command = [sys.executable, "-c", FITS, *options, "--", str(PROGRAMS / f"{name}.py")]
        path_of_packages = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        ended = run(command, os.environ | {"PYTHONPATH": path_of_packages}, limit)
        return {} if ended.code else json.loads(path.read_text())["totals"], ended


def counted(name: str, steps: int, limit: int) -> tuple[dict[str, int], Ended]:
    """What PyTorch's allocator counts of a program on the null GPU, as its first rank."""
    from tests.null_gpu.build import build
    from tests.null_gpu.environment import environment

    ranks = RANKS.get(name, 1)
    command = [sys.executable, "-c", COUNTED, str(steps), str(PROGRAMS / f"{name}.py")]
    envs = [environment(build(), CARD, ranks) for _ in range(ranks)]
    if ranks > 1:
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617", "WORLD_SIZE": str(ranks)}
        envs = [
            env | meeting | {"RANK": str(n), "LOCAL_RANK": str(n)} for n, env in enumerate(envs)
        ]
    with ThreadPoolExecutor(ranks) as threads:
        first, *_ = threads.map(lambda env: run(command, env, limit), envs)
    lines = [line for line in first.out.splitlines() if line.startswith("COUNTED")]
    return json.loads(lines[-1].removeprefix("COUNTED")) if lines else {}, first


def last_line(ended: Ended) -> str:
    lines = [line for line in ended.error.splitlines() if line.strip()]
    return f"exit code {ended.code}: {lines[-1][:300] if lines else 'no message'}"


def difference(told: int, found: int) -> str:
    return "equal" if told == found else f"{told / found - 1:+.2%}"


def row(name: str, steps: int, null: bool, limit: int, output: bool) -> str:
    told, ended = fitted(name, steps, limit)
    if output:
        print(ended.out + ended.error, file=sys.stderr)
    if not told:
        return f"| {name} | {last_line(ended)} |"
    sizes = " | ".join(f"{told[kind]:,}" for kind in ("requested", "allocated", "reserved"))
    cells = f"| {name} | {sizes} | {ended.seconds:.0f} | {ended.host / 1e9:.2f} |"
    if null:
        found, ended = counted(name, steps, limit)
        if output:
            print(ended.out + ended.error, file=sys.stderr)
        differences = [difference(told[kind], found[kind]) for kind in found]
        cells += f" {' | '.join(differences) or last_line(ended)} |"
    return cells


@click.command()
@click.argument("names", nargs=-1)
@click.option("--null", is_flag=True, help="Run each on the null GPU as well.")
@click.option("--steps", default=2, show_default=True)
@click.option("--seconds", default=600, show_default=True, help="After which a program is ended.")
@click.option("--output", is_flag=True, help="Show what the programs print.")
def command(names: tuple[str, ...], null: bool, steps: int, seconds: int, output: bool) -> None:
    """Run the programs of profiling/programs, or those NAMES."""
    print(f"{time.strftime('%Y-%m-%d')}, {processor()}, {GPU}, {steps} steps\n")
    print(
        "| program | requested | allocated | reserved | CPU s | host GB |"
        + " requested | allocated | reserved |" * null
    )
    print("|---|---|---|---|---|---|" + "---|---|---|" * null)
    for name in names or sorted(path.stem for path in PROGRAMS.glob("*.py")):
        print(row(name, steps, null, seconds, output), flush=True)


if __name__ == "__main__":
    run_command(command)
