"""Runs one program on the CPU, with or without data, and prints its peak: `python -m profiling.fits.on_cpu MODE STEPS SCRIPT`.

What the program asks of device `cuda` it gets on the CPU. Its last line is JSON, in bytes. Mode "counted" runs it as it is
under `cpu_allocations.c`; mode "fits" runs it as `ds-cmli-memory fits` does, but records the host's tensors.
"""

import ctypes
import json
import sys
from contextlib import ExitStack
from itertools import accumulate

import torch
from torch.overrides import TorchFunctionMode

from ds_cmli.common.patches import patched
from ds_cmli.fits import program, script
from ds_cmli.fits.counting import end_after_steps
from ds_cmli.fits.device import Streams
from ds_cmli.fits.progress import Progress
from ds_cmli.fits.steps import StepRecorder
from ds_cmli.fits.values import Values
from ds_cmli.fits.world import World


class OnCpu(TorchFunctionMode):
    """Puts on the CPU what a program puts on device `cuda`."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.Tensor.cuda:
            return args[0]
        kwargs = {name: on_cpu(value) for name, value in (kwargs or {}).items()}
        return func(*map(on_cpu, args), **kwargs)


def on_cpu(value: object) -> object:
    named = isinstance(value, str) and value.split(":")[0] == "cuda"
    if named or (isinstance(value, torch.device) and value.type == "cuda"):
        return torch.device("cpu")
    return value


def counted(steps: int, command: list[str]) -> dict[str, int]:
    """The peaks below torch, and what libraries other than libc10 had then."""
    library = ctypes.CDLL(None)
    progress = Progress(steps)
    end_after_steps(progress)
    if library.counting_begins():
        raise SystemExit("libc10 is not loaded")
    with OnCpu(), patched("torch: loading processes", lambda _: program.InThisProcess):
        code = script.run(command, progress.ends_with)
    if code:
        raise SystemExit(code)
    c10, others = (ctypes.c_size_t * 2).in_dll(library, "peaks")
    then = ctypes.c_size_t.in_dll(library, "others_then").value
    return {"requested": c10, "others": others, "others then": then}


def recorded(steps: int, command: list[str]) -> dict[str, int]:
    """The peak of the host's tensors, by the recorder of `fits`."""
    recorder = StepRecorder(None, steps)
    Streams(recorder)
    with ExitStack() as stack:
        stack.enter_context(OnCpu())
        ran = program.run(command, recorder, Values(), None, World())
    if ran.code:
        raise SystemExit(ran.code)
    return {"requested": max(accumulate(event.bytes for event in recorder.events()))}


def main() -> None:
    mode, steps, *command = sys.argv[1:]
    peaks = {"counted": counted, "fits": recorded}[mode](int(steps), command)
    print(json.dumps(peaks), flush=True)


if __name__ == "__main__":
    main()
