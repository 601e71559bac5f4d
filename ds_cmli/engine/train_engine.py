"""Training steps of student, teacher, losses and DeepSpeed's engine.

Training, profiling and prediction all run this one step.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from ds_cmli import scopes
from ds_cmli.config.registry import LOSSES
from ds_cmli.config.schema import LossConfig
from ds_cmli.data.pairs import Batch
from ds_cmli.engine.ema import EMA
from ds_cmli.faults import nonfinite
from ds_cmli.losses import gradient_cache
from ds_cmli.losses.objective import Objective
from ds_cmli.models.student import Targets, Teacher

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


@dataclass
class MicroBatchLosses:
    """Losses of this rank's pairs in a micro-batch, fp32 scalars without a graph."""

    index: Tensor  # int64 [B], the samples' indices in the training set
    total: Tensor  # the weighted sum of the losses
    losses: dict[str, Tensor]  # each loss by name
    duplicates_per_pair: Tensor  # the number of other pairs' texts that are not negatives

    def stacked(self) -> Tensor:
        """Return one tensor: the total, each loss, the duplicates, in this order."""
        return torch.stack([self.total, *self.losses.values(), self.duplicates_per_pair])


@dataclass
class TrainEngine:
    engine: "DeepSpeedEngine"  # around the objective
    objective: Objective
    teacher: Teacher | None
    device: torch.device
    dtype: torch.dtype
    # Weights that are not trained, on rank 0's host, in the precision of their source.
    frozen: dict[str, Tensor]
    lr_factor: float  # the factor of the first group's learning rate
    accumulation: int  # micro-batches per step
    caching: bool  # losses over pairs take their negatives from all micro-batches of a step
    ema: EMA | None
    lr: float = 0.0  # the learning rate of the last update, for a group whose factor is 1

    def step(
        self, micro_batches: Sequence[Batch], heartbeat: Callable[[], None] = lambda: None
    ) -> list[MicroBatchLosses]:
        """Run one optimizer step of `accumulation` micro-batches of this rank. Collective.

        Each is moved to the device when its turn comes, with gradient caching twice. `heartbeat` is
        called after each; with gradient caching, after the losses over pairs too.
        """
        if self.caching:
            return self._cached_step(micro_batches, heartbeat)
        step_losses = []
        for batch in micro_batches:
            step_losses.append(self._forward_backward(batch))  # collectives
            self.update()  # collectives
            heartbeat()
        return step_losses

    def _cached_step(
        self, micro_batches: Sequence[Batch], heartbeat: Callable[[], None]
    ) -> list[MicroBatchLosses]:
        """Run a step with gradient caching (`losses/gradient_cache.py`). Collective."""
        random_states = []
        features = []
        any_parameter = next(self.objective.parameters())  # on the GPU whose generator is read
        for batch in micro_batches:
            random_states.append((torch.get_rng_state(), get_device_states(any_parameter)))
            with torch.no_grad():
                features.append(self.engine(batch.to(self.device, non_blocking=True), embed=True))
        step_losses = []
        gpus = [self.device] if self.device.type == "cuda" else []
        # At its end, the generators return to their state after the first pass.
        with torch.random.fork_rng(gpus):
            pairs = gradient_cache.compare_cached(
                features, self.objective.compare, self.objective.weigh, self.loss_scale
            )  # collectives
            heartbeat()
            for index, batch in enumerate(micro_batches):
                host_state, device_states = random_states[index]
                torch.set_rng_state(host_state)
                set_device_states(*device_states, device_type=self.device.type)
                step_losses.append(self._forward_backward(batch, pairs, index))  # collectives
                self.update()  # collectives
                heartbeat()
        return step_losses

    def _forward_backward(
        self, batch: Batch, pairs: gradient_cache.PairGradients | None = None, index: int = 0
    ) -> MicroBatchLosses:
        """Run forward and backward of a micro-batch. Collective.

        With gradient caching, `index` is its place in the step.
        """
        sample_index = batch.index  # on the host
        num_compared = len(sample_index)  # this rank's pairs among those that are compared
        # The copy from pinned memory is not waited for: it runs while the GPU works.
        batch = batch.to(self.device, non_blocking=True)
        # No variable holds the teacher's features, because it would keep them until after backward.
        if pairs is None:
            total, losses = self.engine(batch, self._targets(batch))  # collectives
        else:
            gradients = {
                name: gradient.chunk(self.accumulation)[index]
                for name, gradient in pairs.gradients.items()
            }
            factor = self.accumulation / self.loss_scale
            total, losses = self.engine(
                batch, self._targets(batch), pair_gradients=gradients, gradient_factor=factor
            )
            total = total + pairs.total
            losses = losses | pairs.losses
            num_compared *= self.accumulation
        loss = nonfinite.poison(total)  # gives NaN gradients if the loss is not finite
        with scopes.scope("backward"):
            self.engine.backward(loss)  # collectives: text gradients, gradient buckets
        num_duplicates = self.objective.num_duplicates
        if num_duplicates is None:
            num_duplicates = torch.zeros((), device=self.device)
        ordered_losses = {name: losses[name] for name in self.objective.losses}
        duplicates_per_pair = num_duplicates.float() / num_compared
        return MicroBatchLosses(sample_index, total.detach(), ordered_losses, duplicates_per_pair)

    def _targets(self, batch: Batch) -> Targets | None:
        if self.teacher is None:
            return None
        with scopes.scope("activations teacher"):
            return self.teacher(batch.image)

    def update(self) -> None:
        """Update the weights, after the last micro-batch of a step. Collective, CPU-GPU sync."""
        # The rate of this update: `engine.step` sets that of the next one.
        self.lr = self.engine.get_lr()[0] / self.lr_factor
        with scopes.scope("optimizer"):
            self.engine.step()  # overflow check, gradient norm, updated weights
        if self.ema is not None and not self.skipped:
            self.ema.update()

    @property
    def loss_scale(self) -> float:
        """The factor of the gradients in backward passes, which keeps fp16's from vanishing."""
        if self.dtype != torch.float16:
            return 1.0
        return float(self.engine.optimizer.loss_scale)

    @property
    def skipped(self) -> bool:
        """True if all ranks skipped the last step's update because something was not finite."""
        return not self.engine.was_step_applied()

    def log_columns(self) -> dict[str, float]:
        """Return the last update's columns of the log: rate, gradient norm and temperatures.

        In fp16 also the loss scale and the number of skipped steps. CPU-GPU sync; collective under
        ZeRO-3.
        """
        values = {"lr": self.lr}
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            values["grad_norm"] = float(norm)
        if self.dtype == torch.float16:
            values["loss_scale"] = self.loss_scale
            values["skipped_steps"] = self.engine.skipped_steps
        for name, scale in self.objective.scales().items():
            # A scale may be learned down to 0.
            values[f"temperature/{name}"] = 1 / scale if scale else math.inf
        return values


def num_columns(config: LossConfig) -> int:
    """Return the number of elements of `MicroBatchLosses.stacked`."""
    return 2 + len(config.weights)


def name_means(means: list[float], loss_names: Collection[str], num_pairs: int) -> dict[str, float]:
    """Return the log's columns of the means of `stacked`; {} if `num_pairs` is 0."""
    if not num_pairs:
        return {}
    total, *loss_means, duplicates_per_pair = means
    values = {"loss": total}
    for name, mean in zip(loss_names, loss_means, strict=True):
        values[f"loss/{name}"] = mean
    # A loss with one positive ignores duplicates, a loss with several adds them as positives.
    for name in loss_names:
        if LOSSES[name].scores:
            column = "added_positives" if LOSSES[name].sigmoid else "ignored_negatives"
            values[column] = round(duplicates_per_pair * num_pairs)
    return values
