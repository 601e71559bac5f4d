"""The options `--profile FIRST:LAST` and `--profile-memory STEPS` of train.py.

`--profile` writes a torch.profiler trace of these steps: memory, shapes and stacks. Read it with
`tensorboard --logdir <run>/profile` (the plugin torch-tb-profiler), or open the .json in Perfetto.
`--profile-memory` writes the peaks of the first steps by category and phase, into memory.json, and
on a GPU the allocator's history, for pytorch.org/memory_viz.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ds_cmli.commands import print_line
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.errors import UserError
from ds_cmli.files import JsonObject

if TYPE_CHECKING:  # these take seconds to import, and options are checked before
    from ds_cmli.engine import TrainEngine
    from ds_cmli.memory.step_memory import Step
    from ds_cmli.memory_model.gpus import Gpu

REPORT_FILE = "memory.json"
SNAPSHOT = "memory-snapshot.pickle"
AfterStep = Callable[[], None]  # called at the end of each step of the training loop


@dataclass(frozen=True)
class Profiles:
    trace: str | None = None  # --profile
    memory: int | None = None  # --profile-memory

    def still_possible(self, total_steps: int, done: int) -> "Profiles":
        """Return the profiles that a run can record after `done` steps; print those left out.

        Raises:
            UserError: no start of this run could record a profile, or both profiles are requested.
        """
        trace = self.trace
        memory = self.memory
        if memory is not None and not 1 <= memory <= total_steps:
            remedy = f"give 1 to {total_steps} steps of the training; 2 see the peak"
            raise UserError(f"--profile-memory is {memory}: {remedy}")
        if memory is not None and trace is not None:
            requested = f"--profile-memory is {memory} and --profile is {trace!r}"
            raise UserError(f"{requested}: both take the profiler, give one")
        if trace is not None and parse_steps(trace, total_steps)[0] <= done:
            print_line(f"--profile {trace} is left out: the training goes on at step {done + 1}")
            trace = None
        if memory is not None and memory > (left := total_steps - done):
            print_line(
                f"--profile-memory {memory} is left out: {left} steps are left of the training"
            )
            memory = None
        return Profiles(trace, memory)

    def around(
        self,
        train_engine: "TrainEngine",
        config: Config,
        ds_config: DeepSpeedConfig,
        folder: Path,
        done: int,
    ) -> AbstractContextManager[AfterStep]:
        """Return the context in which the training loop is profiled, into `folder`.

        `config` and `ds_config` are what `engine.build` took; `done` steps were taken before.
        """
        if self.trace is not None:
            return profiling(parse_steps(self.trace, sys.maxsize), folder / "profile", done)
        if self.memory is not None:
            return profiling_memory(self.memory, train_engine, config, ds_config, folder)
        return nullcontext(lambda: None)


def parse_steps(text: str, total_steps: int) -> tuple[int, int]:
    """ "3:5" -> (3, 5): the first and the last step, counted from 1 as in the log.

    Raises `UserError` for any other text, and for steps beyond `total_steps`.
    """
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        remedy = "give the first and the last step, from 1, for instance 3:5"
        raise UserError(f"--profile is {text!r}: {remedy}")
    if int(last) > total_steps:
        remedy = f"give some of the steps 1 to {total_steps} of this training"
        raise UserError(f"--profile is {text!r}: {remedy}")
    return int(first), int(last)


@contextmanager
def profiling(steps: tuple[int, int], folder: Path, done: int) -> Iterator[AfterStep]:
    """Record the first to the last of `steps`, counted from 1, of which `done` were taken before.

    `folder` gets one file from each rank, `rank<r>.<time>.pt.trace.json`, after the last one.
    """
    import torch
    from torch.profiler import ProfilerActivity, profile, schedule, tensorboard_trace_handler

    from ds_cmli.distributed import process_group as distributed

    rank = distributed.rank()
    handler = tensorboard_trace_handler(str(folder), worker_name=f"rank{rank}")

    def write(profiler: profile) -> None:
        try:
            handler(profiler)
            print_line(f"trace of steps {steps[0]} to {steps[1]}: {folder}")
        except (OSError, RuntimeError) as error:  # the training goes on
            print(f"warning: rank {rank}: no trace in {folder}: {error}", flush=True)

    first, last = steps
    warmup = min(first - done - 1, 1)  # starting the tracer takes time
    profiler = profile(
        activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available(),
        schedule=schedule(wait=first - warmup, warmup=warmup, active=last - first + 1, repeat=1),
        on_trace_ready=write,
        profile_memory=True,
        record_shapes=True,
        with_stack=True,
    )
    profiler.step_num = done + 1  # the trace and the schedule count as the log does
    with profiler:
        yield profiler.step


@contextmanager
def profiling_memory(
    steps: int,
    train_engine: "TrainEngine",
    config: Config,
    ds_config: DeepSpeedConfig,
    folder: Path,
) -> Iterator[AfterStep]:
    """Measure the first `steps` steps: 1 is before the optimizer's states exist.

    After the last of them rank 0 writes `folder/memory.json`; at the end of the loop a process
    predicts for this GPU what was measured, and the differences are added.
    """
    import torch

    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.memory.categories import TrainingRecorder
    from ds_cmli.memory.report import summarise
    from ds_cmli.memory.step_memory import Step, peak_totals
    from ds_cmli.memory_model import gpus

    device = train_engine.device
    done = 0
    longest = 0  # positions of the texts
    cuda = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if cuda else "CPU"
    recorder = TrainingRecorder(device.type)
    content = JsonObject()
    measuring = ExitStack()
    setting = {"preset": config.run.preset, "steps": steps, "gpu": name}
    setting["world_size"] = distributed.world_size()

    def note_texts(module: object, inputs: tuple) -> None:
        nonlocal longest
        longest = max(longest, inputs[0].token_mask.shape[1])

    def after_step() -> None:
        nonlocal done
        done += 1
        if done != steps:
            return
        measuring.close()
        if not distributed.is_main():
            return
        report = summarise(recorder.events(), setting, f"measured: {name}")
        if cuda:
            report.take_totals(peak_totals(device))  # CPU-GPU sync
            torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
            record_history()  # back to the history that every training run keeps
        content["measurement"] = report.to_dict()
        _write(folder / REPORT_FILE, content)

    with measuring:
        measuring.enter_context(train_engine.objective.register_forward_pre_hook(note_texts))
        if cuda:
            record_history(10**7)
            torch.cuda.reset_peak_memory_stats(device)  # what came before is no step
        measuring.enter_context(recorder)
        measuring.enter_context(recorder.attach(train_engine))
        yield after_step
    if content and cuda:
        step = Step(config, ds_config, distributed.world_size(), 0, positions=longest)
        gpu = gpus.of_device(torch.cuda.get_device_properties(device))
        predicted = _predicted(step, gpu)
        if predicted is not None:
            content["prediction"] = predicted
            content["differences"] = differences(predicted, content["measurement"])
            _write(folder / REPORT_FILE, content)


def _predicted(step: "Step", gpu: "Gpu") -> JsonObject | None:
    """Return the prediction for this GPU by a process of its own; None: there is none."""
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    from ds_cmli.memory.step_memory import predicted

    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(predicted, step, gpu).result().to_dict()
    except Exception as error:  # the training has ended well
        print_line(f"warning: the memory is measured and not predicted: {error}")
        return None


def differences(predicted: JsonObject, measured: JsonObject) -> JsonObject:
    """Predicted minus measured bytes and their ratio, for every figure that both reports have."""
    out: JsonObject = {}
    for part in ("totals", "phases", "categories"):
        out[part] = {}
        for name in predicted[part].keys() & measured[part].keys():
            expected = predicted[part][name]
            counted = measured[part][name]
            out[part][name] = {"bytes": expected - counted}
            if counted:
                out[part][name]["ratio"] = expected / counted
    return out


def record_history(max_actions: int = 100_000) -> None:
    """Keep the last actions of CUDA's allocator from now on.

    They are without stacks, which cost time at every allocation.
    """
    import torch

    torch.cuda.memory._record_memory_history(
        context=None, max_entries=max_actions, clear_history=True
    )


def _write(path: Path, content: JsonObject) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:  # the training goes on
        print_line(f"warning: {path} cannot be written: {error.strerror}")
