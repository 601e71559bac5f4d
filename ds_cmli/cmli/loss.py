"""CMLI as a contrastive loss over every pair of the global batch, as a module for any PyTorch project.

Shapes: B pairs per rank, P ranks, G = B * P, N image patches, M text positions, D embedding dimension.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ds_cmli.cmli.contrastive import contrastive_loss, upcast
from ds_cmli.cmli.op import DEFAULT_SCRATCH_BYTES
from ds_cmli.cmli.ring import DEFAULT_GATHER_BYTES, DEFAULT_SCORER, Scorer, ring_scores
from ds_cmli.distributed import collectives
from ds_cmli.distributed import process_group as distributed


def l2_normalize(x: Tensor) -> Tensor:
    """Unit length over the last dimension, computed in fp32 (fp64 for fp64) and returned in x's dtype."""
    return F.normalize(upcast(x), dim=-1).to(x.dtype)


def score_global_batch(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    image_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    score: Callable[..., tuple[Tensor, Tensor]] = DEFAULT_SCORER,
) -> tuple[Tensor, Tensor]:
    """s_i2t and s_t2i [B, G] of this rank's images and the texts of all ranks; arguments as `CMLILoss`. Collective."""
    text, token_mask = collectives.pad_text(l2_normalize(text), token_mask, group)  # collective
    if isinstance(score, Scorer) and score.goes_round(text, group):
        return ring_scores(l2_normalize(image), text, token_mask, image_mask, group=group, score=score)  # collective
    all_text, all_mask = collectives.gather_text(text, token_mask, group)  # collective
    return score(l2_normalize(image), all_text, all_mask, image_mask)


class CMLILoss(nn.Module):
    """FILIP's cross-modal late interaction (Yao et al., 2021; (1) to (4)) over all pairs, with its temperature.

    Where a process group is initialised the batch is that of all its ranks: text features travel, each rank scores
    its own images against all texts, and the softmax over images needs only vectors of length G. The mean over the
    ranks' losses is the loss of the global batch, and averaging gradients over ranks (as DistributedDataParallel and
    DeepSpeed do) gives its gradient, for the features and for `logit_scale`.

    Args:
        init_temperature: the temperature at the start; `logit_scale` is ln(1/temperature), learned, and its
            exponential at most 100. A mean of maxima spreads less than a cosine: sharper than the usual 0.07.
        group: the process group; None: the default one.
        backend, scratch_bytes, recompute: see `cmli_scores`.
        exchange, gather_bytes: how texts come to other ranks, see `cmli.ring.Scorer`.
    """

    def __init__(
        self,
        init_temperature: float = 0.02,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
        scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
        recompute: bool = False,
        exchange: str = "auto",
        gather_bytes: int = DEFAULT_GATHER_BYTES,
    ):
        super().__init__()
        if not init_temperature > 0:
            raise ValueError(f"init_temperature is {init_temperature}: give a positive number, for instance 0.02")
        self.group = group
        self.score = Scorer(backend, scratch_bytes, recompute, exchange, gather_bytes)
        # One element, not zero dimensions: DeepSpeed sends parameters as bytes, which a 0-dim tensor has no view of.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / init_temperature)]))

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        token_mask: Tensor,
        image_mask: Tensor | None = None,
        ignore: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of this rank's B pairs, a scalar in fp32 (fp64 for fp64).

        Args:
            image: [B, N, D], patch features, not normalised: that is done here, in fp32.
            text: [B, M, D], token features, likewise; the same dtype (fp64, fp32, bf16 or fp16) and device. M may
                differ between ranks, B may not.
            token_mask: bool [B, M], True = valid. Leave out class, separator and padding tokens.
            image_mask: bool [B, N], True = valid; None: all are.
            ignore: bool [B, G], True: this text is no negative of this image, though not its own, as other captions of
                the same picture; see `losses.functions.duplicates`.

        Raises:
            ValueError, TypeError: on shapes, dtypes, devices or masks that do not fit, and on every rank where the
                ranks' batches differ in size.
        """
        s_i2t, s_t2i = score_global_batch(image, text, token_mask, image_mask, self.group, self.score)  # collective
        first = distributed.rank(self.group) * image.shape[0]
        columns = partial(collectives.column_logsumexp, group=self.group)
        return contrastive_loss(s_i2t, s_t2i, self.logit_scale, first, column_logsumexp=columns, ignore=ignore)
