"""Memory of the trainer's own step: two optimizer steps on the longest batch, on device cuda.

On a GPU its statistics are the measurement; on the fake CUDA device the same lines are the
prediction. Nothing is downloaded: weights are random, sizes those of the configuration.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from unittest import mock

import torch
import torch.distributed as dist

from ds_cmli import engine, hardware
from ds_cmli.cmli.triton_forward import why_not_capability
from ds_cmli.config.deepspeed_config import BATCH_KEYS, DeepSpeedConfig
from ds_cmli.config.messages import check
from ds_cmli.config.schema import Config
from ds_cmli.distributed import process_group as distributed
from ds_cmli.fake_cuda.device import fake_cuda
from ds_cmli.files import JsonObject, Section
from ds_cmli.memory.categories import TrainingRecorder
from ds_cmli.memory.inputs import longest_batch, without_weights
from ds_cmli.memory.report import Report, summarise
from ds_cmli.memory_model.caching_allocator import OutOfMemory, replay
from ds_cmli.memory_model.gpus import Gpu

TOTAL_STEPS = 1000  # of the learning rate schedule; no size depends on it
TOTALS = ("requested", "allocated", "reserved")
Prepare = Callable[[engine.TrainEngine], object]  # is called before the engine's first step
Watch = Callable[[engine.TrainEngine], AbstractContextManager[object]]


def _unchanged(train_engine: engine.TrainEngine) -> None:
    """Change nothing; a function, as a process of its own is given the step."""


@dataclass(frozen=True)
class Step:
    """A training step as one rank of several takes it.

    Args:
        config: any configuration; its weights become random ones of the same sizes.
        ds_config: the DeepSpeed JSON, with or without "auto" values.
        prepare: changes or reads the engine, once there is one.
        positions: of the longest texts; None: as many as the configuration allows.
    """

    config: Config
    ds_config: Section
    world_size: int = 1
    rank: int = 0
    prepare: Prepare = _unchanged
    positions: int | None = None

    def take_twice(self, watch: Watch = nullcontext) -> JsonObject:
        """Build the engine and take two steps: the optimizer's states are created in the first.

        Returns what was run.
        """
        device = torch.device("cuda", torch.cuda.current_device())
        bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
        json = DeepSpeedConfig.of(self.ds_config).on(fp16=True, bf16=bf16)
        json = json.filled(self.config, self.world_size, TOTAL_STEPS)
        _, micro_batch, accumulation = (json[key] for key in BATCH_KEYS)
        config, vocab_size = without_weights(self.config)
        why_not = why_not_capability(torch.cuda.get_device_capability(device))
        config = engine.choose_backend(config, "cuda", why_not)
        with one_rank(self.world_size, self.rank, config.run.deterministic):
            train_engine = engine.build(config, json, vocab_size, TOTAL_STEPS, device)
            self.prepare(train_engine)
            with watch(train_engine):
                for _ in range(2):
                    batch = longest_batch(config, micro_batch, self.positions)
                    train_engine.step(accumulation * [batch])
                    del batch
        return {
            "preset": config.run.preset,
            "world_size": self.world_size,
            "rank": self.rank,
            "micro_batch": micro_batch,
            "accumulation": accumulation,
            "zero_stage": json.stage,
            "precision": json.precision,
            "checkpointing": "activation_checkpointing" in json,
            "losses": list(config.loss.weights),
            "cmli_backend": config.loss.cmli_backend,
        }


@contextmanager
def one_rank(world_size: int, rank: int, deterministic: bool = False) -> Iterator[None]:
    """Inside, this is one rank of a group whose collectives move nothing, alone on its machine.

    If `deterministic`, PyTorch's switches are those of a run with `--deterministic`.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    variables = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    benchmark = torch.backends.cudnn.benchmark
    # The process group installs another one.
    hook = mock.patch.object(sys, "excepthook", sys.excepthook)
    with mock.patch.dict(os.environ, variables), hook:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            if deterministic:
                hardware.enforce_determinism()
            yield
        finally:
            distributed.shutdown()
            torch.use_deterministic_algorithms(was_deterministic)
            torch.backends.cudnn.benchmark = benchmark


