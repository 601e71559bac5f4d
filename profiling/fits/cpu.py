"""Compares the recorder of `ds-cmli-memory fits` with what PyTorch's CPU allocator takes, counted below torch.

Each program of `programs/` runs twice on the CPU: as it is under `cpu_allocations.c`, and on tensors without data.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

from ds_cmli.common.cli import run_command
from ds_cmli.common.errors import UserError
from profiling.scripts import processor, run

PROGRAMS = Path(__file__).parent / "programs"
SOURCE = Path(__file__).with_name("cpu_allocations.c")
# Those that need neither a GPU's own functions nor packages outside the tests' environment, and end soon.
NAMES = [
    "accelerate_loop",
    "bert_trainer",
    "dcgan",
    "deeplab",
    "detr",
    "lbfgs_fit",
    "lstm_words",
    "mixtral_experts",
    "resnet50",
    "speech_transformer",
    "t5_trainer",
    "timm_ema",
    "vit_trainer",
    "wav2vec2_ctc",
]
HEAD = ("program", "counted", "`fits`", "difference", "other libraries then", "their peak")


def built(folder: Path) -> Path:
    """Compile the counter; raises `UserError` if there is no compiler."""
    library = folder / "cpu_allocations.so"
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(SOURCE), "-lpthread"]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("counting below torch needs a C compiler, and cc is not there") from None
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().splitlines()[-1]
        raise UserError(f"cc cannot compile {SOURCE.name}: {last}") from None
    return library


def peaks(mode: str, script: Path, steps: int, library: Path | None = None) -> dict[str, int]:
    """The peaks of one program; raises `UserError` if it does not run."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    env |= {"LD_PRELOAD": str(library)} if library else {}
    command = [sys.executable, "-m", "profiling.fits.on_cpu", mode, str(steps), str(script)]
    ended = run(command, environment=env)
    if ended.code:
        raise UserError(f"{mode}: {ended.mistake}")
    return json.loads(ended.out.splitlines()[-1])


def row(name: str, steps: int, library: Path) -> str:
    script = PROGRAMS / f"{name}.py"
    try:
        counted, answered = peaks("counted", script, steps, library), peaks("fits", script, steps)
    except UserError as error:
        return f"| {name} | {error} |"
    difference = f"{answered['requested'] / counted['requested'] - 1:+.3%}"
    cells = [f"{counted['requested']:,}", f"{answered['requested']:,}", difference]
    cells += [f"{counted['others then']:,}", f"{counted['others']:,}"]
    return f"| {' | '.join((name, *cells))} |"


@click.command()
@click.argument("names", nargs=-1)
@click.option("--steps", default=2, show_default=True)
def command(names: tuple[str, ...], steps: int) -> None:
    """Run the programs NAMES, or those that a CPU runs in a minute or two."""
    print(f"{time.strftime('%Y-%m-%d')}, {processor()}, {steps} steps, bytes\n")
    print(f"| {' | '.join(HEAD)} |\n|{'---|' * len(HEAD)}")
    with tempfile.TemporaryDirectory() as folder:
        library = built(Path(folder))
        for name in names or NAMES:
            print(row(name, steps, library), flush=True)


if __name__ == "__main__":
    run_command(command)
