"""CMLI as a contrastive loss over every pair of the global batch, as a module for any PyTorch
project.

Shapes: B pairs per rank, P ranks, G = B * P, N image patches, M text positions, D embedding
    dimension.
"""

import copy
import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from typing_extensions import TypedDict, Unpack

from ds_cmli.cmli import collectives
from ds_cmli.cmli.contrastive import MAX_SCALE, contrastive_loss, unit_rows
from ds_cmli.cmli.cut import Cut, as_loss, check_cut
from ds_cmli.cmli.inputs import DTYPES, accepted, boolean
from ds_cmli.cmli.ring import DEFAULT_SCORER, Scorer, ring_scores

Arguments = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]  # of `CMLILoss.forward`


def l2_normalize(x: Tensor) -> Tensor:
    """`unit_rows`, computed in fp32 (fp64 for fp64) and returned in x's dtype."""
    return unit_rows(x).to(x.dtype)


def score_global_batch(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    image_mask: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    score: Callable[..., tuple[Tensor, Tensor]] = DEFAULT_SCORER,
) -> tuple[Tensor, Tensor]:
    """s_i2t and s_t2i [B, G] of this rank's images and the texts of all ranks; arguments as
    `CMLILoss`. Collective."""
    text, token_mask = collectives.pad_text(l2_normalize(text), token_mask, group)  # collective
    if isinstance(score, Scorer) and score.goes_round(text, group):
        return ring_scores(
            l2_normalize(image), text, token_mask, image_mask, group=group, score=score
        )  # collective
    all_text, all_mask = collectives.gather_text(text, token_mask, group)  # collective
    return score(l2_normalize(image), all_text, all_mask, image_mask)


class ScorerOptions(TypedDict, total=False):
    """The options of `cmli.ring.Scorer`."""

    backend: str
    scratch_bytes: int
    recompute: bool
    exchange: str
    gather_bytes: int


