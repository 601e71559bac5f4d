"""Predicts the memory of a training step without a GPU: runs the real step on fake tensors.

The code that trains (`engine.build` and `TrainEngine`: student, teacher, losses, DeepSpeed's
engine) runs two optimizer steps. The second needs more memory, because the optimizer states are
created in the first.
"""

import gc
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ds_cmli import engine
from ds_cmli.cmli.triton_forward import unsuited
from ds_cmli.common import hardware
from ds_cmli.common.json_text import JsonObject, Section
from ds_cmli.common.probe import probe
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config, check, choice
from ds_cmli.distributed.traffic import Traffic
from ds_cmli.fake_cuda.answer import WITHOUT_LIMIT, Room, on_device, with_cublas
from ds_cmli.memory import host_memory, inputs
from ds_cmli.memory.fake import Answers, fake_world
from ds_cmli.memory.repeated import Repeated
from ds_cmli.memory.report import Report, summarise
from ds_cmli.memory.shares import Shares, followed
from ds_cmli.memory.tracker import MemoryTracker, phases
from ds_cmli.memory_model import gpus
from ds_cmli.memory_model.blocks import Event
from ds_cmli.memory_model.gpus import Limits

DEFAULT_GPU = "RTX 3090 24GB"  # assumed: the source document says 24 GB and names no GPU
TOTAL_STEPS = 1000  # of the learning rate schedule; no size depends on it


@dataclass
class Prediction:
    report: Report
    events: list[Event]
    # Of the student and its losses, frozen ones included, undivided by ZeRO.
    parameters: int
    largest_module: int  # the most parameters that one module has itself, without its submodules
    shares: Shares  # what differs in the events of the other ranks


def silent(line: str) -> None:
    """Show no progress."""


def unwatched(train_engine: engine.TrainEngine, step: int) -> AbstractContextManager[object]:
    """Watch nothing; a function, as a process of its own is given the options."""
    return nullcontext()


@dataclass(frozen=True)
class Options:
    """What is rarely asked of a prediction.

    Args:
        backend: of the process group, "nccl", "gloo" or "fake": it decides what collectives copy
            internally. None: what training uses, gloo on a CPU and NCCL on a GPU.
        texts: the text lengths of each micro-batch, from the first on; None: two optimizer steps
            with the longest texts.
        pair_loss: in place of `CMLILoss.forward`, called as it is; None: the project's.
        watch: called with the engine and the step's number, counted from 0; each step runs inside
            the context that it returns. If that context yields a `Traffic`, the whole step is
            counted in it, also the micro-batches that are not run because `texts` is None.
        limit: bytes of the device.
        tell: called with lines about the progress.
    """

    backend: str | None = None
    texts: Sequence[inputs.TextLengths] | None = None
    pair_loss: Callable[..., Tensor] | None = None
    watch: Callable[[engine.TrainEngine, int], AbstractContextManager[object]] = unwatched
    limit: int = WITHOUT_LIMIT
    tell: Callable[[str], None] = silent


PLAIN = Options()


def predict(
    config: Config,
    ds_config: Section,
    world_size: int,
    *,
    gpu: str = DEFAULT_GPU,
    target: str = "cuda",
    rank: int = 0,
    options: Options = PLAIN,
) -> Prediction:
    """Predict the memory of one rank, all sizes in bytes.

    Args:
        config: any configuration; its weights become random ones of the same sizes, so nothing is
            downloaded.
        ds_config: the DeepSpeed JSON, with or without "auto" values.
        gpu: a name that `gpus.find` knows, for what the device holds besides tensors.
        target: "cuda": in the JSON's precision, with the operators and defaults of a GPU;
            `cmli_backend="auto"` means triton where the GPU runs it; what an offloaded optimizer
            keeps on the host is not counted. "cpu": as this CPU would train, with torch's number of
            threads; only the requested bytes have a meaning there.
        rank: which of the ranks it is; `predict_largest` finds that which needs the most.

    Without `options.texts`, each text fills all positions, except the first one of a batch, which
    is one token shorter. This is the most that a batch can need: text encoders leave out the
    attention mask if no text is padded.

    Raises:
        UserError: a setting that cannot be built, or whose sizes are not known without a download.
        RuntimeError: a process group is already initialised, or DeepSpeed is set to a GPU in this
            process.
    """
    choice("target", target, ("cuda", "cpu"))
    check(world_size >= 1, "--world-size", world_size, "give at least 1 rank")
    known = f"the ranks of {world_size} are 0 to {world_size - 1}"
    check(0 <= rank < world_size, "--rank", rank, known)
    json = DeepSpeedConfig.of(ds_config)
    inputs.check_predictable(json)
    card = gpus.find(gpu)
    limits = card.limits if target == "cuda" else None
    setup = _resolve(config, json, rank, world_size, limits, options.tell)
    backend = options.backend or ("nccl" if setup.cuda else "gloo")
    fixed = config.run.deterministic
    tracker = MemoryTracker(
        "cpu", workspaces=not setup.cuda, backend=backend, gpu=limits, deterministic=fixed
    )

    # Whether DeepSpeed reduces and gathers on streams of its own: by default at stage 3.
    overlaps = (setup.json.get("zero_optimization") or {}).get("overlap_comm")
    overlaps = setup.json.stage == 3 if overlaps is None else overlaps
    device = host_memory.PredictedDevice(tracker, gpu, world_size, bool(setup.cuda and overlaps))
    with (
        fake_world(world_size, tracker.gpu, tracker.another, rank) as answers,
        tracker,
        host_memory.answering(device),
    ):
        events, sizes, shares = _record(setup, options, answers, tracker)
    gc.collect()  # engines are part of reference cycles

    setting = _setting(setup) | {"process_group": backend, "gpu": gpu if setup.cuda else "CPU"}
    if not setup.cuda:
        report = summarise(events, setting, "predicted")
        return Prediction(report, events, sum(sizes), max(sizes), shares)
    workspace = hardware.DETERMINISTIC_CUBLAS if fixed else None
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", workspace)
    events = with_cublas(events, card.cublas_bytes(workspace))
    report = summarise(events, setting, "predicted")
    replayed, occupied = on_device(events, Room(gpu, options.limit), world_size)
    report.totals["allocated"] = replayed.allocated_peak
    report.totals["reserved"] = replayed.reserved_peak
    report.totals["device"] = occupied
    report.retries = replayed.retries
    return Prediction(report, events, sum(sizes), max(sizes), shares)


