"""Out of memory: training ends on every rank with exit code 2 and one message of what to change.

A rank that runs out of memory claims a file in the run's folder, so that only one rank prints the
message if several run out together; the others wait for it and end silently. Nothing here is a
collective. A rank that still waits in one for the failed rank is ended by the watchdog, or by the
launcher, which sees the failed rank's exit code.
"""

import errno
import os
import re
import resource
import sys
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import JsonObject
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config
from ds_cmli.distributed import process_group as distributed
from ds_cmli.faults.watchdog import Watchdog
from ds_cmli.memory import measure, predict_subprocess
from ds_cmli.memory.changes import SettingsChange, Shortage, Step
from ds_cmli.memory.predict_subprocess import PredictionAnswer

EXIT_CODE = 2  # as for every mistake that the user can correct
WAIT_SECONDS = 180  # for the rank that prints the message, which mostly predicts what would fit
PHRASES = (
    "can't allocate memory",
    "not enough memory",
    "std::bad_alloc",
    "out of memory",
    "ALLOC_FAILED",
)
ADVICE_SECONDS = 120  # limit for all predictions together; the other ranks wait meanwhile
UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}


def is_shortage(error: BaseException) -> bool:
    """Whether an exception says that the memory of the GPU or of this process was not enough."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in PHRASES)


def asked_bytes(error: BaseException) -> int | None:
    """The size of the failed allocation by the error's message, if it has one; rounded on CUDA."""
    size = re.search(r"tried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)", str(error), re.IGNORECASE)
    return int(float(size[1]) * UNITS[size[2]]) if size else None


@dataclass(frozen=True)
class DeviceRoom:
    """How much memory tensors can have, and what limits it."""

    bytes: int | None  # None if not known
    limit: str  # a description for the message


def process_room(base: dict[str, int]) -> DeviceRoom:
    """On the CPU: the smallest limit of this process, minus what it occupied without tensors."""
    limits = {
        "VmData": ("RLIMIT_DATA", resource.RLIMIT_DATA),
        "VmSize": ("RLIMIT_AS", resource.RLIMIT_AS),
    }
    smallest = DeviceRoom(None, "of this machine")
    for name, (words, kind) in limits.items():
        limit, _ = resource.getrlimit(kind)
        left = limit - base.get(name, 0)
        if limit != resource.RLIM_INFINITY and (smallest.bytes is None or left < smallest.bytes):
            smallest = DeviceRoom(left, f"of this process, {words} (ulimit) = {limit:,} B")
    return smallest


