"""The losses over pairs: a contrastive and a sigmoid one, on cosines of class tokens and on CMLI.

Contrastive: CLIP (Radford et al., 2021), and on all-pairs CMLI equations (1) to (4) of the source
document, FILIP (Yao et al., 2021). Sigmoid: SigLIP (Zhai et al., 2023, algorithm 1).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from ds_cmli.cmli.contrastive import MAX_SCALE, MAX_SIGMOID_SCALE, contrastive_loss
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.base import Loss, log_scale
from ds_cmli.losses.functions import sigmoid_loss
from ds_cmli.losses.inputs import PairInputs
from ds_cmli.models.dual import Start

LogSumExps = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


class Contrastive(Loss):
    def logsumexps(self, inputs: PairInputs) -> LogSumExps:
        """The sums over rows and over columns, as `contrastive_loss` takes them."""
        if self.config.captions == "each":
            return partial(sums_of_each, inputs), inputs.column_logsumexp
        return inputs.row_logsumexp, inputs.column_logsumexp

    def contrast(self, inputs: PairInputs, s_i2t: Tensor, s_t2i: Tensor) -> Tensor:
        """The loss of scores, [R, T] each. Collective."""
        ignore, left_out = inputs.duplicates, inputs.left_out  # collectives
        if left_out is not None:
            ignore = left_out if ignore is None else ignore | left_out
        logsumexps = self.logsumexps(inputs)
        return contrastive_loss(
            s_i2t, s_t2i, self.logit_scale, inputs.own, *logsumexps, ignore
        )  # collective


def sums_of_each(inputs: PairInputs, logits: Tensor) -> Tensor:
    """log(sum(exp)) of each row over the k-th texts of all images, for each k: [R, T] -> [R, K].

    The K contrasts of DreamLIP (Zheng et al., 2024).
    """
    return torch.stack(list(map(inputs.row_logsumexp, inputs.own.of_each(logits))), 1)


class GlobalContrastive(Contrastive):
    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.logit_scale = log_scale(config.init_temperature)

    def start_from(self, start: Start) -> None:
        self.logit_scale.data.fill_(start.log_scale)

    def forward(self, inputs: PairInputs) -> Tensor:
        scores = inputs.global_scores  # [R, T], collective
        return self.contrast(inputs, scores, scores)  # collective


class AllPairsCMLI(Contrastive):
    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.logit_scale = log_scale(config.cmli_init_temperature)

    def forward(self, inputs: PairInputs) -> Tensor:
        scores = inputs.cmli_scores  # [R, T] each, collective
        return inputs.with_units(self.contrast(inputs, *scores), self.logit_scale)  # collective


class GlobalSigmoid(Loss):
    # SigLIP's initial values: a scale of 10, and a bias with which the many negatives start with a
    # small loss.
    init_temperature, init_bias = 0.1, -10.0
    sums = False
    max_scale = MAX_SIGMOID_SCALE

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.logit_scale = log_scale(self.init_temperature)
        self.given_bias = config.init_bias
        bias = self.init_bias if self.given_bias is None else self.given_bias
        self.logit_bias = nn.Parameter(torch.tensor([bias]))

    def of_scores(self, inputs: PairInputs, scores: Tensor) -> Tensor:
        """The loss of scores [R, T]. Collective."""
        positives = inputs.duplicates  # collective
        scale, bias, most = self.logit_scale, self.logit_bias, self.max_scale
        ignore = inputs.left_out  # collective
        return sigmoid_loss(scores, scale, bias, inputs.own, positives, most, ignore)

    def start_from(self, start: Start) -> None:
        self.logit_scale.data.fill_(start.log_scale)
        if start.bias is not None and self.given_bias is None:
            self.logit_bias.data.fill_(start.bias)

    def forward(self, inputs: PairInputs) -> Tensor:
        return self.of_scores(inputs, inputs.global_scores)  # collectives


class CMLISigmoid(GlobalSigmoid):
    """The mean over both directions."""

    # A CMLI score is a mean of maxima: it varies less than a cosine and is above 0 for almost any
    # pair. A larger scale and a lower bias than SigLIP's make the negatives of an untrained student
    # start near SigLIP's logit of -10.
    init_temperature, init_bias = 0.02, -14.0
    max_scale = MAX_SCALE

    def start_from(self, start: Start) -> None:
        """Its scores are no cosines of class tokens: it starts as without a source."""

    def forward(self, inputs: PairInputs) -> Tensor:
        s_i2t, s_t2i = inputs.cmli_scores  # collective
        both = self.of_scores(inputs, s_i2t) + self.of_scores(inputs, s_t2i)  # collective
        return inputs.with_units(both / 2, self.logit_scale)
