"""An optimizer step whose losses over pairs take their negatives from all its micro-batches (Gao et al., 2021).

Pass 1 keeps each micro-batch's pair features without a graph. The losses over pairs are computed once over all of them
and give each feature its gradient. Pass 2 runs each micro-batch again, from the random state that it had, and goes
backward from those gradients together with the losses that take each pair for itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_cmli.data import Batch
from ds_cmli.engine.result import MicroBatchLosses
from ds_cmli.losses.cached import PairFeatures


@dataclass
class RandomState:
    """Of the generators that dropout draws from on this device."""

    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, device)


def on_host(features: PairFeatures) -> PairFeatures:
    """A copy where the device is a GPU. CPU-GPU sync."""
    return features.to("cpu")


def backward(
    train_engine: Any,
    micro_batches: Sequence[Batch],
    after_backward: Callable[[], None],
    heartbeat: Callable[[], None],
) -> list[MicroBatchLosses]:
    """Forward and backward of a whole step. Collective.

    Args:
        train_engine: `TrainEngine`.
        micro_batches: the step's; they stay on the host, and each is moved to the device twice.
        after_backward: called after each micro-batch's.
        heartbeat: called as the passes go on.

    Returns:
        Of each micro-batch; the losses over pairs are those of the whole step.
    """
    engine, device = train_engine.engine, train_engine.device
    train_engine.mark("forward")
    states: list[RandomState] = []
    cached: list[PairFeatures] = []
    for batch in micro_batches:
        states.append(RandomState.now(device))
        with torch.no_grad():
            features = engine(batch.to(device), part="embed")
        cached.append(on_host(features) if train_engine.cache_on_host else features)
    after_last = RandomState.now(device)

    scale = train_engine.scale
    pairs = engine(cached, device, scale, heartbeat, part="compare")  # collectives: texts, column statistics

    ignored = pairs.ignored / sum(len(batch.index) for batch in micro_batches)
    found = []
    for number, (batch, state) in enumerate(zip(micro_batches, states, strict=True)):
        state.restore(device)
        gradients, cached[number] = cached[number].to(device), None  # type: ignore[call-overload]
        moved = batch.to(device)
        more = (gradients, pairs, scale, len(micro_batches))
        total, each = train_engine.forward(
            moved, lambda targets, moved=moved, more=more: engine(moved, targets, *more, part="replay")
        )
        del gradients, moved, more
        train_engine.go_backward(total)  # collectives: gradient buckets
        found.append(MicroBatchLosses(batch.index, total.detach(), each, ignored))
        del total
        after_backward()
        heartbeat()
    after_last.restore(device)
    return found