def process_bytes() -> dict[str, int]:
    """VmSize and VmData of this process: the sizes that RLIMIT_AS and RLIMIT_DATA limit."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    size, data = lines["VmSize"].split()[0], lines["VmData"].split()[0]
    return {"VmSize": int(size) * 1024, "VmData": int(data) * 1024}


def device_room(device: torch.device) -> DeviceRoom:
    """The most that CUDA's allocator can reserve besides other processes.

    To be called before its cache is emptied.
    """
    free, total = torch.cuda.mem_get_info(device)  # CPU-GPU sync
    room = free + torch.cuda.memory_reserved(device)
    name = torch.cuda.get_device_name(device)
    return DeviceRoom(room, f"of {name}, {room:,} B of {total:,} B for tensors of this rank")


def room_of(device: torch.device, base: dict[str, int]) -> DeviceRoom:
    if device.type == "cpu":
        return process_room(base)
    return device_room(device)


@contextmanager
def ending(
    config: Config,
    ds_config: DeepSpeedConfig,
    folder: Path,
    device: torch.device,
    watchdog: Watchdog,
    raises: bool = False,
) -> Iterator[None]:
    """Build and train inside: if memory runs out, this ends the process. Entering is a collective.

    Args:
        config, ds_config: as `engine.build` takes them; the prediction is made for them.
        folder: the run's folder, the same on every rank. The message and the snapshot are written
            there, as `out_of_memory*`.
        watchdog: waits longer while the message is prepared, and then tells the other ranks to end.
        raises: whether a single rank raises `UserError` after the message and goes on.
    """
    token = distributed.broadcast_object(uuid.uuid4().hex[:8])  # collective
    message = folder / f"out_of_memory-{token}.txt"
    snapshot = folder / f"out_of_memory-rank{distributed.rank()}.pickle"
    base = process_bytes() if device.type == "cpu" else {}
    if device.type == "cuda":
        _save_when_cuda_runs_out(snapshot)
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if not (is_shortage(error) or message.exists()):
            raise
        with watchdog.slow():
            if is_shortage(error):
                room = room_of(device, base)
                # The traceback's frames hold the step's tensors, and preparing the message takes
                # memory.
                traceback.clear_frames(error.__traceback__)
                step = Step(config, ds_config, distributed.world_size(), device.type == "cuda")
                if _speak(error, room, step, message, snapshot):
                    if raises and distributed.world_size() == 1:
                        raise UserError(f"out of memory: {message} says what would fit") from None
                    watchdog.dismiss()
                    _leave()
            # Another rank ran out first; here that showed as a broken connection, or this rank ran
            # out later.
            end = time.monotonic() + WAIT_SECONDS
            while message.exists() and message.stat().st_size == 0 and time.monotonic() < end:
                time.sleep(0.2)
            _leave()


def _speak(
    error: BaseException, room: DeviceRoom, step: Step, message: Path, snapshot: Path
) -> bool:
    """Print and write the message; returns False if another rank does so."""
    try:
        message.touch(exist_ok=False)
    except FileExistsError:
        return False
    # The folder cannot be written: other ranks do not hear of it, and this one speaks in any case.
    except OSError:
        pass
    size, rank = asked_bytes(error), distributed.rank()
    first = f": rank {rank} asked for {size:,} B" if size else f" on rank {rank}"
    _lift_limits()
    # On a GPU the allocator has written the real snapshot.
    predicted = "" if step.gpu else str(snapshot)
    try:
        lines = advise(step, room.bytes, predicted)
    except Exception as failed:  # the message must be printed even if the advice fails
        lines = [f"no prediction of what would fit: {type(failed).__name__}: {failed}"]
    if snapshot.exists():
        lines.append(f"snapshot for pytorch.org/memory_viz: {snapshot}")
    lines.insert(0, f"error: out of memory{first} over the limit {room.limit}")
    text = "\n  ".join(lines) + "\n"
    print(text, end="", file=sys.stderr, flush=True)
    with suppress(OSError):
        message.write_text(text)
    return True


def advise(step: Step, room: int | None, snapshot: str) -> list[str]:
    """The lines of the message: the predicted bytes by category, and settings that would fit.

    Args:
        room: the bytes that tensors can have (on a GPU: that the allocator can reserve); None if
            not known.
        snapshot: the file for the predicted snapshot; "" for none.
    """
    target, total = ("cuda", "reserved") if step.gpu else ("cpu", "requested")
    with predict_subprocess.Predictor(ADVICE_SECONDS) as predictor:

        def ask(config: Config, ds_config: DeepSpeedConfig, snapshot: str = "") -> PredictionAnswer:
            request = predict_subprocess.Request(
                config, ds_config, step.world_size, target, None, snapshot=snapshot
            )
            return predictor.ask(request)

        answer = ask(step.config, step.ds_config, snapshot)
        if answer.report is None:
            return [f"no prediction of what would fit: {answer.failed}"]
        lines = table(answer.report)
        if room is None:
            return lines
        # Fragmentation keeps some memory unusable, and the run failed at or below the predicted
        # peak: leave a tenth.
        room = min(room, answer.report["totals"][total] * 9 // 10)
        too_much = room + 1

        def needs(change: SettingsChange) -> int:
            changed = ask(change.config, change.ds_config).report
            if changed is None:
                return too_much
            return changed["totals"][total]

        fitting = [(change.what, size) for change, size in Shortage(step, room, needs).proposals()]
    for name, size in fitting:
        lines.append(f"would fit in {room:,} B by prediction: {name}: {size:,} B")
    if not fitting:
        lines.append(
            f"no setting that was tried would fit in {room:,} B: a smaller model or more memory"
        )
    return lines


def table(report: JsonObject) -> list[str]:
    """The lines of a prediction: bytes by category, largest first, and the predicted peak."""
    terms = sorted(((n, name) for name, n in report["categories"].items() if n), reverse=True)
    lines = [f"{name:<20} {n:>16,} B" for n, name in terms]
    lines.append(f"{'predicted peak':<20} {report['totals']['requested']:>16,} B")
    if terms:
        lines.append(f"the largest: {terms[0][1]}")
    return lines


def _lift_limits() -> None:
    """Remove this process's memory limits, which the process that predicts would inherit."""
    for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS):
        for limit in (resource.RLIM_INFINITY, resource.getrlimit(kind)[1]):
            try:
                resource.setrlimit(kind, (limit, limit))
                break
            except (ValueError, OSError):
                continue  # above the hard limit, which only the superuser may raise


def _leave() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    # os._exit and not sys.exit, because ending the process group would wait for collectives that
    # never finish.
    os._exit(EXIT_CODE)


def _save_when_cuda_runs_out(path: Path) -> None:
    """Have the allocator's state and history saved at the moment when an allocation fails."""
    measure.record_history()

    def save(device: int, size: int, total: int, free: int) -> None:
        torch.cuda.memory._dump_snapshot(str(path))

    torch._C._cuda_attach_out_of_memory_observer(save)  # type: ignore[attr-defined]
