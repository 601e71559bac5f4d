"""Predicts the memory of a training step without a GPU: runs the real step on fake tensors, which hold no data.

The code that trains (`engine.build` and `TrainEngine`: student, teacher, losses, DeepSpeed's engine) runs two optimizer
steps. The second needs more memory, because the optimizer states are created in the first.
"""

import gc
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from ds_cmli import engine
from ds_cmli.allocator import gpus
from ds_cmli.allocator.allocator import CachingAllocator, replay
from ds_cmli.allocator.blocks import Event
from ds_cmli.cmli.token_keep import kept
from ds_cmli.common.patches import patched
from ds_cmli.common.probe import probe
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.schema import Config, check, choice
from ds_cmli.data.batch import Batch
from ds_cmli.data.tokens import SpecialTokens
from ds_cmli.distributed.traffic import Traffic
from ds_cmli.memory.fake import convert_parameters, fake_world
from ds_cmli.memory.host_memory import HostMemory
from ds_cmli.memory.inputs import (
    UNCOMPILED,
    NotPredictable,
    Texts,
    longest_batch,
    text_lengths,
    without_weights,
)
from ds_cmli.memory.phases import phases
from ds_cmli.memory.repeated import Repeated
from ds_cmli.memory.report import Report, summarise
from ds_cmli.memory.tracker import Tracker

DEFAULT_GPU = "RTX 3090 24GB"  # assumed: the source document says 24 GB and names no GPU
TOTAL_STEPS = 1000  # of the learning rate schedule; no size depends on it


@dataclass
class Prediction:
    report: Report
    events: list[Event]
    parameters: int  # number of parameters of the student and its losses, frozen ones included, undivided by ZeRO
    largest_module: int  # the most parameters that one module has itself, without its submodules


