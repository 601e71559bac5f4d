"""Patches and tokens of earlier pairs as further negatives of the all-pairs CMLI loss.

Shapes: B pairs per rank, P ranks, G = B * P, K entries, N patches, M text positions, D embedding
dimension.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli import collectives
from ds_cmli.cmli.contrastive import temperature_scale, upcast
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.losses.bank import Bank
from ds_cmli.losses.base import LossInputs


class Earlier(NamedTuple):
    """The entries of a queue. Those that no pair has entered have no valid token."""

    patches: Tensor  # [K, N, D]
    tokens: Tensor  # [K, M, D]
    patch_mask: Tensor  # bool [K, N]
    token_mask: Tensor  # bool [K, M]


class TokenQueue(Bank):
    """The projected patches and tokens of the last K pairs, of unit length, as they entered.

    A patch or token that is not valid is zero. Memory: K * (N + M) * D elements.
    """

    def __init__(self, pairs: int, patches: int, positions: int, dim: int):
        super().__init__(pairs, patches * dim, (2,))
        self.tokens = Bank(pairs, positions * dim)
        self.positions, self.dim = positions, dim

    def entries(self) -> Earlier:
        both = self.features, self.tokens.features
        patches, tokens = (x.unflatten(1, (-1, self.dim)) for x in both)
        return Earlier(patches, tokens, patches.any(2), tokens.any(2))

    def enter(self) -> None:
        super().enter()
        self.tokens.enter()

    def of_earlier(
        self, inputs: LossInputs, logit_scale: Tensor, by_id: bool
    ) -> tuple[Tensor, Tensor]:
        """log(sum(exp)) of this rank's images over earlier texts, and of its texts over images.

        As `PairQueue.of_earlier`, of scores s_i2t and s_t2i. In training it is collective.
        """
        batch, earlier = inputs.batch, self.entries()
        patches, tokens = map(l2_normalize, inputs.projected)
        patch_mask = inputs.features.patch_mask
        s_i2t, _ = inputs.score(patches, earlier.tokens, earlier.token_mask, patch_mask)  # [B, K]
        _, s_t2i = inputs.score(
            earlier.patches, tokens, batch.token_mask, earlier.patch_mask
        )  # [K, B]
        queue = self.candidates(by_id)
        excluded = (batch.pair_id[:, None] == queue.ids).any(2)  # [B, K]
        if queue.valid is not None:
            excluded |= ~queue.valid
        scale = temperature_scale(logit_scale)
        found = [_log_sum_exp(scale * scores, excluded) for scores in (s_i2t, s_t2i.t())]
        if self.training:
            if patch_mask is not None:
                patches = patches * patch_mask[:, :, None]
            tokens = tokens * batch.token_mask[:, :, None]
            tokens = F.pad(tokens, (0, 0, 0, self.positions - tokens.shape[1]))
            pair_id = collectives.gather(batch.pair_id)  # collective
            self.offer(self.everywhere(patches), pair_id)  # collective
            self.tokens.offer(self.everywhere(tokens), pair_id[:, 0])  # collective
        return found[0], found[1]


def _log_sum_exp(logits: Tensor, excluded: Tensor) -> Tensor:
    """log(sum(exp)) of each row, -inf where all are excluded: [B, K], bool [B, K] -> [B]."""
    empty = excluded.all(1)
    # A row of -inf alone would have NaN as gradient.
    logits = upcast(logits).masked_fill(excluded & ~empty[:, None], -torch.inf)
    return logits.logsumexp(1).masked_fill(empty, -torch.inf)
