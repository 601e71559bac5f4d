"""An optimizer step whose losses over pairs take their negatives from all its micro-batches (Gao et al., 2021).

Pass 1 computes and keeps each micro-batch's pair features, without a graph. The losses over pairs are then computed
once over all of them, which gives each feature its gradient. Pass 2 runs each micro-batch's forward pass again, from
the same random state, and runs backward from these gradients together with the losses that do not compare pairs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ds_cmli.data.batch import Batch
from ds_cmli.engine.result import MicroBatchLosses
from ds_cmli.losses.cached import PairFeatures, PairGradients


@dataclass
class RandomState:
    """The states of the random generators that dropout draws from on this device."""

    cpu: Tensor
    gpu: Tensor | None

    @classmethod
    def now(cls, device: torch.device) -> "RandomState":
        return cls(
            torch.get_rng_state(),
            torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        )

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.gpu is not None:
            torch.cuda.set_rng_state(self.gpu, device)


def on_host(features: PairFeatures) -> PairFeatures:
    """The features on the host: a copy if the device is a GPU. CPU-GPU sync."""
    return features.to("cpu")


def backward(
    train_engine: Any,
    micro_batches: Sequence[Batch],
    after_backward: Callable[[], None],
    heartbeat: Callable[[], None],
) -> list[MicroBatchLosses]:
    """Run forward and backward of a whole step. Collective.

    Args:
        train_engine: the `TrainEngine`.
        micro_batches: the step's micro-batches; they stay on the host, and each is moved to the device twice.
        after_backward: called after the backward pass of each micro-batch.
        heartbeat: called again and again during the step.

    Returns:
        The losses of each micro-batch; those over pairs are the losses of the whole step.
    """
    device = train_engine.device
    train_engine.mark("forward")
    states: list[RandomState] = []
    cached: list[PairFeatures | None] = []
    for batch in micro_batches:
        state, features = embed(train_engine, batch)
        states.append(state)
        cached.append(features)
    after_last = RandomState.now(device)

    scale = train_engine.scale
    # Collectives: texts and their gradients, column statistics.
    pairs = train_engine.engine(cached, device, scale, heartbeat, part="compare")

    ignored = pairs.ignored / sum(len(batch.index) for batch in micro_batches)
    found = []
    for number, (batch, state) in enumerate(zip(micro_batches, states, strict=True)):
        held, cached[number] = [cached[number]], None
        found.append(replay(train_engine, batch, state, held, pairs, scale, ignored))  # collectives
        after_backward()
        heartbeat()
    after_last.restore(device)
    return found


def embed(train_engine: Any, batch: Batch) -> tuple[RandomState, PairFeatures]:
    """Pass 1 of a micro-batch: its random state and its pair features. Collective under ZeRO-3."""
    device = train_engine.device
    state = RandomState.now(device)
    with torch.no_grad():
        features = train_engine.engine(batch.to(device), part="embed")
    return state, on_host(features) if train_engine.cache_on_host else features


def replay(
    train_engine: Any,
    batch: Batch,
    state: RandomState,
    held: list[PairFeatures | None],
    pairs: PairGradients,
    scale: float,
    ignored: Tensor,
) -> MicroBatchLosses:
    """Pass 2 of a micro-batch. Collective.

    Args:
        held: a list with the gradients of its features, which are taken out so that they are freed before backward.
        ignored: `MicroBatchLosses.ignored` of the result.
    """
    engine, device = train_engine.engine, train_engine.device
    state.restore(device)
    gradients, moved = held.pop().to(device), batch.to(device)  # type: ignore[union-attr]
    more = (gradients, pairs, scale, train_engine.accumulation)
    total, each = train_engine.forward(
        moved, lambda targets, moved=moved, more=more: engine(moved, targets, *more, part="replay")
    )
    del gradients, moved, more
    train_engine.go_backward(total)  # collectives: gradient buckets
    return MicroBatchLosses(batch.index, total.detach(), each, ignored)
