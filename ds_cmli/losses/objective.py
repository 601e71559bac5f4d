"""The module that DeepSpeed's engine trains: the student and the chosen losses.

A loss over pairs depends on the features of the pairs alone. With gradient caching these are the
features of all micro-batches of a step. The learned temperature of a loss is passed as a feature
too, so that comparing features uses no parameter of the module.
"""

from pkgutil import resolve_name
from typing import cast

import torch
from torch import Tensor, nn

from ds_cmli.cmli.loss import PairLoss
from ds_cmli.config.registry import LOSSES, over_pairs
from ds_cmli.config.schema import LossConfig
from ds_cmli.data.pairs import Batch
from ds_cmli.losses.gradient_cache import KnownGradient
from ds_cmli.losses.target_cmli import Features, WidthHead
from ds_cmli.models.student import Student, Targets

Losses = tuple[Tensor, dict[str, Tensor]]  # the weighted sum in fp32; each loss, detached, by name
PairFeatures = dict[str, Tensor]  # the inputs of the losses over pairs, by name


class Objective(nn.Module):
    def __init__(self, student: Student, config: LossConfig, teacher_width: int | None = None):
        """Build the losses that the configuration names; `teacher_width` None: no teacher."""
        super().__init__()
        self.config = config
        self.student = student
        self.losses = nn.ModuleDict()
        for name in config.weights:
            build_loss = resolve_name(LOSSES[name].implementation)
            self.losses[name] = build_loss(config, student, teacher_width)
        self.width_head: WidthHead | None = None
        if teacher_width is not None and teacher_width != student.width:
            self.width_head = WidthHead(student.width, teacher_width)

    def forward(
        self,
        batch: Batch,
        targets: Targets | None = None,
        embed: bool = False,
        pair_gradients: PairFeatures | None = None,
        gradient_factor: float = 1.0,
    ) -> Losses | PairFeatures:
        """Return this rank's mean losses of a micro-batch. Collective.

        Negatives are the other pairs of the micro-batch on all ranks. The mean over ranks of a loss
        is the loss of the global micro-batch.

        Args:
            embed: return the features that the losses over pairs compare, and compute no loss;
                here, because DeepSpeed's engine calls `forward` alone.
            pair_gradients: the gradients of these features, if the losses over pairs have been
                computed before; backward then uses them, multiplied by `gradient_factor`.
        """
        image_cls, patches, text_cls, tokens = self.student(
            batch.image, batch.input_ids, batch.attention_mask, batch.padded
        )
        features = Features(image_cls, patches, text_cls, tokens, batch.token_mask)
        pairs = self._pair_features(features, batch)
        if embed:
            # A class token is a view of its sequence: without a copy it would keep the sequence.
            return {name: x if x._base is None else x.clone() for name, x in pairs.items()}
        values: dict[str, Tensor] = {}
        for name, loss in self.losses.items():
            if not LOSSES[name].scores:
                values[name] = loss(features, targets, self.student, self.width_head)
        if pair_gradients is None:
            values |= self.compare(pairs)  # collectives
        terms = self.weigh(values)
        if pair_gradients is not None:
            for name, gradient in pair_gradients.items():
                terms.append(KnownGradient.apply(pairs[name], gradient, gradient_factor))
        logged = {name: values[name].detach() for name in self.losses if name in values}
        return torch.stack(terms).sum(), logged

    def compare(self, pairs: PairFeatures) -> dict[str, Tensor]:
        """Return the losses over the pairs of all ranks, by name. Collective."""
        values = {}
        for name, loss in self._pair_losses().items():
            token_mask = None
            if LOSSES[name].scores == "global":
                image = pairs["image_cls"]
                text = pairs["text_cls"]
            else:
                image = pairs["patches"]
                text = pairs["tokens"]
                token_mask = pairs["token_mask"]
            # With gradient caching there is one copy of them for each micro-batch; all are equal.
            copy_size = 1 if loss.temperature.logit_bias is None else 2
            scale_and_bias = pairs[f"scale_and_bias/{name}"].view(-1, copy_size).mean(0)
            # ZeRO-3's hooks allow a module to be called only inside the model's own forward.
            values[name] = loss.forward(
                image, text, token_mask, ids=pairs["ids"], scale_and_bias=scale_and_bias
            )
        return values

    @property
    def num_duplicates(self) -> Tensor | None:
        """Other pairs' texts that were not negatives in the last call; None without pairs."""
        return next((loss.num_duplicates for loss in self._pair_losses().values()), None)

    def weigh(self, values: dict[str, Tensor]) -> list[Tensor]:
        """Multiply each loss by its weight."""
        return [self.config.weights[name] * value for name, value in values.items()]

    def _pair_losses(self) -> dict[str, PairLoss]:
        return {name: cast(PairLoss, self.losses[name]) for name in over_pairs(self.config.weights)}

    def _pair_features(self, features: Features, batch: Batch) -> PairFeatures:
        """Return the inputs of the losses over pairs, with `scale_and_bias/NAME` of each."""
        score_kinds = {LOSSES[name].scores for name in self.config.weights}
        pairs: PairFeatures = {"token_mask": features.token_mask, "ids": batch.pair_id}
        if "global" in score_kinds:
            pairs["image_cls"] = features.image_cls
            pairs["text_cls"] = features.text_cls
        if "cmli" in score_kinds:
            pairs["patches"] = self.student.projection(features.patches)
            pairs["tokens"] = self.student.projection(features.tokens)
        for name, loss in self._pair_losses().items():
            pairs[f"scale_and_bias/{name}"] = loss.temperature()
        return pairs

    def scales(self) -> dict[str, float]:
        """Return 1/temperature of each loss over pairs, by name.

        CPU-GPU sync; collective if ZeRO-3 partitions the temperatures.
        """
        import deepspeed

        scales = {}
        for name, loss in self._pair_losses().items():
            parameters = list(loss.parameters())
            is_partitioned = hasattr(parameters[0], "ds_id")
            gathered = deepspeed.zero.GatheredParameters(parameters, enabled=is_partitioned)
            with torch.no_grad(), gathered:  # collective
                scale, *_ = loss.temperature.forward()
                scales[name] = scale.item()
        return scales