def predict(
    config: Config,
    ds_config: Mapping[str, Any],
    world_size: int,
    *,
    gpu: str = DEFAULT_GPU,
    target: str = "cuda",
    rank: int = 0,
    backend: str | None = None,
    texts: Sequence[Texts] | None = None,
    scores: Callable[..., tuple[Tensor, Tensor]] | None = None,
    tell: Callable[[str], None] = lambda line: None,
    watch: Callable[
        [engine.TrainEngine, int], AbstractContextManager
    ] = lambda train_engine, step: nullcontext(),
) -> Prediction:
    """Predict the memory of one rank, all sizes in bytes.

    Args:
        config: any configuration; its weights become random ones of the same sizes, so nothing is downloaded.
        ds_config: the DeepSpeed JSON, with or without "auto" values.
        gpu: a name that `gpus.find` knows, for what the device holds besides tensors.
        target: "cuda": in the JSON's precision, with the operators and defaults of a GPU; `cmli_backend="auto"` means
            triton if it is installed here; what an offloaded optimizer keeps on the host is not counted. "cpu": as
            this CPU would train, with torch's number of threads; only the requested bytes have a meaning there.
        rank: which of the ranks it is; `search.predict_largest` finds the one that needs the most.
        backend: of the process group, "nccl", "gloo" or "fake": it decides what collectives copy internally. None:
            what training uses, gloo on a CPU and NCCL on a GPU.
        texts: the text lengths of each micro-batch, from the first on; None: two optimizer steps with the longest
            texts.
        scores: another all-pairs implementation, called as `CMLILoss` calls `cmli_scores`; None: the project's.
        tell: called with lines about the progress.
        watch: called with the engine and the step's number, counted from 0; each step runs inside the context that it
            returns. If that context yields a `Traffic`, the whole step is counted in it, also the micro-batches that
            are not run because `texts` is None.

    Without `texts`, each text fills all positions, except the first one of a batch, which is one token shorter. This is
    the most that a batch can need: text encoders leave out the attention mask if no text is padded.

    Raises:
        UserError: a setting that cannot be built, or whose sizes are not known without a download.
        RuntimeError: a process group is already initialised, or DeepSpeed is set to a GPU in this process.
    """
    choice("target", target, ("cuda", "cpu"))
    backend = backend or ("nccl" if target == "cuda" else "gloo")
    check(world_size >= 1, "--world-size", world_size, "give at least 1 rank")
    check(
        0 <= rank < world_size,
        "--rank",
        rank,
        f"the ranks of {world_size} are 0 to {world_size - 1}",
    )
    json = DeepSpeedConfig.of(ds_config)
    _check_predictable(json)
    cuda = target == "cuda"
    constants = gpus.find(gpu)
    json = json.on("cuda", fp16=True, bf16=True) if cuda else engine.on_this_device(json)
    json = engine.filled(config, json, world_size, TOTAL_STEPS)
    if cuda:
        json = _pinned(json)
    named = config
    if config.run.compile != "off":
        tell(UNCOMPILED)
    config, vocab_size = without_weights(config)
    if cuda and config.loss.cmli_backend == "auto":
        runs = find_spec("triton") is not None
        if not runs:
            tell(
                "Triton is not installed here: predicted for the chunked backend of the all-pairs losses"
            )
        config = replace(
            config, loss=replace(config.loss, cmli_backend="triton" if runs else "chunked")
        )
    micro_batch, accumulation = json.micro_batch, json.accumulation

    device = torch.device("cpu")
    tracker = Tracker(
        device.type, text_lengths(config, micro_batch), workspaces=not cuda, backend=backend
    )
    with (
        fake_world(world_size, cuda, tracker.another, rank) as answers,
        tracker,
        flattened_where_there_is_room(
            tracker, lambda: free_bytes(tracker, gpu, world_size) if cuda else 1 << 60
        ),
    ):
        tell("building the models and DeepSpeed's engine")
        models = recorded_from_the_engine_on(tracker, json, cuda, answers.enter)
        train_engine = engine.build(config, json, vocab_size, TOTAL_STEPS, device, models=models)
        sizes = [_own_parameters(module) for module in train_engine.objective.modules()]
        if scores is not None:
            train_engine.objective.score = scores  # type: ignore[assignment]
        with phases(train_engine, answers.enter), tracker.attach(train_engine):
            steps = 2 if texts is None else len(texts) // accumulation
            for number in range(steps):
                tell(f"step {number + 1} of {steps}, as rank {rank:,} of {world_size:,}")
                said = (
                    None
                    if texts is None
                    else texts[number * accumulation : (number + 1) * accumulation]
                )
                # In training on a GPU they wait on the host, and each is copied to the device when its turn comes.
                with tracker.paused() if cuda else tracker.scope("data"):
                    batches = _StepBatches(
                        config, micro_batch, said or [None] * accumulation, answers, tracker
                    )
                on_host = probe.subscribed(HostMemory(tracker)) if cuda else nullcontext()
                with on_host, watch(train_engine, number) as watched:
                    traffic = watched if isinstance(watched, Traffic) else Traffic()
                    skipping: AbstractContextManager = nullcontext()
                    if texts is None:
                        skipping = probe.subscribed(Repeated(tracker, accumulation, traffic))
                    with skipping:
                        train_engine.step(batches)
                del batches
        events = tracker.events(host=not cuda)
        del train_engine
    gc.collect()  # engines are part of reference cycles

    setting = {
        "preset": named.run.preset, "world_size": world_size, "rank": rank, "micro_batch": micro_batch,
        "accumulation": accumulation,
        "zero_stage": json.stage, "precision": json.precision,
        "checkpointing": json.checkpointing, "losses": list(config.loss.weights),
        "cmli_backend": config.loss.cmli_backend if cuda else "chunked", "process_group": backend,
        "gpu": gpu if cuda else "CPU",
    }  # fmt: skip
    if cuda:
        # From the first matrix product on, cuBLAS holds a workspace from torch's allocator that belongs to no tensor.
        first = next(i for i, event in enumerate(events) if event.phase == "forward")
        events.insert(
            first, Event(-1, constants.cublas_workspace.bytes, "temporaries", "forward", "cuBLAS")
        )
    report = summarise(events, setting, "predicted")
    if cuda:
        replayed = replay(events)
        report.totals["allocated"], report.totals["reserved"] = (
            replayed.allocated_peak,
            replayed.reserved_peak,
        )
        report.totals["device"] = gpus.device_bytes(report.totals["reserved"], gpu, world_size)
    return Prediction(report, events, sum(sizes), max(sizes))


class _StepBatches(list):
    """A step's micro-batches. As each is taken, `answers` and `tracker` are told the lengths of its texts."""

    def __init__(
        self,
        config: Config,
        micro_batch: int,
        texts: Sequence[Texts | None],
        answers: Any,
        tracker: Tracker,
    ):
        super().__init__(
            longest_batch(config, micro_batch, None if t is None else t[0][0]) for t in texts
        )
        self.texts, self.answers, self.tracker = texts, answers, tracker
        self.share = config.loss.cmli_token_keep

    def _tell(self, told: Sequence[Texts]) -> None:
        """Set the longest padded length on any rank, and all texts' valid tokens; only compared tokens are counted."""
        self.answers.positions = max(
            kept(self.share, positions) for ranks in told for positions, _ in ranks
        )
        by_rank = zip(*told, strict=True)
        self.tracker.text_lengths = [
            kept(self.share, n) for each in by_rank for _, lengths in each for n in lengths
        ]

    def __iter__(self) -> Iterator[Batch]:
        for batch, ranks in zip(super().__iter__(), self.texts, strict=True):
            if ranks is not None:
                self._tell([ranks])
            # A text without padding has valid tokens at all positions but two: [CLS] and [SEP].
            with self.answers.texts(
                ranks is not None and all(n == ranks[0][0] - 2 for n in ranks[0][1])
            ):
                yield batch
        told = [ranks for ranks in self.texts if ranks is not None]
        if told:  # gradient caching then computes the losses over all micro-batches
            self._tell(told)


