"""Training steps of student, teacher, losses and DeepSpeed's engine.

Training, profiling and prediction all take this one step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

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
    each: dict[str, Tensor]  # each loss by name
    # Number per pair of other pairs' texts that are no negatives: same picture or caption.
    ignored: Tensor

    def stacked(self) -> Tensor:
        """One tensor: the total, each loss and `ignored`, in this order."""
        return torch.stack([self.total, *self.each.values(), self.ignored])


@dataclass
class TrainEngine:
    engine: "DeepSpeedEngine"  # around the objective
    objective: Objective
    teacher: Teacher | None
    device: torch.device
    dtype: torch.dtype
    # Weights that are not trained, on rank 0's host, in the precision of their source.
    frozen: dict[str, Tensor] = field(default_factory=dict)
    lr_factor: float = 1.0  # the factor of the first group's learning rate
    accumulation: int = 1  # micro-batches per step
    # Whether losses over pairs take their negatives from all micro-batches of a step.
    caching: bool = False
    ema: EMA | None = None
    lr: float = 0.0  # the learning rate of the last update, for a group whose factor is 1

    def step(
        self, micro_batches: Sequence[Batch], heartbeat: Callable[[], None] = lambda: None
    ) -> list[MicroBatchLosses]:
        """Run one optimizer step. Collective.

        Args:
            micro_batches: this rank's `accumulation` micro-batches; each is moved to the device
                when its turn comes, with gradient caching twice.
            heartbeat: called after each micro-batch; with gradient caching, after the losses over
                pairs too.
        """
        if self.caching:
            return self._cached(micro_batches, heartbeat)
        losses = []
        for batch in micro_batches:
            losses.append(self._forward_backward(batch))  # collectives
            self.update()  # collectives
            heartbeat()
        return losses

    def _cached(
        self, micro_batches: Sequence[Batch], heartbeat: Callable[[], None]
    ) -> list[MicroBatchLosses]:
        """A step with gradient caching. Collective."""
        states, features = [], []
        for batch in micro_batches:
            states.append(gradient_cache.random_states(self.device))
            with torch.no_grad():
                features.append(self.engine(batch.to(self.device, non_blocking=True), embed=True))
        losses, objective = [], self.objective
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(gpus):  # the next step draws what follows the first pass
            pairs = gradient_cache.compared(
                features, objective.compare, objective.weighted, self.scale
            )  # collective
            heartbeat()
            for k, batch in enumerate(micro_batches):
                gradient_cache.set_random_states(states[k], self.device)
                losses.append(self._forward_backward(batch, pairs, k))  # collectives
                self.update()  # collectives
                heartbeat()
        return losses

    def _forward_backward(
        self, batch: Batch, pairs: gradient_cache.Compared | None = None, k: int = 0
    ) -> MicroBatchLosses:
        """Run a micro-batch, the k-th of those whose `pairs` have been compared. Collective."""
        index, count = batch.index, len(batch.index)
        # The copy from pinned memory is not waited for: it runs while the GPU works.
        batch = batch.to(self.device, non_blocking=True)
        # The teacher's features are no variables here: they would be kept until after backward.
        if pairs is None:
            # Collectives: text features, column statistics.
            total, values = self.engine(batch, self._targets(batch))
        else:
            known = pairs.of(k, self.accumulation, batch.token_mask.shape[1])
            factor = self.accumulation / self.scale
            total, values = self.engine(batch, self._targets(batch), known=known, factor=factor)
            total, values = total + pairs.total, values | pairs.values
            count *= self.accumulation
        self.backward(total)  # collectives: text gradients, gradient buckets
        ignored = self.objective.ignored  # of the pairs that were compared last
        if ignored is None:
            ignored = torch.zeros((), device=self.device)
        values = {name: values[name] for name in self.objective.losses}
        return MicroBatchLosses(index, total.detach(), values, ignored.float() / count)

    def _targets(self, batch: Batch) -> Targets | None:
        if self.teacher is None:
            return None
        with scopes.scope("activations teacher"):
            return self.teacher(batch.image)

    def backward(self, total: Tensor) -> None:
        """Run backward from a micro-batch's weighted loss. Collective.

        If the loss is not finite, all gradients are NaN.
        """
        loss = nonfinite.poison(total)
        with scopes.scope("backward"):
            self.engine.backward(loss)

    def update(self) -> None:
        """Update the weights, after the last micro-batch of a step. Collective, CPU-GPU sync."""
        # The rate of this update: `engine.step` sets that of the next one.
        self.lr = self.engine.get_lr()[0] / self.lr_factor
        with scopes.scope("optimizer"):
            self.engine.step()  # overflow check, gradient norm, updated weights
        if self.ema is not None and self.engine.was_step_applied():
            self.ema.update()

    @property
    def scale(self) -> float:
        """The loss scale.

        Backward passes multiply the gradients by it, which keeps fp16 gradients from vanishing.
        """
        if self.dtype != torch.float16:
            return 1.0
        return float(self.engine.optimizer.loss_scale)

    @property
    def skipped(self) -> bool:
        """Whether the last step's update was skipped, on all ranks, as something was not finite."""
        return not self.engine.was_step_applied()

    def state(self) -> dict[str, float]:
        """What is logged of the last update: learning rate, gradient norm and the temperatures.

        In fp16 also the loss scale and the number of skipped steps. CPU-GPU sync; collective under
        ZeRO-3.
        """
        out = {"lr": self.lr}
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            out["grad_norm"] = float(norm)
        if self.dtype == torch.float16:
            out["loss_scale"] = self.scale
            out["skipped_steps"] = self.engine.skipped_steps
        for name, scale in self.objective.scales().items():
            # Infinite if the scale was learned down to 0.
            out[f"temperature/{name}"] = 1 / scale if scale else math.inf
        return out


def columns(config: LossConfig) -> int:
    """The number of elements of `MicroBatchLosses.stacked`."""
    return 2 + len(config.weights)


def by_name(means: list[float], losses: Iterable[str], pairs: int) -> dict[str, float]:
    """Means of `stacked` losses over `pairs` pairs, by their names in the log; {} for no pairs."""
    if not pairs:
        return {}
    *of_losses, ignored = means
    names = list(losses)
    values = dict(zip(["loss", *map("loss/{}".format, names)], of_losses, strict=True))
    # Texts of the same picture or caption: a loss with one positive ignores them, one with several
    # adds them as such.
    for name in names:
        if LOSSES[name].scores:
            column = "added_positives" if LOSSES[name].sigmoid else "ignored_negatives"
            values[column] = round(ignored * pairs)
    return values
