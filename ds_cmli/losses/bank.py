"""Banks of earlier features as further negatives, and the losses on the teacher that have one.

They are MoCo's queue (He et al., 2020) without its momentum encoder. Features of the frozen teacher
do not grow old; those of the student do. Shapes: B pairs per rank, P ranks, G = B * P, N patches, K
entries, M text positions, D embedding dimension, H student width, H_t teacher width.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ds_cmli.cmli import collectives
from ds_cmli.cmli.contrastive import temperature_scale, upcast
from ds_cmli.cmli.inputs import full_precision
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.config.schema import LossConfig
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses.base import Loss, log_scale
from ds_cmli.losses.inputs import LossInputs
from ds_cmli.losses.negatives import Candidates, Compared, contrast_loss, log_sum_exp

SCRATCH_BYTES = 2**26  # limit of a tile of the products with a queue


class Bank(nn.Module):
    """The last K features that entered, first in, first out, and equal on all ranks.

    Its buffers are in no state dict, and so in no exported student: checkpoints have a file of
    their own for it.
    """

    features: Tensor  # [K, width]
    picture_id: Tensor  # int64 [K, *ids]
    entered: Tensor  # int64: how many have ever entered; entry number e lies at place e % K

    def __init__(self, entries: int, width: int, ids: tuple[int, ...] = ()):
        super().__init__()
        for name, buffer in (
            ("features", torch.zeros(entries, width)),
            ("picture_id", torch.zeros(entries, *ids, dtype=torch.int64)),
            ("entered", torch.zeros((), dtype=torch.int64)),
        ):
            self.register_buffer(name, buffer, persistent=False)
        self.waiting: tuple[Tensor, Tensor] | None = None

    def candidates(self, by_picture: bool) -> Candidates:
        """The entries as negatives; `by_picture`: not of queries of the same picture."""
        places = torch.arange(len(self.features), device=self.entered.device)
        # In the other case a query's id is its place in the batch, at least 0.
        ids = self.picture_id if by_picture else torch.full_like(self.picture_id, -1)
        return Candidates(self.features, ids, places < self.entered)

    @torch.no_grad()
    def offer(self, features: Tensor, picture_id: Tensor) -> None:
        """Keep a global micro-batch, [G, width] or [G, N, width] and its ids, until `enter`.

        Of patches, entry number e is its image's patch e % N, so that places change with the steps.
        """
        if features.dim() == 3:
            G, N, _ = features.shape
            image = torch.arange(G, device=features.device)
            features = features[image, (self.entered + image) % N]
        self.waiting = features, picture_id

    @torch.no_grad()
    def enter(self) -> None:
        """Put what was offered into the bank, after the backward pass that has used the bank."""
        if self.waiting is None:
            return
        features, picture_id = self.waiting
        K, G = len(self.features), len(features)
        numbers = torch.arange(max(0, G - K), G, device=self.entered.device)
        places = (self.entered + numbers) % K
        self.features.index_copy_(0, places, features[-K:].to(self.features.dtype))
        self.picture_id.index_copy_(0, places, picture_id[-K:])
        self.entered += G
        self.waiting = None

    def everywhere(self, features: Tensor) -> Tensor:
        """This rank's features, [B, ...], as entries of all ranks, [G, width]. Collective."""
        # Features of a step that is skipped must not spoil those after it.
        flat = features.detach().flatten(1).nan_to_num(0.0)
        return collectives.gather(flat.to(self.features.dtype))  # collective


