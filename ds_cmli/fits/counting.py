"""Asks PyTorch's own allocator what a program takes until its optimizer steps are done.

`null_gpu.py` starts it in a process with the CUDA build of PyTorch:
`python -m ds_cmli.fits.counting STEPS ANSWER SNAPSHOT SCRIPT ARGUMENTS`. The answer is a file of
JSON; the snapshot may be "".
"""

import json
import sys
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

import torch
from packaging.version import Version
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ds_cmli.common.cli import guard_streams, leave
from ds_cmli.common.patches import patch_for_good
from ds_cmli.fits import script
from ds_cmli.fits.progress import Progress

KINDS = ("requested", "allocated", "reserved")


def mixed_releases() -> str:
    """The versions of torch that packages of this environment may be built for; "" if it is one."""
    versions = {package.version for package in distributions(name="torch")}
    releases = {Version(version).public for version in versions}
    return " and ".join(sorted(versions)) if len(releases) > 1 else ""


def end_after_steps(progress: Progress) -> None:
    """End the program when its optimizers have done their steps."""

    def before(module: nn.Module, inputs: tuple) -> None:
        if torch.compiler.is_compiling():  # else what follows would divide the graph
            return
        if progress.ends_before(module, inputs):
            raise script.StepsDone

    def runs_backward(*arguments: object, **options: object) -> object:
        progress.backward += 1  # DeepSpeed also steps without one, to make optimizer states
        return run_backward(*arguments, **options)

    @torch._disable_dynamo
    def after(optimizer: Optimizer, *_: object) -> None:
        if progress.ends_after_step(optimizer):
            raise script.StepsDone

    run_backward: Callable[..., object] = torch.autograd._engine_run_backward
    patch_for_good("torch: backward", runs_backward)
    register_module_forward_pre_hook(before)
    register_optimizer_step_post_hook(after)


def count(steps: int, answer: str, snapshot: str, command: list[str]) -> int:
    """Run the program and write what the allocator has counted.

    Returns the program's exit code, 1 where the device had too little memory.
    """
    progress, full = Progress(steps), False
    end_after_steps(progress)
    torch.backends.cuda.enable_cudnn_sdp(False)  # the null GPU has none
    if snapshot:
        torch.cuda.memory._record_memory_history()
    try:
        code = script.run(command, progress.ends_with, (torch.OutOfMemoryError,))
    except torch.OutOfMemoryError:
        full = True
        code = 1
    if code and not full:
        return code
    stats = torch.cuda.memory_stats()
    counted: dict[str, object] = {kind: stats.get(f"{kind}_bytes.all.peak", 0) for kind in KINDS}
    counted["steps"] = min(progress.done.values(), default=0)
    counted |= {"ending": [*progress.ending()], "waited_for": progress.waited_for}
    counted["written"] = script.written()
    counted["retries"] = stats.get("num_alloc_retries", 0)
    counted["full"] = full or stats.get("num_ooms", 0) > 0
    if snapshot:
        torch.cuda.memory._dump_snapshot(snapshot)
    Path(answer).write_text(json.dumps(counted))
    return code


def main() -> None:
    guard_streams()
    steps, answer, snapshot, *command = sys.argv[1:]
    mixed = mixed_releases()
    if mixed:
        mistake = f"error: --engine null needs packages for one release of torch, and finds {mixed}"
        print(f"{mistake}: install torch {Version(torch.__version__).public}", file=sys.stderr)
        leave(2)
    leave(count(int(steps), answer, snapshot, command))


if __name__ == "__main__":
    main()
