"""The module that DeepSpeed's engine trains: the student and the chosen losses."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from ds_cmli.cmli.contrastive import temperature_scale
from ds_cmli.cmli.cut import Cut
from ds_cmli.cmli.inputs import full_precision
from ds_cmli.cmli.ring import Score, Scorer
from ds_cmli.cmli.token_keep import PatchKeep, Selection, select
from ds_cmli.common.probe import probe
from ds_cmli.common.trees import tree_map
from ds_cmli.config.registry import LOSSES, load, over_pairs
from ds_cmli.config.schema import LossConfig
from ds_cmli.data.aspect import patch_mask
from ds_cmli.data.batch import Batch
from ds_cmli.losses.base import Loss
from ds_cmli.losses.cached import PairGradients, PairLosses
from ds_cmli.losses.inputs import Features, LossInputs, WidthHead
from ds_cmli.losses.pair_features import CachedStep, KnownGradient, PairFeatures
from ds_cmli.models.student import Student
from ds_cmli.models.teacher import Targets

# The weighted sum, a scalar in fp32; each loss by name, detached.
Losses = tuple[Tensor, dict[str, Tensor]]
PartResult = TypeVar("PartResult")


class Objective(nn.Module):
    ignored: Tensor
    step = 1  # the optimizer step in progress, by which `config.start` goes

    def __init__(
        self,
        student: Student,
        config: LossConfig,
        teacher_width: int | None = None,
        patch_keep: PatchKeep | None = None,
    ):
        """Build the losses that the configuration names.

        Args:
            patch_keep: which patches the student sees in training; None: all.
        """
        super().__init__()
        self.config = config
        self.student = student
        self.losses = nn.ModuleDict({name: load(LOSSES[name])(config) for name in config.weights})
        self.patch_keep, self.patches = patch_keep, math.prod(student.grid)
        if patch_keep is not None:
            self.patches = patch_keep.kept
        for loss in self.losses.values():
            if student.start is not None:
                loss.start_from(student.start)  # type: ignore[operator]
        # How many texts of other pairs were no negatives of this rank's images in the last
        # micro-batch or step.
        self.register_buffer("ignored", torch.zeros((), dtype=torch.int64), persistent=False)
        self.width_head: WidthHead | None = None
        if teacher_width is not None and teacher_width != student.width:
            self.width_head = WidthHead(student.width, teacher_width)
        self.cut: Cut | None = None
        if config.cmli_cut:
            of_cmli = [w for name, w in config.weights.items() if LOSSES[name].scores == "cmli"]
            self.cut = Cut(config.cmli_cut, weight=sum(of_cmli))
        self.score: Score = Scorer(
            config.cmli_backend,
            config.cmli_scratch_bytes,
            config.cmli_recompute,
            config.cmli_exchange,
            config.cmli_gather_bytes,
        )

    def forward(self, part: Callable[..., PartResult], *arguments: object) -> PartResult:
        """Run `part`, one of `whole`, `embed`, `compare` and `replay`, as a function of this class.

        All go through `forward` because under ZeRO-3 parameters are gathered only inside the
        engine's forward pass.
        """
        return part(self, *arguments)

    def whole(self, batch: Batch, targets: Targets | None) -> Losses:
        """This rank's mean losses of a micro-batch, with its own negatives.

        Their means over ranks are those of the global batch. Collective.

        Args:
            targets: the teacher's features; None if no loss needs them.
        """
        features = self._features(batch)
        with probe.losses():
            inputs = self._inputs(features, batch, targets)
            values = {}
            for name, loss in self.losses.items():
                # Of single pairs, those with right captions alone.
                values[name] = loss(inputs if LOSSES[name].scores else inputs.right)
        if self._over_pairs() and inputs.duplicates is not None:
            self.ignored.copy_(inputs.duplicates.sum())
        weights = self.config.weights_at(self.step)
        weighted = [weight * values[name] for name, weight in weights.items()]
        return torch.stack(weighted).sum(), tree_map(values, Tensor.detach)

    # The parts of a step with gradient caching.

    def embed(self, batch: Batch) -> PairFeatures:
        """The features of a micro-batch. Under no_grad: no graph and no activation checkpoints."""
        cached = self._pair_features(self._features(batch), batch)
        for name, x in cached.features.items():
            # A class token is a view of its sequence, whose memory would be kept.
            if x.untyped_storage().nbytes() > x.nbytes:
                cached.features[name] = x.clone()
        return cached

    @torch.enable_grad()
    def compare(self, step: CachedStep) -> PairGradients:
        """The losses over the pairs of all micro-batches. Collective."""
        arguments = (
            self._over_pairs(),
            self.config.weights_at(self.step),
            self.score,
            self.config.cmli_scratch_bytes,
            self.config,
            self.cut,
        )
        # Full precision of the scores, and of their gradients too.
        with probe.losses(), full_precision(step.device):
            return PairLosses(step, *arguments).gradients()  # collectives

    def replay(
        self,
        batch: Batch,
        targets: Targets | None,
        cached: PairFeatures,
        pairs: PairGradients,
        factor: float,
    ) -> Losses:
        """Compute what `whole` does, of a micro-batch whose losses over pairs are known.

        Args:
            cached: the gradients of its features, which are to be multiplied by `factor`.
        """
        features, weights = self._features(batch), self.config.weights_at(self.step)
        inputs = self._inputs(features, batch, targets)
        values = {n: self.losses[n](inputs.right) for n in weights if not LOSSES[n].scores}
        again = self._pair_features(features, batch, cached.selection)
        terms = [weights[name] * value for name, value in values.items()]
        for name, gradient in cached.features.items():
            terms.append(KnownGradient.apply(again.features[name], gradient, factor))
        # Every micro-batch adds the whole gradient of the losses' parameters, which the average
        # over them then keeps.
        for p, of_p in zip(self.pair_parameters(), pairs.parameters, strict=True):
            if of_p is not None:
                terms.append(KnownGradient.apply(p, of_p, 1.0))
        total = torch.stack(terms).sum() + pairs.total
        values = tree_map(values, Tensor.detach) | pairs.losses
        return total, {name: values[name] for name in weights}

    def _over_pairs(self) -> dict[str, Loss]:
        return {name: cast(Loss, self.losses[name]) for name in over_pairs(self.config.weights)}

    def pair_parameters(self) -> list[nn.Parameter]:
        """The parameters of the losses over pairs, which `replay` uses outside of their modules."""
        return [p for loss in self._over_pairs().values() for p in loss.parameters()]

    def _inputs(self, features: Features, batch: Batch, targets: Targets | None) -> LossInputs:
        if targets is not None and features.places is not None:
            targets = targets.at(features.places)
        options = self.score, self.config, self.cut, None, batch.wrong
        return LossInputs(features, batch, targets, self.student, self.width_head, *options)

    def _features(self, batch: Batch) -> Features:
        places, ids, mask = None, batch.input_ids, batch.attention_mask
        if self.patch_keep is not None and self.training:
            places = self.patch_keep.places(batch.index, self.step)
        with self.student.text.knowing(batch.padded):
            x, patches, y, tokens = self.student(batch.image, ids, mask, places, batch.grid)
        present = patch_mask(batch.grid, self.patches)
        return Features(x, patches, y, tokens, places, present)

    def _pair_features(
        self, features: Features, batch: Batch, selection: Selection | None = None
    ) -> PairFeatures:
        """The `PairFeatures` of a batch; `selection`: that which was made for it before."""
        kinds = {LOSSES[name].scores for name in self.config.weights}
        compared: dict[str, Tensor] = {}
        mask, share = batch.token_mask, self.config.cmli_token_keep
        if "global" in kinds:
            compared |= {"image_cls": features.image_cls, "text_cls": features.text_cls}
        if "cmli" in kinds:
            patches = self.student.projection(features.patches)
            tokens = self.student.projection(features.tokens)
            if share < 1:
                if selection is None:
                    selection = select(patches, tokens, mask, share, self.config.cmli_scratch_bytes)
                (patches, tokens), mask = selection.of(patches, tokens), selection.token_mask
            compared |= {"patches": patches, "tokens": tokens}
        masks = features.patch_mask, selection
        return PairFeatures(compared, mask, batch.pair_id, *masks, batch.wrong)

    def scales(self) -> dict[str, float]:
        """1/temperature of each loss that has one, by name.

        CPU-GPU sync; collective if ZeRO-3 partitions them.
        """
        logarithms: dict[str, Tensor] = {}
        for name, loss in self.losses.items():
            if hasattr(loss, "logit_scale"):
                logarithms[name] = loss.logit_scale  # type: ignore[assignment]
        with torch.no_grad(), _whole([*logarithms.values()]):
            out: dict[str, float] = {}
            for name, x in logarithms.items():
                most: Any = self.losses[name].max_scale
                out[name] = temperature_scale(x, most).item()
            return out

    def score_scales(self) -> dict[str, float]:
        """1/temperature for each kind of pair scores: that of the first loss that compares them.

        The kinds are "global" and "cmli". CPU-GPU sync; collective if ZeRO-3 partitions them.
        """
        out: dict[str, float] = {}
        for name, scale in self.scales().items():
            if LOSSES[name].scores:
                out.setdefault(LOSSES[name].scores, scale)
        return out


def _whole(parameters: list[Tensor]) -> AbstractContextManager:
    """Enter a context with whole parameters.

    Under ZeRO-3 they may be partitioned at any time, as after a skipped step.
    """
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)  # collective
