"""An optimizer step whose losses over pairs take their negatives from all its micro-batches.

This is gradient caching (Gao et al., 2021). Pass 1 computes and keeps each micro-batch's pair
features, without a graph. The losses over pairs are then computed once over all of them, which
gives each feature its gradient. Pass 2 runs each micro-batch's forward pass again, from the same
random state, and runs backward from these gradients together with the losses that do not compare
pairs.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds_cmli.common.probe import probe
from ds_cmli.data.batch import Batch
from ds_cmli.engine.result import MicroBatchLosses
from ds_cmli.losses.cached import PairGradients
from ds_cmli.losses.objective import Compare, Embed, Objective, Replay, Request
from ds_cmli.losses.pair_features import CachedStep, PairFeatures
from ds_cmli.models.teacher import Targets

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

    from ds_cmli.engine.train_engine import TrainEngine


@dataclass
class RandomState:
    """The states of the random generators that dropout draws from on this device."""

    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(torch.get_rng_state(), gpu)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, device)


@dataclass
class CachedBatch:
    """A micro-batch between the two passes."""

    state: RandomState  # before pass 1
    features: PairFeatures | None  # then their gradients; None once pass 2 has taken them

    def take_features(self) -> PairFeatures:
        """The features, which are not kept here, so that they are freed when pass 2 drops them."""
        features, self.features = self.features, None
        assert features is not None, "pass 2 runs once"
        return features


@dataclass(frozen=True)
class ComparedStep:
    """What pass 2 of each micro-batch needs of the whole step."""

    pairs: PairGradients
    scale: float  # the loss scale, by which the gradients of the features are multiplied
    ignored: Tensor  # `MicroBatchLosses.ignored` of each micro-batch


def keep_orders_apart(engine: "DeepSpeedEngine", objective: Objective) -> None:
    """Let ZeRO-3 keep one order of modules for each kind of forward pass.

    DeepSpeed gathers parameters ahead in the order in which modules ran in the pass before. As the
    passes of a step differ, it would learn that order anew in each of them, which takes collectives
    and CPU-GPU syncs, and would gather nothing ahead.
    """
    offload = engine.optimizer.parameter_offload
    unused = offload.param_coordinator
    by_kind = {}

    def switch(module: Objective, arguments: tuple[Request]) -> None:
        kind = type(arguments[0])
        if kind not in by_kind:
            by_kind[kind] = copy.copy(unused)
            by_kind[kind]._clear_trace_structures()  # the copies would share them
        offload.param_coordinator = by_kind[kind]

    # Before DeepSpeed's own hook, which begins a pass.
    objective.register_forward_pre_hook(switch, prepend=True)


def backward(
    train_engine: "TrainEngine",
    micro_batches: Sequence[Batch],
    after_backward: Callable[[], None],
    heartbeat: Callable[[], None],
) -> list[MicroBatchLosses]:
    """Run forward and backward of a whole step. Collective.

    Args:
        micro_batches: they stay on the host, and each is moved to the device twice.
        after_backward: called after the backward pass of each micro-batch.
        heartbeat: called again and again during the step.

    Returns:
        The losses of each micro-batch; those over pairs are the losses of the whole step.
    """
    device = train_engine.device
    train_engine.mark("forward")
    cached: list[CachedBatch] = []
    for batch in micro_batches:
        state, features = probe.alike(embed, train_engine, batch)  # collective under ZeRO-3
        cached.append(CachedBatch(state, features))
    after_last = RandomState.now(device)

    pairs = sum(len(batch.index) for batch in micro_batches)
    step = _compared(train_engine, cached, pairs, heartbeat)  # collectives
    found = []
    for batch, each in zip(micro_batches, cached, strict=True):
        found.append(probe.alike(replay, train_engine, batch, each, step))  # collectives
        after_backward()
        heartbeat()
    after_last.restore(device)
    return found


def embed(train_engine: "TrainEngine", batch: Batch) -> tuple[RandomState, PairFeatures]:
    """Pass 1 of a micro-batch: its random state and its pair features. Collective under ZeRO-3."""
    state = RandomState.now(train_engine.device)
    with torch.no_grad():
        # As in `TrainEngine._backward`, the copy is not waited for.
        on_device = batch.to(train_engine.device, non_blocking=True)
        features = train_engine.engine(Embed(on_device))
    return state, features.to_host() if train_engine.cache_on_host else features


def _compared(
    train_engine: "TrainEngine",
    cached: list[CachedBatch],
    pairs_of_step: int,
    heartbeat: Callable[[], None],
) -> ComparedStep:
    """The losses over pairs. Collectives: texts and their gradients, column statistics."""
    scale = train_engine.scale
    features = [each.features for each in cached if each.features is not None]
    step = CachedStep(features, train_engine.device, scale, heartbeat)
    pairs = train_engine.engine(Compare(step))  # collectives
    return ComparedStep(pairs, scale, pairs.ignored / pairs_of_step)


def replay(
    train_engine: "TrainEngine", batch: Batch, cached: CachedBatch, step: ComparedStep
) -> MicroBatchLosses:
    """Pass 2 of a micro-batch. Collective."""
    cached.state.restore(train_engine.device)
    total, each = _forward(train_engine, batch, cached, step)
    train_engine.go_backward(total)  # collectives: gradient buckets
    return MicroBatchLosses(batch.index, total.detach(), each, step.ignored, step.pairs.cut)


def _forward(
    train_engine: "TrainEngine", batch: Batch, cached: CachedBatch, step: ComparedStep
) -> tuple[Tensor, dict[str, Tensor]]:
    gradients = cached.take_features().on(train_engine.device)
    batch = batch.to(train_engine.device, non_blocking=True)

    def student(targets: Targets | None) -> tuple[Tensor, dict[str, Tensor]]:
        accumulation = train_engine.accumulation
        request = Replay(batch, targets, gradients, step.pairs, step.scale, accumulation)
        return train_engine.engine(request)

    return train_engine.forward(batch, student)