class _Resolved(NamedTuple):
    """The rank that is predicted: its configuration has random weights and no "auto" values."""

    config: Config
    json: DeepSpeedConfig
    vocab_size: int
    rank: int
    world_size: int
    cuda: bool


def _resolve(
    config: Config,
    json: DeepSpeedConfig,
    rank: int,
    world_size: int,
    gpu: Limits | None,
    tell: Callable[[str], None],
) -> _Resolved:
    reason: str | None = engine.NO_GPU
    if gpu is None:
        json = engine.filled(config, engine.on_this_device(json), world_size, TOTAL_STEPS)
    else:
        json = json.on("cuda", fp16=True, bf16=True)
        json = _pinned(engine.filled(config, json, world_size, TOTAL_STEPS))
        reason = unsuited(gpu.capability)
    if config.run.compile != "off":
        tell(inputs.UNCOMPILED)
    config, vocab_size = inputs.without_weights(config)
    config, notice = engine.choose_backend(config, lambda: reason)
    if notice is not None:
        tell(notice)
    if gpu is not None and config.loss.cmli_backend == "auto":  # of losses that it does not decide
        config = replace(config, loss=replace(config.loss, cmli_backend="triton"))
    return _Resolved(config, json, vocab_size, rank, world_size, gpu is not None)


def _setting(setup: _Resolved) -> JsonObject:
    config, json = setup.config, setup.json
    return {
        "preset": config.run.preset,
        "world_size": setup.world_size,
        "rank": setup.rank,
        "micro_batch": json.micro_batch,
        "accumulation": json.accumulation,
        "zero_stage": json.stage,
        "precision": json.precision,
        "checkpointing": json.checkpointing,
        "losses": list(config.loss.weights),
        "cmli_backend": config.loss.cmli_backend if setup.cuda else "cpu",
    }


def _record(
    setup: _Resolved, options: Options, answers: Answers, tracker: MemoryTracker
) -> tuple[list[Event], list[int], Shares]:
    """Run the steps on tensors without data. Returns the events, each module's parameters, and what
    differs by rank.

    The engine ends with this function, while the tracker is still entered.
    """
    options.tell("building the models and DeepSpeed's engine")
    models = host_memory.recorded_from_the_engine_on(tracker, setup.json, setup.cuda, answers.enter)
    train_engine = engine.build(
        setup.config, setup.json, setup.vocab_size, TOTAL_STEPS, torch.device("cpu"), models=models
    )
    sizes = list(map(_own_parameters, train_engine.objective.modules()))
    if options.pair_loss is not None:
        train_engine.objective.losses["cmli"].forward = options.pair_loss
    accumulation, texts = setup.json.accumulation, options.texts
    steps = 2 if texts is None else len(texts) // accumulation

    def step(number: int) -> None:
        of_step = texts and texts[number * accumulation : (number + 1) * accumulation]
        # On a GPU batches wait on the host, and each is copied to the device when its turn comes.
        with tracker.paused() if setup.cuda else tracker.scope("data"):
            batches = inputs.StepBatches(setup.config, setup.json, of_step, answers, tracker)
        with ExitStack() as stack:
            if setup.cuda:
                stack.enter_context(probe.subscribed(host_memory.HostMemory(tracker)))
            watched = stack.enter_context(options.watch(train_engine, number))
            if texts is None:
                traffic = watched if isinstance(watched, Traffic) else Traffic()
                stack.enter_context(probe.subscribed(Repeated(tracker, accumulation, traffic)))
            train_engine.step(batches)

    optimizer = train_engine.engine.optimizer
    with (
        phases(train_engine, answers.enter),
        followed(tracker, optimizer, setup.rank) as shares,
        tracker.attach(train_engine),
    ):
        for number in range(steps):
            as_rank = f"as rank {setup.rank:,} of {setup.world_size:,}"
            options.tell(f"step {number + 1} of {steps}, {as_rank}")
            step(number)
    return tracker.events(), sizes, shares


def _own_parameters(module: nn.Module) -> int:
    # Under ZeRO-3 `numel` is not the size of the whole parameter.
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters(recurse=False))


def _pinned(ds_config: DeepSpeedConfig) -> DeepSpeedConfig:
    """Set the optimizer implementation that CUDA would choose, which a CPU would not: it decides
    the temporaries."""
    out = ds_config.raw()
    if out["optimizer"]["type"].lower() in ("adam", "adamw"):
        parameters = out["optimizer"]["params"]
        if parameters.get("torch_adam"):
            parameters.setdefault("foreach", not parameters.get("fused"))
        else:  # DeepSpeed's own Adam is one kernel without temporaries, like PyTorch's fused one
            parameters.update(torch_adam=True, fused=True)
    return DeepSpeedConfig(out)
