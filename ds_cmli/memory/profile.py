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
    """The profiles that the user asks for."""

    trace_steps: str | None = None  # --profile, "FIRST:LAST"
    memory_steps: int | None = None  # --profile-memory, how many

    def still_possible(self, total_steps: int, num_done: int) -> "Profiles":
        """Return the profiles that a run can record after `num_done` steps; print the others.

        Raises:
            UserError: the training never takes these steps, or both profiles are requested.
        """
        trace = self.trace_steps
        memory = self.memory_steps
        if memory is not None and not 1 <= memory <= total_steps:
            remedy = f"give 1 to {total_steps} steps of the training; 2 see the peak"
            raise UserError(f"--profile-memory is {memory}: {remedy}")
        if memory is not None and trace is not None:
            requested = f"--profile-memory is {memory} and --profile is {trace!r}"
            raise UserError(f"{requested}: both take the profiler, give one")
        if trace is not None:
            first, _ = parse_steps(trace, total_steps)
            if first <= num_done:
                reason = f"the training goes on at step {num_done + 1}"
                print_line(f"--profile {trace} is left out: {reason}")
                trace = None
        left = total_steps - num_done
        if memory is not None and memory > left:
            print_line(
                f"--profile-memory {memory} is left out: {left} steps are left of the training"
            )
            memory = None
        return Profiles(trace, memory)

    def loop_context(
        self,
        train_engine: "TrainEngine",
        config: Config,
        ds_config: DeepSpeedConfig,
        folder: Path,
        num_done: int,
    ) -> AbstractContextManager[AfterStep]:
        """Return the context in which the training loop is profiled, into `folder`.

        `config` and `ds_config` are what `engine.build` took; `num_done` steps were taken before.
        """
        if self.trace_steps is not None:
            steps = parse_steps(self.trace_steps, sys.maxsize)  # `still_possible` has checked them
            return profiling(steps, folder / "profile", num_done)
        if self.memory_steps is not None:
            return profiling_memory(self.memory_steps, train_engine, config, ds_config, folder)
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
def profiling(steps: tuple[int, int], folder: Path, num_done: int) -> Iterator[AfterStep]:
    """Trace steps; after the last one each rank writes `rank<r>.<time>.pt.trace.json`.

    Args:
        steps: the first and the last traced step, counted from 1.
        num_done: steps that were taken before.
    """
    from torch.profiler import profile, schedule, tensorboard_trace_handler

    from ds_cmli.distributed import process_group as distributed

    first, last = steps
    rank = distributed.rank()
    handler = tensorboard_trace_handler(str(folder), worker_name=f"rank{rank}")

    def write(profiler: profile) -> None:
        try:
            handler(profiler)
            print_line(f"trace of steps {first} to {last}: {folder}")
        except (OSError, RuntimeError) as error:  # the training goes on
            print(f"warning: rank {rank}: no trace in {folder}: {error}", flush=True)

    warmup = min(first - num_done - 1, 1)  # starting the tracer takes time
    profiler = profile(
        schedule=schedule(wait=first - warmup, warmup=warmup, active=last - first + 1, repeat=1),
        on_trace_ready=write,
        profile_memory=True,
        record_shapes=True,
        with_stack=True,
    )
    profiler.step_num = num_done + 1  # the trace and the schedule count as the log does
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
    """Measure the next `steps` steps: 2 or more see the peak, because the first creates states.

    After the last of them rank 0 writes `folder/memory.json`. At the end of the loop, on a GPU, it
    adds a prediction for this GPU and the differences.
    """
    import torch

    from ds_cmli.distributed import process_group as distributed
    from ds_cmli.memory.categories import TrainingRecorder
    from ds_cmli.memory.report import summarise
    from ds_cmli.memory.step_memory import Step, peak_totals
    from ds_cmli.memory_model import gpus

    device = train_engine.device
    on_gpu = device.type == "cuda"
    device_name = torch.cuda.get_device_name(device) if on_gpu else "CPU"
    setting = {"preset": config.run.preset, "steps": steps, "gpu": device_name}
    setting["world_size"] = distributed.world_size()
    recorder = TrainingRecorder(device.type)
    contexts = ExitStack()  # of the measurement, closed after its last step
    num_taken = 0
    max_positions = 0  # the length of the longest text so far
    report = JsonObject()  # the content of memory.json, on rank 0 after the last measured step

    def note_positions(module: object, inputs: tuple) -> None:
        nonlocal max_positions
        (batch, *_) = inputs
        max_positions = max(max_positions, batch.token_mask.shape[1])

    def after_step() -> None:
        nonlocal num_taken
        num_taken += 1
        if num_taken != steps:
            return
        contexts.close()
        if not distributed.is_main():
            return
        measurement = summarise(recorder.events(), setting, f"measured: {device_name}")
        if on_gpu:
            measurement.take_totals(peak_totals(device))  # CPU-GPU sync
            torch.cuda.memory._dump_snapshot(str(folder / SNAPSHOT))
            record_history()  # back to the history that every training run keeps
        report["measurement"] = measurement.to_dict()
        _write(folder / REPORT_FILE, report)

    with contexts:
        contexts.enter_context(train_engine.objective.register_forward_pre_hook(note_positions))
        if on_gpu:
            record_history(10**7)
            torch.cuda.reset_peak_memory_stats(device)  # loading is not measured
        contexts.enter_context(recorder)
        contexts.enter_context(recorder.attach(train_engine))
        yield after_step  # the training loop runs
    if report and on_gpu:
        step = Step(config, ds_config, distributed.world_size(), 0, positions=max_positions)
        gpu = gpus.of_device(torch.cuda.get_device_properties(device))
        prediction = _predict_in_process(step, gpu)
        if prediction is not None:
            report["prediction"] = prediction
            report["differences"] = differences(prediction, report["measurement"])
            _write(folder / REPORT_FILE, report)


def _predict_in_process(step: "Step", gpu: "Gpu") -> JsonObject | None:
    """Predict in a new process, because this one has a process group; None if that fails."""
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
    """Return predicted minus measured bytes, and their ratio, of each figure in both reports."""
    out: JsonObject = {}
    for part in ("totals", "phases", "categories"):
        out[part] = {}
        for name in predicted[part].keys() & measured[part].keys():
            predicted_bytes = predicted[part][name]
            measured_bytes = measured[part][name]
            out[part][name] = {"bytes": predicted_bytes - measured_bytes}
            if measured_bytes:
                out[part][name]["ratio"] = predicted_bytes / measured_bytes
    return out


def record_history(max_actions: int = 100_000) -> None:
    """Keep the last actions of CUDA's allocator from now on, without stacks, which cost time."""
    import torch

    torch.cuda.memory._record_memory_history(
        context=None, max_entries=max_actions, clear_history=True
    )


def _write(path: Path, content: JsonObject) -> None:
    try:
        path.write_text(json.dumps(content, indent=2) + "\n")
    except OSError as error:  # the training goes on
        print_line(f"warning: {path} cannot be written: {error.strerror}")