def _own_parameters(module: nn.Module) -> int:
    # Under ZeRO-3 `numel` is not the size of the whole parameter.
    return sum(getattr(p, "ds_numel", p.numel()) for p in module.parameters(recurse=False))


def _check_predictable(ds_config: DeepSpeedConfig) -> None:
    device = ds_config.offload("param")
    if device != "none":
        raise NotPredictable(
            f"zero_optimization.offload_param.device is {device!r}: it cannot be predicted: leave it out"
        )
    # With it, DeepSpeed saves sizes in a tensor and reads them later, but fake tensors hold no data.
    if (ds_config.get("activation_checkpointing") or {}).get("partition_activations"):
        raise NotPredictable(
            "activation_checkpointing.partition_activations is true: it cannot be predicted: leave it out"
        )


def _pinned(ds_config: DeepSpeedConfig) -> DeepSpeedConfig:
    """Set the optimizer implementation that CUDA would choose, which a CPU would not: it decides the temporaries."""
    out = ds_config.raw()
    if ds_config.optimizer_entry.chosen:
        parameters = out["optimizer"]["params"]
        if parameters.get("torch_adam"):
            parameters.setdefault("foreach", not parameters.get("fused"))
        else:  # DeepSpeed's own Adam is one kernel without temporaries, like PyTorch's fused one
            parameters.update(torch_adam=True, fused=True)
    return DeepSpeedConfig(out)


def recorded_from_the_engine_on(
    tracker: Tracker,
    ds_config: DeepSpeedConfig,
    cuda: bool,
    enter: Callable[[str], None] = lambda phase: None,
) -> Callable[..., engine.Models]:
    """What builds the models for `engine.build`, on the host.

    The tracker records from where the engine takes them; `enter("init")` is called there.
    """
    dtype = engine.DTYPES[ds_config.precision]

    def cast(model: nn.Module | None) -> None:
        convert_parameters(model, lambda parameter: parameter.to(dtype))

    def models(
        config: Config, vocab_size: int, special: SpecialTokens | None = None
    ) -> engine.Models:
        with tracker.paused():
            objective, teacher = engine.build_models(config, vocab_size, special=special)
            if cuda:  # both have been cast when they arrive on the device
                cast(objective)
                cast(teacher)
        enter("init")
        tracker.claim("parameters", [*objective.parameters(), *objective.buffers()])
        if not cuda:
            if teacher is not None:
                tracker.claim("teacher", [*teacher.parameters(), *teacher.buffers()])
            cast(objective)  # here, because the engine cannot cast fake tensors
        return objective, teacher

    return models


def free_bytes(tracker: Tracker, gpu: str, world_size: int) -> int:
    """The bytes that are free on the device once its allocator has returned all free segments."""
    allocator = CachingAllocator()
    live = {}
    for block, size, _ in tracker.log:
        if size > 0:
            live[block] = allocator.malloc(size)
        else:
            allocator.free(live.pop(block))
    allocator.empty_cache()
    return gpus.find(gpu).total.bytes - gpus.device_bytes(allocator.reserved, gpu, world_size)


@contextmanager
def flattened_where_there_is_room(tracker: Tracker, free: Callable[[], int]) -> Iterator[None]:
    """Inside, DeepSpeed's stages 1 and 2, which copy each group of parameters into one flat buffer, do so on the device
    if `free` bytes are enough for it, otherwise on the host, after the group's parameters have left the device."""

    def to_host(tensor: Tensor) -> Tensor:
        with tracker.paused():
            return tensor.clone()

    def flattened(flatten: Callable) -> Callable:
        def run(
            self: Any,
            tensors: list[Tensor],
            alignment: int,
            use_cpu_data: bool = False,
            **options: Any,
        ) -> Any:
            if not use_cpu_data:
                return flatten(self, tensors, alignment, **options)
            with tracker.paused():
                flat = flatten(self, tensors, alignment, use_cpu_data=True, **options)
            tracker.claim("parameters", [flat])  # it is then moved to the device
            return flat

        return run

    with (
        patched("deepspeed: free memory", lambda _: lambda self, *index: free()),
        patched("deepspeed: flattened parameters", flattened),
        patched("torch: copy to the host", lambda _: to_host),
    ):
        yield
