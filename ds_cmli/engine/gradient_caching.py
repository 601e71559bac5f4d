"""An optimizer step whose losses over pairs take their negatives from all its micro-batches.

This is gradient caching (Gao et al., 2021). Pass 1 computes and keeps each micro-batch's pair
features, without a graph. The losses over pairs are then computed once over all of them, which
gives each feature its gradient (`losses.cached`). Pass 2 runs each micro-batch's forward pass
again, from the same random state, and runs backward from these gradients together with the losses
that do not compare pairs.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ds_cmli.common.probe import probe
from ds_cmli.common.trees import tree_map
from ds_cmli.data.batch import Batch
from ds_cmli.engine.train_engine import MicroBatchLosses, TrainEngine
from ds_cmli.losses.cached import PairGradients
from ds_cmli.losses.objective import Losses, Objective
from ds_cmli.losses.pair_features import CachedStep, PairFeatures

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass
class CachedBatch:
    """A micro-batch between the two passes."""

    # Of the generators that dropout draws from, before pass 1.
    cpu_state: Tensor
    gpu_state: Tensor | None
    features: PairFeatures | None  # then their gradients; None once pass 2 has taken them


@dataclass
class CachingEngine(TrainEngine):
    """A `TrainEngine` whose losses over pairs are those of all micro-batches of a step."""

    caching: ClassVar[bool] = True
    cache_on_host: bool = False  # whether the features are kept on the host

    def _losses_and_gradients(
        self,
        micro_batches: Sequence[Batch],
        update: Callable[[], None],
        heartbeat: Callable[[], None],
    ) -> list[MicroBatchLosses]:
        """Run forward and backward, and `update` after each micro-batch. Collectives.

        Each micro-batch is moved to the device twice. The returned losses over pairs are those of
        the whole step.
        """
        self.mark("forward")
        cached: list[CachedBatch] = []
        for batch in micro_batches:
            cached.append(probe.alike(self.embed, batch))  # collective under ZeRO-3
        losses = []
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(gpus):  # the next step draws what follows pass 1
            pairs, ignored = self.compare(cached, heartbeat)  # collectives
            for batch, of_batch in zip(micro_batches, cached, strict=True):
                replayed = probe.alike(self.replay, batch, of_batch, pairs, ignored)  # collectives
                losses.append(replayed)
                update()  # collectives
                heartbeat()
        return losses

    def embed(self, batch: Batch) -> CachedBatch:
        """Pass 1 of a micro-batch. Collective under ZeRO-3."""
        gpu_state = None
        if self.device.type == "cuda":
            gpu_state = torch.cuda.get_rng_state(self.device)
        state = torch.get_rng_state()
        with torch.no_grad():
            # As in `TrainEngine._backward`, the copy is not waited for.
            on_device = batch.to(self.device, non_blocking=True)
            features = self.engine(Objective.embed, on_device)
        if self.cache_on_host:
            features = tree_map(features, probe.to_host)
        return CachedBatch(state, gpu_state, features)

    def compare(
        self, cached: list[CachedBatch], heartbeat: Callable[[], None]
    ) -> tuple[PairGradients, Tensor]:
        """The losses over pairs, and `MicroBatchLosses.ignored` of each micro-batch.

        Collectives: texts and their gradients, column statistics.
        """
        features = [of_batch.features for of_batch in cached if of_batch.features is not None]
        step = CachedStep(features, self.device, self.cache_on_host, self.scale, heartbeat)
        pairs = self.engine(Objective.compare, step)  # collectives
        return pairs, pairs.ignored / len(step)

    def replay(
        self, batch: Batch, cached: CachedBatch, pairs: PairGradients, ignored: Tensor
    ) -> MicroBatchLosses:
        """Pass 2 of a micro-batch. Collective."""
        torch.set_rng_state(cached.cpu_state)
        if cached.gpu_state is not None:
            torch.cuda.set_rng_state(cached.gpu_state, self.device)
        total, values = self._forward_again(batch, cached, pairs)
        self.go_backward(total)  # collectives: gradient buckets
        return MicroBatchLosses(batch.index, total.detach(), values, ignored, pairs.cut)

    def _forward_again(self, batch: Batch, cached: CachedBatch, pairs: PairGradients) -> Losses:
        # Not kept in `cached`, so that backward frees each gradient that it has used.
        gradients, cached.features = cached.features, None
        assert gradients is not None, "pass 2 runs once"
        if self.cache_on_host:
            to_device = partial(probe.to_device, device=self.device, non_blocking=True)
            gradients = tree_map(gradients, to_device)
        batch = batch.to(self.device, non_blocking=True)
        factor = self.accumulation / self.scale
        return self.forward(
            batch,
            lambda targets: self.engine(Objective.replay, batch, targets, gradients, pairs, factor),
        )


def keep_orders_apart(engine: "DeepSpeedEngine", objective: Objective) -> None:
    """Let ZeRO-3 keep one order of modules for each kind of forward pass.

    DeepSpeed gathers parameters ahead in the order in which modules ran in the pass before. As the
    passes of a step differ, it would learn that order anew in each of them, which takes collectives
    and CPU-GPU syncs, and would gather nothing ahead.
    """
    offload = engine.optimizer.parameter_offload
    unused = offload.param_coordinator
    by_part = {}

    def switch(module: Objective, arguments: tuple) -> None:
        part = arguments[0]  # see `Objective.forward`
        if part not in by_part:
            by_part[part] = copy.copy(unused)
            by_part[part]._clear_trace_structures()  # the copies would share them
        offload.param_coordinator = by_part[part]

    # Before DeepSpeed's own hook, which begins a pass.
    objective.register_forward_pre_hook(switch, prepend=True)
