"""The module that DeepSpeed's engine trains: the student, and the weighted sum of the chosen losses."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ds_cmli.cmli.contrastive import temperature_scale, upcast
from ds_cmli.cmli.inputs import full_precision
from ds_cmli.cmli.ring import Scorer
from ds_cmli.cmli.token_keep import Selection, select
from ds_cmli.config.registry import LOSSES, load
from ds_cmli.config.schema import LossConfig
from ds_cmli.data.batch import Batch
from ds_cmli.losses.base import Features, LossInputs, WidthHead
from ds_cmli.losses.cached import PairFeatures, PairGradients, pair_gradients
from ds_cmli.models.student import Student
from ds_cmli.models.teacher import Targets


class Objective(nn.Module):
    ignored: Tensor

    def __init__(self, student: Student, config: LossConfig, teacher_width: int | None = None):
        super().__init__()
        self.config = config
        self.student = student
        self.losses = nn.ModuleDict({name: load(LOSSES[name])(config) for name in config.weights})
        # How many texts of other pairs were no negatives of this rank's images in the last micro-batch or step.
        self.register_buffer("ignored", torch.zeros((), dtype=torch.int64), persistent=False)
        self.width_head: WidthHead | None = None
        if teacher_width is not None and teacher_width != student.width:
            self.width_head = WidthHead(student.width, teacher_width)
        self.score = Scorer(
            config.cmli_backend,
            config.cmli_scratch_bytes,
            config.cmli_recompute,
            config.cmli_exchange,
            config.cmli_gather_bytes,
        )

    def forward(self, *inputs: Any, part: str = "whole") -> Any:
        """Call the method `part`: `whole`, or one of `embed`, `compare` and `replay`, the parts of gradient caching.

        All go through `forward` because under ZeRO-3 parameters are gathered only inside the engine's forward pass.
        """
        return getattr(self, part)(*inputs)

    def whole(self, batch: Batch, targets: Targets | None) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of this rank's mean losses (a scalar in fp32), and each loss by name, detached.

        Their means over ranks are the losses of the global batch. Collective.
        """
        inputs = self._inputs(self._features(batch), batch, targets)
        each = {name: loss(inputs) for name, loss in self.losses.items()}  # collectives
        same = vars(inputs).get("duplicates")
        if same is not None:  # a loss has compared pairs
            self.ignored.copy_(same.sum())
        total = torch.stack(
            [weight * each[name] for name, weight in self.config.weights.items()]
        ).sum()
        return total, {name: loss.detach() for name, loss in each.items()}

    def embed(self, batch: Batch) -> PairFeatures:
        """The features of a micro-batch for `compare`. Called under no_grad: no graph and no activation checkpoints."""
        return self._pair_features(self._features(batch), batch).copied()

    @torch.enable_grad()
    def compare(
        self,
        cached: list[PairFeatures],
        device: torch.device,
        scale: float,
        heartbeat: Callable[[], None],
    ) -> PairGradients:
        """The losses over the pairs of all micro-batches, by `cached.pair_gradients`. Collective."""
        losses: dict[str, Any] = {
            name: self.losses[name] for name in self.config.weights if LOSSES[name].scores
        }
        with full_precision(device):  # of the scores, and of their gradients too
            found = pair_gradients(
                losses, self.config.weights, cached, self.score, device, scale, self.config.cmli_scratch_bytes,
                self.config.duplicates == "keep", heartbeat,
            )  # fmt: skip
        self.ignored.copy_(found.ignored)
        return found

    def replay(
        self, batch: Batch, targets: Targets | None, gradients: PairFeatures, pairs: PairGradients, factor: float,
        accumulation: int,
    ) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """As `whole`, but for a micro-batch whose losses over pairs have been computed by `compare`.

        Args:
            gradients: the gradients of its features, times `factor`.
            pairs: the losses over the pairs of the step.
            accumulation: number of micro-batches in the step, over which the engine averages gradients.
        """
        features = self._features(batch)
        inputs = self._inputs(features, batch, targets)
        each = {
            name: self.losses[name](inputs)
            for name in self.config.weights
            if not LOSSES[name].scores
        }
        of_pairs = self._pair_features(features, batch, gradients.selection)
        known = [
            _KnownGradient.apply(
                getattr(of_pairs, name), getattr(gradients, name), accumulation / factor
            )
            for name in ("image_cls", "text_cls", "patches", "tokens")
            if getattr(gradients, name) is not None
        ]
        # Every micro-batch adds the whole gradient of the losses' parameters, which the average over them then keeps.
        of_parameters = zip(self.pair_parameters(), pairs.parameters, strict=True)
        known += [
            _KnownGradient.apply(p, gradient, 1.0)
            for p, gradient in of_parameters
            if gradient is not None
        ]
        weighted = [self.config.weights[name] * loss for name, loss in each.items()]
        total = torch.stack([*weighted, *known]).sum() + pairs.total
        found = {**{name: loss.detach() for name, loss in each.items()}, **pairs.each}
        return total, {name: found[name] for name in self.config.weights}

    def pair_parameters(self) -> list[nn.Parameter]:
        """The parameters of the losses over pairs, which `replay` uses outside of their modules."""
        compared = [self.losses[name] for name in self.config.weights if LOSSES[name].scores]
        return [p for loss in compared for p in loss.parameters()]

    def _inputs(self, features: Features, batch: Batch, targets: Targets | None) -> LossInputs:
        return LossInputs(
            features, batch, targets, self.student, self.width_head, self.score, self.config
        )

    def _features(self, batch: Batch) -> Features:
        return Features(*self.student(batch.image, batch.input_ids, batch.attention_mask))

    def _pair_features(
        self, features: Features, batch: Batch, selection: Selection | None = None
    ) -> PairFeatures:
        """The `PairFeatures` of a batch; `selection` is that of its patches and tokens if it has been made before."""
        kinds = {LOSSES[name].scores for name in self.config.weights}
        image_cls, text_cls = (
            (features.image_cls, features.text_cls) if "global" in kinds else (None, None)
        )
        patches = tokens = None
        mask, share = batch.token_mask, self.config.cmli_token_keep
        if "cmli" in kinds:
            patches, tokens = (
                self.student.projection(features.patches),
                self.student.projection(features.tokens),
            )
            if share < 1:
                if selection is None:
                    selection = select(patches, tokens, mask, share, self.config.cmli_scratch_bytes)
                (patches, tokens), mask = selection.of(patches, tokens), selection.token_mask
        return PairFeatures(mask, batch.pair_id, image_cls, text_cls, patches, tokens, selection)

    def scales(self) -> dict[str, float]:
        """1/temperature of each loss that has one, by name. CPU-GPU sync; collective if ZeRO-3 partitions them."""
        logarithms: dict[str, Any] = {
            n: x.logit_scale for n, x in self.losses.items() if hasattr(x, "logit_scale")
        }
        with torch.no_grad(), _whole([*logarithms.values()]):
            return {name: temperature_scale(x).item() for name, x in logarithms.items()}

    def score_scales(self) -> dict[str, float]:
        """1/temperature for each kind of pair scores, "global" or "cmli": that of the first loss that compares them."""
        out: dict[str, float] = {}
        for name, scale in self.scales().items():
            if LOSSES[name].scores:
                out.setdefault(LOSSES[name].scores, scale)
        return out


class _KnownGradient(torch.autograd.Function):
    """Returns zero; its backward gives `gradient` times `factor` as the gradient of `x`."""

    @staticmethod
    def forward(ctx, x, gradient, factor):
        ctx.save_for_backward(gradient)
        ctx.factor, ctx.dtype = factor, x.dtype
        return torch.zeros((), dtype=upcast(x[:0]).dtype, device=x.device)

    @staticmethod
    def backward(ctx, grad):
        (gradient,) = ctx.saved_tensors
        return (gradient * (grad * ctx.factor).to(gradient.dtype)).to(ctx.dtype), None, None


def _whole(parameters: list[Tensor]) -> AbstractContextManager:
    """A context with whole parameters: under ZeRO-3 they may be partitioned at any time, as after a skipped step."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)  # collective
