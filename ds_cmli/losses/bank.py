"""A bank of frozen teacher features as further negatives, and the losses that have one.

MoCo's queue (He et al., 2020), without its momentum encoder: the teacher never changes, so no entry
grows old. Shapes: B pairs per rank, P ranks, G = B * P, N patches, K entries, H_t teacher width.
"""

import torch
from torch import Tensor, nn

from ds_cmli.cmli import collectives
from ds_cmli.cmli.contrastive import temperature_scale
from ds_cmli.config.schema import LossConfig
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses.base import Loss, LossInputs, log_scale
from ds_cmli.losses.negatives import Candidates, Compared, contrast_loss


class Bank(nn.Module):
    """The last K features that entered, first in, first out, and equal on all ranks.

    Its buffers are in no state dict, and so in no exported student: checkpoints have a file of
    their own for it.
    """

    features: Tensor  # [K, H_t]
    picture_id: Tensor  # int64 [K]
    entered: Tensor  # int64: how many have ever entered; entry number e lies at place e % K

    def __init__(self, entries: int, width: int):
        super().__init__()
        for name, buffer in (
            ("features", torch.zeros(entries, width)),
            ("picture_id", torch.zeros(entries, dtype=torch.int64)),
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
        """Keep a global micro-batch, [G, H_t] or [G, N, H_t] and int64 [G], until `enter`.

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
            queries, targets: [B, M, H_t].
            teacher: [B, H_t] or [B, N, H_t], this rank's features, which all ranks compare with.

        Returns:
            [B, M]. Collective.
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
        B, M, _ = queries.shape
        own = ids[distributed.rank() * B :][:B].repeat_interleave(M)  # [B * M]
        compared = Compared(own, candidates, self.config.cmli_scratch_bytes)
        scale = temperature_scale(self.logit_scale)
        flat = queries.flatten(0, 1), targets.flatten(0, 1)
        return contrast_loss(*flat, scale, compared).view(B, M)
