"""FLAIR's text-conditioned sigmoid loss (Xiao et al., 2025, arXiv 2412.03561).

The paper adds the sigmoid loss of class tokens, `global_sigmoid`, and takes the mean of both.
"""

from torch import Tensor

from ds_cmli.cmli.contrastive import MAX_SCALE
from ds_cmli.cmli.pooling import TextConditionedPooling
from ds_cmli.losses.inputs import PairInputs
from ds_cmli.losses.over_pairs import GlobalSigmoid
from ds_cmli.models.dual import Start


class Flair(GlobalSigmoid):
    init_temperature = 0.07  # this, the bias and the maximum are those of the authors' code
    max_scale = MAX_SCALE
    pooling: TextConditionedPooling

    def between(self, width: int, embed_dim: int) -> None:
        self.pooling = TextConditionedPooling(width, embed_dim)

    def start_from(self, start: Start) -> None:
        """Its scores are no cosines of class tokens: it starts as without a source."""

    def forward(self, inputs: PairInputs) -> Tensor:
        return self.of_scores(inputs, inputs.flair_scores(self.pooling))  # collectives