class CMLILoss(nn.Module):
    """FILIP's cross-modal late interaction (Yao et al., 2021; (1) to (4)) over all pairs, with its
    temperature.

    Where a process group is initialised the batch is that of all its ranks: text features travel,
    each rank scores its own images against all texts, and the softmax over images needs only
    vectors of length G. The mean over the ranks' losses is the loss of the global batch, and
    averaging gradients over ranks (as DistributedDataParallel and DeepSpeed do) gives its gradient,
    for the features and for `logit_scale`.

    Args:
        init_temperature: the temperature at the start, at least 0.01; `logit_scale` is
            ln(1/temperature), learned, and its exponential at most 100. A mean of maxima spreads
            less than a cosine: sharper than the usual 0.07.
        group: the process group; None: the default one. A copy shares it; a pickle cannot hold it.
        cut: the largest sum of softmax weights that each row and each column of the scores may
            leave out in backward, from 0 (nothing) to below 1, see `cmli.cut`. The loss and the
            gradient of `logit_scale` stay exact; after backward `cut.found` holds the share of
            pairs that were kept, and a bound on the error.
        backend, scratch_bytes, recompute: see `cmli_scores`.
        exchange, gather_bytes: how texts come to other ranks, see `cmli.ring.Scorer`.
    """

    def __init__(
        self,
        init_temperature: float = 0.02,
        group: dist.ProcessGroup | None = None,
        cut: float = 0.0,
        **options: Unpack[ScorerOptions],
    ):
        super().__init__()
        number = init_temperature if isinstance(init_temperature, float | int) else math.nan
        if not 1 / MAX_SCALE <= number < math.inf:
            raise ValueError(
                f"init_temperature is {init_temperature!r}: give a number of at least "
                f"{1 / MAX_SCALE}, for instance 0.02"
            )
        self.group = group
        check_cut(cut)
        self.score = Scorer(**options)
        self.cut = Cut(cut, group) if cut else None
        # One element, not zero dimensions: DeepSpeed sends parameters as bytes, which a 0-dim
        # tensor has no view of.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / init_temperature)]))

    def __deepcopy__(self, memo: dict) -> "CMLILoss":
        copied = type(self).__new__(type(self))
        memo[id(self)], memo[id(self.group)] = copied, self.group
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

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
            text: [B, M, D], token features, likewise; the same dtype (fp64, fp32, bf16 or fp16) and
                device. M may differ between ranks, B may not. Under autocast the dtypes may differ,
                the wider one is taken.
            token_mask: bool [B, M], True = valid. Leave out class, separator and padding tokens.
                Integers 0 and 1 are taken too, here and below, at a CPU-GPU sync for their values.
            image_mask: bool [B, N], True = valid; None: all are.
            ignore: bool [B, G], True: this text is no negative of this image, as other captions of
                the same picture; see `losses.functions.duplicates`. What it says of an image's own
                text does not matter.

        Raises:
            ValueError, TypeError: on shapes, dtypes, devices or masks that do not fit; on every
                rank where one rank has such a mistake, or the ranks' batches differ in size or
                dtype.
        """
        arguments = image, text, token_mask, image_mask, ignore
        if collectives.world_size(self.group) > 1:
            arguments = self._checked_together(arguments)  # collective
        else:
            arguments = self._checked(arguments)
        s_i2t, s_t2i = score_global_batch(*arguments[:4], self.group, self.score)  # collective
        ignore = arguments[4]
        first = collectives.rank(self.group) * len(image)
        if ignore is not None:
            ignore = ignore.clone()
            ignore.diagonal(first).fill_(False)
        units = None
        if self.cut is not None:
            s_i2t, s_t2i, units = self.cut.apply(s_i2t, s_t2i, first)  # collective in backward
        columns = partial(collectives.column_logsumexp, group=self.group)
        loss = contrastive_loss(
            s_i2t, s_t2i, self.logit_scale, first, column_logsumexp=columns, ignore=ignore
        )
        return loss if units is None else loss + as_loss(units, self.logit_scale, len(image))

    def _checked(self, arguments: Arguments) -> Arguments:
        image, text, token_mask, image_mask = accepted(*arguments[:4])[:4]
        ignore = None if arguments[4] is None else boolean("ignore", arguments[4])
        _check_pairs(image, text, ignore, collectives.world_size(self.group))
        device = self.logit_scale.device
        if device != image.device:
            raise ValueError(
                f"CMLILoss is on {device} and image on {image.device}: move the loss, by .to()"
            )
        return image, text, token_mask, image_mask, ignore

    def _checked_together(self, arguments: Arguments) -> Arguments:
        """`_checked` on every rank, with what must be equal on them. Collective, CPU-GPU sync."""
        checked, mistake = None, None
        try:
            checked = self._checked(arguments)
        except (TypeError, ValueError) as error:
            mistake = error
        # NCCL sends from GPUs alone, and what is wrong may be where the inputs are.
        device = "cuda" if dist.get_backend(self.group) == "nccl" else self.logit_scale.device
        scale = self.logit_scale.detach().to(device, torch.float32)
        dtype = scale.new_tensor([DTYPES.index(checked[0].dtype) if checked else -1])
        facts = collectives.agreed(torch.cat([scale, dtype]), mistake, self.group)  # collective
        assert checked is not None, "a mistake has been raised"
        scales, dtypes = facts.t().tolist()
        if len(set(dtypes)) > 1:
            names = ", ".join(str(DTYPES[int(n)]) for n in dtypes)
            raise ValueError(f"the ranks' features must agree in dtype, found {names}")
        if len({str(x) for x in scales}) > 1:
            warnings.warn(
                "CMLILoss's logit_scale differs between ranks: "
                "wrap the loss in DistributedDataParallel together with the model, "
                "or average its gradient over ranks",
                stacklevel=5,
            )
        return checked


def _check_pairs(image: Tensor, text: Tensor, ignore: Tensor | None, ranks: int) -> None:
    """Raise ValueError or TypeError unless these are B pairs and `ignore` bool [B, B * ranks]."""
    if ranks < 1:
        raise ValueError("this process is not in the process group given to the loss as `group`")
    if len(image) != len(text):
        raise ValueError(
            f"image has {len(image)} rows and text has {len(text)}: row b of both must be a pair; "
            "cmli_scores compares other numbers of them"
        )
    if ignore is None:
        return
    expected = [len(image), ranks * len(image)]
    if not isinstance(ignore, Tensor) or ignore.dtype != torch.bool:
        kind = ignore.dtype if isinstance(ignore, Tensor) else type(ignore).__name__
        raise TypeError(f"ignore must be a tensor of bool, or of integers 0 and 1, not {kind}")
    if list(ignore.shape) != expected:
        raise ValueError(
            f"ignore has shape {list(ignore.shape)}; it must be {expected}, "
            "images against the texts of all ranks"
        )
    if ignore.device != image.device:
        raise ValueError(
            f"ignore is on {ignore.device} and image on {image.device}: move them together"
        )
