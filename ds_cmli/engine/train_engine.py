"""Runs training steps of student, teacher, losses and DeepSpeed's engine.

Training, profiling and prediction all use this one step.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ds_cmli import probe
from ds_cmli.config.registry import LOSSES, compares_tokens
from ds_cmli.config.schema import LossConfig
from ds_cmli.data.batch import Batch
from ds_cmli.distributed import process_group as distributed
from ds_cmli.engine.ema import EMA
from ds_cmli.engine.throughput import ModelFlops, StepTimer
from ds_cmli.faults import nonfinite
from ds_cmli.losses import gradient_cache
from ds_cmli.losses.objective import Losses, Objective, PairFeatures
from ds_cmli.models.teacher import Targets, Teacher

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
    names: list[list[str]]  # the parameters' names, in the order of the optimizer's groups
    # Weights that are not trained, on rank 0's host, in the precision of their source.
    frozen: dict[str, Tensor] = field(default_factory=dict)
    lr_factor: float = 1.0  # the factor of the first group's learning rate
    accumulation: int = 1  # micro-batches per step
    # Whether losses over pairs take their negatives from all micro-batches of a step.
    caching: bool = False
    timer: StepTimer | None = None  # None: neither time nor the model's FLOPs are measured
    # FLOPs of a micro-batch, by the padded length of its texts
    flops: dict[int, float] = field(default_factory=dict)
    ema: EMA | None = None
    compiled: bool = False  # if true, the model's FLOPs are not counted
    lr: float = 0.0  # the learning rate of the last update, for a group whose factor is 1

    def step(
        self, micro_batches: Sequence[Batch], heartbeat: Callable[[], None] = lambda: None
    ) -> list[MicroBatchLosses]:
        """Run one optimizer step. Collective.

        Args:
            micro_batches: this rank's `accumulation` micro-batches; each is moved to the device
                when its turn comes.
            heartbeat: called after each micro-batch; with gradient caching, after the losses over
                pairs too.
        """
        self.objective.step = self.engine.global_steps + 1  # skipped steps count, too
        return self._losses_and_gradients(micro_batches, self._update, heartbeat)

    def _losses_and_gradients(
        self,
        micro_batches: Sequence[Batch],
        update: Callable[[], None],
        heartbeat: Callable[[], None],
    ) -> list[MicroBatchLosses]:
        """Run forward and backward, and `update` after each micro-batch. Collectives."""
        if self.caching:
            return self._cached(micro_batches, update, heartbeat)
        losses = []
        for batch in micro_batches:
            losses.append(self._backward(batch))  # collectives
            update()  # collectives
            heartbeat()
        return losses

    def _cached(
        self,
        micro_batches: Sequence[Batch],
        update: Callable[[], None],
        heartbeat: Callable[[], None],
    ) -> list[MicroBatchLosses]:
        """The same with gradient caching; each micro-batch is moved to the device twice."""
        self.mark("forward")
        embedded = [self._embed(batch) for batch in micro_batches]  # collective
        losses = []
        gpus = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(gpus):  # the next step draws what follows the first pass
            parts, compare = [features for _, features in embedded], self.objective.compare
            pairs = gradient_cache.compared(
                parts, compare, self.objective.weighted, self.scale
            )  # collective
            heartbeat()
            for k, (batch, (states, _)) in enumerate(zip(micro_batches, embedded, strict=True)):
                gradient_cache.set_random_states(states, self.device)
                known = pairs.of(k, len(micro_batches), batch.token_mask.shape[1])
                losses.append(self._replay(batch, pairs, known))  # collective
                update()  # collective
                heartbeat()
        return losses

    def _embed(self, batch: Batch) -> tuple[list[Tensor], PairFeatures]:
        states = gradient_cache.random_states(self.device)
        with torch.no_grad():
            # The copy from pinned memory is not waited for, as in `_backward`.
            features = self.engine(batch.to(self.device, non_blocking=True), embed=True)
        return states, features

    def _replay(
        self, batch: Batch, pairs: gradient_cache.Compared, known: PairFeatures
    ) -> MicroBatchLosses:
        index, batch = batch.index, batch.to(self.device, non_blocking=True)
        factor = self.accumulation / self.scale
        single, values = self.forward(
            batch, lambda targets: self.engine(batch, targets, known=known, factor=factor)
        )
        total = single + pairs.total
        self.go_backward(total)  # collectives: gradient buckets
        values = {name: (values | pairs.values)[name] for name in self.objective.losses}
        ignored = self._ignored() / (len(index) * self.accumulation)
        return MicroBatchLosses(index, total.detach(), values, ignored)

    def _ignored(self) -> Tensor:
        ignored = self.objective.ignored
        return torch.zeros((), device=self.device) if ignored is None else ignored.float()

    def __call__(self, batch: Batch) -> Losses:
        """Run forward and backward of one micro-batch, with its own negatives.

        The weights are updated at the end of accumulation. Returns the weighted loss and each loss
        by name for this rank's pairs, fp32 scalars without a graph. Collective.
        """
        losses = self._backward(batch)  # collectives
        self._update()  # collectives
        return losses.total, losses.each

    def _backward(self, batch: Batch) -> MicroBatchLosses:
        # The copy from pinned memory is not waited for: it runs while the GPU works.
        index, batch = batch.index, batch.to(self.device, non_blocking=True)
        # Collectives: text features, column statistics.
        total, values = self.forward(batch, lambda targets: self.engine(batch, targets))
        self.go_backward(total)  # collectives: text gradients, gradient buckets
        return MicroBatchLosses(index, total.detach(), values, self._ignored() / len(index))

    def go_backward(self, total: Tensor) -> Tensor:
        """Run backward from a micro-batch's weighted loss, and return its share of the step's loss.

        If the loss is not finite, all gradients are NaN. Collective.
        """
        self.mark("backward")
        loss = nonfinite.poison(total)
        with probe.scope("backward"):
            return self.engine.backward(loss)

    def _update(self) -> None:
        # The rate of this update: `engine.step` sets that of the next one.
        self.lr = self.engine.get_lr()[0] / self.lr_factor
        self.mark("step")
        with probe.scope("optimizer"):
            # Collectives and a CPU-GPU sync: overflow check, gradient norm, updated weights.
            self.engine.step()
        if self.ema is not None and self.engine.was_step_applied():
            self.ema.update()
        self.mark(None)

    @property
    def scale(self) -> float:
        """The loss scale.

        Backward passes multiply the gradients by it, which keeps fp16 gradients from vanishing.
        """
        if self.dtype != torch.float16:
            return 1.0
        return float(self.engine.optimizer.loss_scale)

    def forward(self, batch: Batch, student: Callable[[Targets | None], Losses]) -> Losses:
        """Run the teacher, and then `student` with the teacher's targets.

        If time is measured, FLOPs are counted for the first batch of each padded text length.
        """
        self.mark("forward")
        positions = batch.input_ids.shape[1]
        if self.timer is None or self.compiled or positions in self.flops:
            out = student(self._targets(batch))
        else:
            with ModelFlops(trained=False) as of_teacher:
                targets = self._targets(batch)
            with ModelFlops(trained=True) as of_student:
                out = student(targets)
            counted = of_teacher.flops + of_student.flops + self._all_pairs_flops(batch)
            self.flops[positions] = counted
        if self.timer is not None:
            self.timer.flops += self.flops.get(positions, 0.0)
        return out

    def _targets(self, batch: Batch) -> Targets | None:
        if self.teacher is None:
            return None
        with probe.scope("activations teacher"):
            return self.teacher(batch.image)

    def _all_pairs_flops(self, batch: Batch) -> float:
        """FLOPs of the all-pairs operator, into which `ModelFlops` does not see.

        They are those of the similarities, and as many again for the gradient of each side.
        """
        if not compares_tokens(self.objective.losses):
            return 0.0
        (B, M), N = batch.input_ids.shape, math.prod(self.objective.student.grid)
        G = B * distributed.world_size() * (self.accumulation if self.caching else 1)
        D = self.objective.student.embed_dim
        return 3 * 2.0 * B * G * N * M * D

    def mark(self, phase: str | None) -> None:
        if self.timer is not None:
            self.timer.mark(phase)

    @property
    def skipped(self) -> bool:
        """Whether the last step's update was skipped, on all ranks, as something was not finite."""
        return not self.engine.was_step_applied()

    def state(self) -> dict[str, float]:
        """What is logged of the last update: learning rate, gradient norm and the temperatures.

        In fp16 also the loss scale and the number of skipped steps. CPU-GPU sync; collective under
        ZeRO-3.
        """
        optimizer = self.engine.optimizer
        out = {"lr": self.lr}
        norm = self.engine.get_global_grad_norm()
        if norm is not None:
            out["grad_norm"] = float(norm)
        if self.dtype == torch.float16:
            out["loss_scale"] = float(optimizer.loss_scale)
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
    names = list(losses)
    count = 1 + len(names)
    named = ["loss", *map("loss/{}".format, names)]
    values = dict(zip(named, means[:count], strict=True))
    # Texts of the same picture or caption: a loss with one positive ignores them, one with several
    # adds them as such.
    several = {LOSSES[name].several for name in names if LOSSES[name].scores}
    for with_several in several:
        column = "added_positives" if with_several else "ignored_negatives"
        values[column] = round(means[count] * pairs)
    return values