def predicted(step: Step, gpu: Gpu, limit: int = 1 << 44) -> Report:
    """Predict the step's memory on a GPU that need not be there; it may occupy `limit` bytes.

    Each text fills all positions but the first of a batch, which is one token shorter: the most
    that a batch can need.

    Raises:
        UserError: a setting that cannot be built, or whose sizes are not known without a download.
        ValueError: a process group is already initialised.
    """
    # DeepSpeed moves such parameters by the values of tensors.
    zero = DeepSpeedConfig.of(step.ds_config)["zero_optimization"]
    offloaded = (zero.get("offload_param") or {}).get("device", "none")
    remedy = "it cannot be predicted: leave it out"
    check(offloaded == "none", "zero_optimization.offload_param.device", offloaded, remedy)
    fixed = hardware.DETERMINISTIC_CUBLAS if step.config.run.deterministic else None
    workspace_bytes = gpu.cublas_bytes(os.environ.get("CUBLAS_WORKSPACE_CONFIG", fixed))
    recorder = TrainingRecorder(gpu=gpu, workspace_bytes=workspace_bytes)
    with fake_cuda(recorder, gpu):
        setting = step.take_twice(recorder.attach)
        events = recorder.events()
    report = summarise(events, {**setting, "gpu": gpu.name}, "predicted")
    communicators = recorder.num_process_groups if step.world_size > 1 else 0
    outside_bytes = gpu.outside_bytes(communicators)
    try:
        replayed = replay(events, limit=limit - outside_bytes)
    except OutOfMemory:  # then without a limit: the totals say how much is missing
        replayed = replay(events)
    report.totals = dict(zip(TOTALS, replayed.peaks, strict=True))
    report.totals["device"] = report.totals["reserved"] + outside_bytes
    report.retries = replayed.retries
    return report


def measured(step: Step) -> Report:
    """Measure the step's memory on this GPU, which nothing else of this process uses.

    It runs twice: while the recorder watches, gradients are added up in new tensors.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    step.take_twice()
    totals = peak_totals(device)
    recorder = TrainingRecorder()
    with recorder:
        setting = step.take_twice(recorder.attach)
    name = torch.cuda.get_device_name(device)
    report = summarise(recorder.events(), {**setting, "gpu": name}, f"measured: {name}")
    report.take_totals(totals)
    return report


def predicted_worst(step: Step, gpu: Gpu, limit: int = 1 << 44, rank: int | None = None) -> Report:
    """Predict for the rank that needs the most, or for `rank` if it is known.

    ZeRO-1 and 2 divide the flat parameters by elements. A rank keeps the whole gradient of each
    parameter of which it owns a part. The last rank's gradients exist while most activations are
    still stored, so it is predicted first. If another rank owns parts of larger parameters, it is
    predicted too.
    """
    if rank is not None or DeepSpeedConfig.of(step.ds_config).stage not in (1, 2):
        return predicted(replace(step, rank=rank or 0), gpu, limit)
    elements_by_rank = [0] * step.world_size  # of the parameters of which a rank owns a part

    def count_elements(train_engine: engine.TrainEngine) -> None:
        step.prepare(train_engine)
        optimizer = train_engine.engine.optimizer
        for parameters in optimizer.param_to_partition_ids.values():
            for parameter, ranks in parameters.items():
                for owner in ranks:
                    elements_by_rank[owner] += optimizer.param_dict[parameter].numel()

    last = step.world_size - 1
    report = predicted(replace(step, rank=last, prepare=count_elements), gpu, limit)
    fullest = max(range(step.world_size), key=elements_by_rank.__getitem__)
    if elements_by_rank[fullest] <= elements_by_rank[last]:
        return report
    second = predicted(replace(step, rank=fullest), gpu, limit)
    return max(report, second, key=lambda candidate: candidate.totals["device"])


def peak_totals(device: torch.device) -> dict[str, int]:
    """Return the peaks since the last reset, in bytes; with "device" if the driver reports it.

    CPU-GPU sync.
    """
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    totals = {name: stats[f"{name}_bytes.all.peak"] for name in TOTALS}
    occupied = gpu_bytes(device)
    if occupied is not None:
        # The driver reports no peak: memory outside the allocator's segments is assumed to be the
        # same then as now.
        totals["device"] = occupied + totals["reserved"] - stats["reserved_bytes.all.current"]
    return totals


def gpu_bytes(device: torch.device) -> int | None:
    """Return the bytes that this process occupies on the GPU; None if NVML does not count them."""
    import pynvml

    try:
        pynvml.nvmlInit()
        uuid = torch.cuda.get_device_properties(device).uuid
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        pynvml.nvmlShutdown()
    except pynvml.NVMLError:
        return None
    used = {process.pid: process.usedGpuMemory for process in processes}
    if len(used) == 1:  # this process, of which NVML may list another id in a container
        return next(iter(used.values()))
    return used.get(os.getpid())