class PairQueue(Bank):
    """The class tokens of the last K pairs, as the student gave them when they entered.

    An entry has the image's and then the text's, and the hashes of picture and caption. Cross-batch
    memory (Wang et al., 2020), on both sides as in ContAccum (Kim et al., 2024).
    """

    def __init__(self, pairs: int, width: int):
        super().__init__(pairs, 2 * width, (2,))

    def of_earlier(
        self, inputs: LossInputs, logit_scale: Tensor, by_id: bool
    ) -> tuple[Tensor, Tensor]:
        """log(sum(exp)) of this rank's images over earlier texts, and of its texts over images.

        [B] fp32 (fp64) each, -inf without any. `by_id`: pairs of the same picture or caption are no
        negatives. In training the micro-batch is offered, which is collective.
        """
        features, pair_id = inputs.features, inputs.batch.pair_id
        image, text = (upcast(l2_normalize(x)) for x in (features.image_cls, features.text_cls))
        queue, H = self.candidates(by_id), image.shape[1]
        sums = []
        for own, others in ((image, queue.features[:, H:]), (text, queue.features[:, :H])):
            compared = Compared(pair_id, [replace(queue, features=others)], SCRATCH_BYTES)
            with full_precision(own.device):
                scaled = own * temperature_scale(logit_scale)
            sums.append(log_sum_exp(scaled, compared))
        if self.training:
            both = self.everywhere(torch.cat([image, text], 1))  # [G, 2 * H], collective
            self.offer(both, collectives.gather(pair_id))  # collective
        of_images, of_texts = sums
        return of_images, of_texts


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
        sums = [_log_sum_exp(scale * scores, excluded) for scores in (s_i2t, s_t2i.t())]
        if self.training:
            if patch_mask is not None:
                patches = patches * patch_mask[:, :, None]
            tokens = tokens * batch.token_mask[:, :, None]
            tokens = F.pad(tokens, (0, 0, 0, self.positions - tokens.shape[1]))
            pair_id = collectives.gather(batch.pair_id)  # collective
            self.offer(self.everywhere(patches), pair_id)  # collective
            self.tokens.offer(self.everywhere(tokens), pair_id[:, 0])  # collective
        return sums[0], sums[1]


def _log_sum_exp(logits: Tensor, excluded: Tensor) -> Tensor:
    """log(sum(exp)) of each row, -inf where all are excluded: [B, K], bool [B, K] -> [B]."""
    empty = excluded.all(1)
    # A row of -inf alone would have NaN as gradient.
    logits = upcast(logits).masked_fill(excluded & ~empty[:, None], -torch.inf)
    return logits.logsumexp(1).masked_fill(empty, -torch.inf)


class AgainstTeacher(Loss):
    """A loss whose negatives are the teacher's features of other images, and those of a bank."""

    # That of the global loss, whose scores are cosines of as wide features.
    init_temperature = 0.07

    def __init__(self, config: LossConfig):
        super().__init__(config)
        self.logit_scale = log_scale(self.init_temperature)
        self.bank: Bank | None = None

    def fit(self, patches: int, teacher_width: int | None) -> None:
        super().fit(patches, teacher_width)
        if self.config.bank and teacher_width is not None:
            self.bank = Bank(self.config.bank, teacher_width)

    def contrast(
        self, inputs: LossInputs, queries: Tensor, targets: Tensor, teacher: Tensor
    ) -> Tensor:
        """`contrast_loss` of each position of this rank's pairs.

        Args:
            queries, targets: [C, M, H_t], a number of rows for each image.
            teacher: [B, H_t] or [B, N, H_t], this rank's features, which all ranks compare with.

        Returns:
            [C, M]. Collective.
        """
        everywhere = collectives.gather(teacher)  # [G, H_t] or [G, N, H_t], collective
        picture_id = collectives.gather(inputs.batch.pair_id)[:, 0]  # [G], collective
        ids, by_picture = picture_id, self.config.duplicates == "mask"
        if not by_picture:  # an image's own features are no negatives of it in any case
            ids = torch.arange(len(ids), device=ids.device)
        of_each = ids if teacher.dim() == 2 else ids.repeat_interleave(teacher.shape[1])
        candidates = [Candidates(everywhere.flatten(0, -2), of_each)]
        if self.bank is not None:
            candidates.append(self.bank.candidates(by_picture))
            if self.training:
                self.bank.offer(everywhere, picture_id)
        B, (C, M, _) = len(teacher), queries.shape
        own = ids[distributed.rank() * B :][:B].repeat_interleave(C * M // B)  # [C * M]
        compared = Compared(own, candidates, self.config.cmli_scratch_bytes)
        scale = temperature_scale(self.logit_scale)
        flat = queries.flatten(0, 1), targets.flatten(0, 1)
        return contrast_loss(*flat, scale, compared).view(C, M)
