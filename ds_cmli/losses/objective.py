"""The module that DeepSpeed's engine trains: the student and the chosen losses.

A loss over pairs is a function of the pairs' features alone, with gradient caching those of all
micro-batches of a step. What it has learned, its temperature, is a feature too: so no parameter
takes part when features are compared.
"""

from contextlib import AbstractContextManager, nullcontext
from pkgutil import resolve_name
from typing import Any, cast

import torch
from torch import Tensor, nn

from ds_cmli.cmli.loss import PairLoss, Temperature
from ds_cmli.config.registry import LOSSES, over_pairs
from ds_cmli.config.schema import LossConfig
from ds_cmli.data.pairs import Batch
from ds_cmli.losses.gradient_cache import KnownGradient
from ds_cmli.losses.target_cmli import Features, WidthHead
from ds_cmli.models.student import Student, Targets

# The weighted sum, a scalar in fp32; each loss by name, detached.
Losses = tuple[Tensor, dict[str, Tensor]]
PairFeatures = dict[str, Tensor]


class Objective(nn.Module):
    def __init__(self, student: Student, config: LossConfig, teacher_width: int | None = None):
        """Build the losses that the configuration names."""
        super().__init__()
        self.config, self.student = config, student
        built = {
            name: resolve_name(LOSSES[name].implementation)(config, student, teacher_width)
            for name in config.weights
        }
        self.losses = nn.ModuleDict(built)
        self.width_head: WidthHead | None = None
        if teacher_width is not None and teacher_width != student.width:
            self.width_head = WidthHead(student.width, teacher_width)

    def forward(
        self,
        batch: Batch,
        targets: Targets | None = None,
        embed: bool = False,
        known: PairFeatures | None = None,
        factor: float = 1.0,
    ) -> Losses | PairFeatures:
        """This rank's mean losses of a micro-batch, with its own negatives. Collective.

        Their means over ranks are those of the global batch.

        Args:
            targets: the teacher's features; None if no loss needs them.
            embed: return what the losses over pairs compare.
            known: the gradients of that, to be multiplied by `factor`, in place of these losses.
        """
        features = self._features(batch)
        pairs = self._pair_features(features, batch)
        if embed:
            # A class token is a view of its sequence, whose memory would be kept.
            return {name: x if x._base is None else x.clone() for name, x in pairs.items()}
        values = {}
        for name, loss in self.losses.items():
            if not LOSSES[name].scores:
                values[name] = loss(features, targets, self.student, self.width_head)
        if known is None:
            values |= self.compare(pairs)  # collectives
        terms = self.weighted(values)
        for name, gradient in (known or {}).items():
            terms.append(KnownGradient.apply(pairs[name], gradient, factor))
        # In the order of the log.
        ordered = {name: values[name].detach() for name in self.losses if name in values}
        return torch.stack(terms).sum(), ordered

    def compare(self, pairs: PairFeatures) -> dict[str, Tensor]:
        """The losses over the pairs of all ranks. Collective."""
        tokens = pairs.get("patches"), pairs.get("tokens"), pairs["token_mask"]
        compared: dict[str, tuple[Any, Any, Any, Any]] = {
            "global": (pairs.get("image_cls"), pairs.get("text_cls"), None, None),
            "cmli": (*tokens, None),
        }
        values = {}
        for name, loss in self._over_pairs().items():
            learned = pairs[f"learned/{name}"]
            size = 1 if loss.temperature.logit_bias is None else 2
            learned = learned.view(-1, size).mean(0)  # over the micro-batches
            # Not by the module's hooks, which at ZeRO-3 expect it where the model runs.
            sides = compared[LOSSES[name].scores]
            values[name] = loss.forward(*sides, ids=pairs["ids"], learned=learned)
        return values

    @property
    def ignored(self) -> Tensor | None:
        """How many texts of other pairs were no negatives of this rank's images in the last
        comparison; None without one."""
        return next((loss.num_duplicates for loss in self._over_pairs().values()), None)

    def weighted(self, values: dict[str, Tensor]) -> list[Tensor]:
        return [self.config.weights[name] * value for name, value in values.items()]

    def _over_pairs(self) -> dict[str, PairLoss]:
        return {name: cast(PairLoss, self.losses[name]) for name in over_pairs(self.config.weights)}

    def _features(self, batch: Batch) -> Features:
        texts = batch.input_ids, batch.attention_mask, batch.padded
        x, patches, y, tokens = self.student(batch.image, *texts)
        return Features(x, patches, y, tokens, batch.token_mask)

    def _pair_features(self, f: Features, batch: Batch) -> PairFeatures:
        """What the losses over pairs compare, with `learned/NAME` of each."""
        kinds = {LOSSES[name].scores for name in self.config.weights}
        pairs: PairFeatures = {"token_mask": f.token_mask, "ids": batch.pair_id}
        if "global" in kinds:
            pairs |= {"image_cls": f.image_cls, "text_cls": f.text_cls}
        if "cmli" in kinds:
            project = self.student.projection
            pairs |= {"patches": project(f.patches), "tokens": project(f.tokens)}
        for name, loss in self._over_pairs().items():
            pairs[f"learned/{name}"] = loss.temperature()
        return pairs

    def scales(self) -> dict[str, float]:
        """1/temperature of each loss that has one, by name.

        CPU-GPU sync; collective if ZeRO-3 partitions them.
        """
        temperatures = {
            name: cast(Temperature, loss.temperature)
            for name, loss in self.losses.items()
            if hasattr(loss, "temperature")
        }
        parameters = [p for x in temperatures.values() for p in x.parameters()]
        with torch.no_grad(), _whole(parameters):
            return {name: x.forward()[0].item() for name, x in temperatures.items()}


def _whole(parameters: list[nn.Parameter]) -> AbstractContextManager:
    """Enter a context with whole parameters.

    Under ZeRO-3 they may be partitioned at any time, as after a skipped step.
    """
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)  # collective
