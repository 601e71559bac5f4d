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
NO_LIMIT = 1 << 44  # bytes, more than any GPU has
Prepare = Callable[[engine.TrainEngine], object]  # is called before the engine's first step
Watch = Callable[[engine.TrainEngine], AbstractContextManager[object]]


def _unchanged(train_engine: engine.TrainEngine) -> None:
    """Change nothing. This is no lambda, because a `Step` is pickled for another process."""


@dataclass(frozen=True)
class Step:
    """A training step as one rank of several takes it.

    Args:
        config: any configuration; its weights become random ones of the same sizes.
        ds_config: the DeepSpeed JSON, with or without "auto" values.
        prepare: changes or reads the engine, once there is one.
        positions: the length of the texts; None: the longest that the configuration allows.
    """

    config: Config
    ds_config: Section
    world_size: int = 1
    rank: int = 0
    prepare: Prepare = _unchanged
    positions: int | None = None

    def take_twice(self, watch: Watch = nullcontext) -> JsonObject:
        """Build the engine and take two steps: the optimizer's states are created in the first.

        Returns the setting for the report: sizes, precision, losses and more.
        """
        device = torch.device("cuda", torch.cuda.current_device())
        capability = torch.cuda.get_device_capability(device)
        # "auto" and the backend are decided as train.py decides them.
        ds_config = DeepSpeedConfig.of(self.ds_config).on(fp16=True, bf16=capability >= (8, 0))
        ds_config = ds_config.filled(self.config, self.world_size, TOTAL_STEPS)
        _, micro_batch, accumulation = (ds_config[key] for key in BATCH_KEYS)
        config, vocab_size = without_weights(self.config)
        config = engine.choose_backend(config, "cuda", why_not_capability(capability))
        with one_rank(self.world_size, self.rank, config.run.deterministic):
            train_engine = engine.build(config, ds_config, vocab_size, TOTAL_STEPS, device)
            self.prepare(train_engine)
            with watch(train_engine):
                for _ in range(2):
                    batch = longest_batch(config, micro_batch, self.positions)
                    train_engine.step(accumulation * [batch])
                    del batch  # it would still be held while the next one is made
        return {
            "preset": config.run.preset,
            "world_size": self.world_size,
            "rank": self.rank,
            "micro_batch": micro_batch,
            "accumulation": accumulation,
            "zero_stage": ds_config.stage,
            "precision": ds_config.precision,
            "checkpointing": "activation_checkpointing" in ds_config,
            "losses": list(config.loss.weights),
            "cmli_backend": config.loss.cmli_backend,
        }


@contextmanager
def one_rank(world_size: int, rank: int, deterministic: bool = False) -> Iterator[None]:
    """Make this process one rank of a group whose collectives move nothing, alone on its machine.

    All is undone at the end. If `deterministic`, PyTorch is set as a run with `--deterministic` is.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    variables = {"RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_RANK": "0"}
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_benchmark = torch.backends.cudnn.benchmark
    # `init_process_group` replaces `sys.excepthook`: this puts it back.
    excepthook_kept = mock.patch.object(sys, "excepthook", sys.excepthook)
    with mock.patch.dict(os.environ, variables), excepthook_kept:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
        try:
            if deterministic:
                hardware.enforce_determinism()
            yield
        finally:
            distributed.shutdown()
            torch.use_deterministic_algorithms(was_deterministic)
            torch.backends.cudnn.benchmark = was_benchmark


def predicted(step: Step, gpu: Gpu, limit: int = NO_LIMIT) -> Report:
    """Predict the step's memory on a GPU that need not be there.

    The process may occupy `limit` bytes of the GPU. No batch needs more memory than the one that is
    used: all its texts have the maximum length, but the first is one token shorter.

    Raises:
        UserError: a setting that cannot be built, or whose sizes are not known without a download.
        ValueError: a process group is already initialised.
    """
    zero = DeepSpeedConfig.of(step.ds_config)["zero_optimization"]
    offload_device = (zero.get("offload_param") or {}).get("device", "none")
    # DeepSpeed moves offloaded parameters by the values of tensors, which a prediction lacks.
    remedy = "it cannot be predicted: leave it out"
    setting_name = "zero_optimization.offload_param.device"
    check(offload_device == "none", setting_name, offload_device, remedy)
    default_cublas = hardware.DETERMINISTIC_CUBLAS if step.config.run.deterministic else None
    cublas_config = os.environ.get("CUBLAS_WORKSPACE_CONFIG", default_cublas)
    recorder = TrainingRecorder(gpu=gpu, workspace_bytes=gpu.cublas_bytes(cublas_config))
    with fake_cuda(recorder, gpu):
        setting = step.take_twice(recorder.attach)
        events = recorder.events()
    report = summarise(events, {**setting, "gpu": gpu.name}, "predicted")
    num_communicators = recorder.num_process_groups if step.world_size > 1 else 0
    outside_bytes = gpu.outside_bytes(num_communicators)
    try:
        replayed = replay(events, limit=limit - outside_bytes)
    except OutOfMemory:
        replayed = replay(events)  # without a limit, so that the totals say how much is missing
    report.totals = dict(zip(TOTALS, replayed.peaks, strict=True))
    report.totals["device"] = report.totals["reserved"] + outside_bytes
    report.retries = replayed.retries
    return report


def measured(step: Step) -> Report:
    """Measure the step's memory on this GPU, which nothing else of this process uses.

    The peaks come from a run without the recorder, the categories from a second run with it: while
    the recorder watches, autograd adds gradients up in new tensors, which raises the peak.
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


def predicted_worst(step: Step, gpu: Gpu, limit: int = NO_LIMIT, rank: int | None = None) -> Report:
    """Predict for the rank that needs the most, or for `rank` if it is known.

    ZeRO-1 and 2 divide the flat parameters by elements. A rank keeps the whole gradient of each
    parameter of which it owns a part. The last rank is predicted first, because its gradients exist
    while most activations are still stored. If another rank keeps more gradients, that rank is
    predicted too.
    """
    if rank is not None or DeepSpeedConfig.of(step.ds_config).stage not in (1, 2):
        return predicted(replace(step, rank=rank or 0), gpu, limit)
    elements_by_rank = [0] * step.world_size  # of the whole gradients that a rank keeps

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
    bytes_by_pid = {process.pid: process.usedGpuMemory for process in processes}
    if len(bytes_by_pid) == 1:
        # It is this process, even if its id is another one: in a container NVML lists the host's.
        return next(iter(bytes_by_pid.values()))
    return bytes_by_pid.get(os.getpid())
