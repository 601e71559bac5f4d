"""Losses over every pair of the global batch, for any PyTorch project.

A pair consists of two sequences, compared by CMLI, or of two vectors, compared by their cosine.

Shapes: B pairs per rank, N patches, M text positions, D features, K ids of a pair.
"""

import math

import torch
from torch import Tensor, nn

from .op import check_backend
from .pair_function import PairFunction
from .sides import Sides, checked_sides, same_dtype, score_dtype, upcast

MAX_SCALE = 100.0  # the maximum of 1/temperature, as in CLIP (Radford et al., 2021)
MAX_SIGMOID_SCALE = 1000.0  # on cosines: SigLIP has no maximum, and its models have learned 120
SCRATCH_BYTES = 2**27


class Temperature(nn.Module):
    """The learned scale of a loss, 1/temperature, and the bias of a sigmoid loss.

    The parameter `logit_scale` is the logarithm of the scale. The scale is limited to `max_scale`,
    straight-through: above the limit the value is constant but the gradient still passes, so a
    parameter that drifted over the limit can return.

    This is a module of its own because ZeRO-3 gathers parameters where their module is called.
    """

    def __init__(self, init: float, bias: float | None = None, max_scale: float = MAX_SCALE):
        super().__init__()
        if not 1 / max_scale <= init < math.inf:
            raise ValueError(
                f"the temperature at the start is {init}: give at least {1 / max_scale}"
            )
        self.max_scale = max_scale
        # Parameters have one element, not zero dimensions: DeepSpeed views them as bytes, and a
        # 0-dim tensor has no such view.
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(init)]))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def forward(self) -> Tensor:
        """Return the scale [1], or the scale and the bias [2], in fp32 (fp64 for fp64)."""
        x = upcast(self.logit_scale)
        clamped = x.clamp(max=math.log(self.max_scale))
        scale = (x + (clamped - x).detach()).exp()
        if self.logit_bias is None:
            return scale
        return torch.cat([scale, upcast(self.logit_bias)])


class PairLoss(nn.Module):
    """A contrastive or sigmoid loss over all pairs, with its learned temperature.

    The contrastive loss is that of CLIP (Radford et al., 2021), with t = 1/temperature:
    (CE(rows of t * s_i2t) + CE(columns of t * s_t2i)) / 2. With a bias, it is the sigmoid loss of
    SigLIP (Zhai et al., 2023, equation 1): the mean over both directions, summed over the texts of
    an image and averaged over images.

    If a process group is initialised, the batch is that of all its ranks: texts travel, and each
    rank scores its own images against all of them. The mean over the ranks' losses is the loss of
    the global batch. Averaging gradients over ranks, as DistributedDataParallel and DeepSpeed do,
    gives the gradient of that loss for the features and for the temperature.

    Args:
        init_temperature: the temperature at the start, at least 1 / `max_scale`.
        init_bias: the bias of the sigmoid loss at the start; None selects the contrastive loss.
        backend: see `cmli_scores`.
        scratch_bytes: memory for what forward saves for backward, G * (N + M + 8) bytes per image
            for G pairs of all ranks. Backward computes again what does not fit. On a GPU it also
            limits the memory for a block of images.
    """

    def __init__(
        self,
        init_temperature: float = 0.07,
        init_bias: float | None = None,
        max_scale: float = MAX_SCALE,
        backend: str = "auto",
        scratch_bytes: int = SCRATCH_BYTES,
    ):
        super().__init__()
        check_backend(backend)
        self.temperature = Temperature(init_temperature, init_bias, max_scale)
        self.backend = backend
        self.scratch_bytes = scratch_bytes
        # Other pairs' texts that were not negatives in the last call, counted per image.
        self.num_duplicates = nn.Buffer(torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        token_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
        ids: Tensor | None = None,
        scale_and_bias: Tensor | None = None,
    ) -> Tensor:
        """Return the mean loss of this rank's B pairs, a scalar in fp32 (fp64 for fp64).

        Collective. Raises ValueError if an argument does not fit, and on every rank if the ranks
        differ in their number of pairs.

        Args:
            image: [B, N, D] patches, compared by CMLI, or [B, D], compared by cosines. The loss
                normalizes features in fp32, so they need not be normalized.
            text: [B, M, D] tokens or [B, D], of the same dtype and device. Ranks may differ in M.
            token_mask: bool [B, M], True = valid. Leave out class, separator and padding tokens.
            patch_mask: bool [B, N], True = valid; None: all patches are valid.
            ids: int64 [B, K], such as hashes of the picture and of the caption. Pairs that share
                an id are not negatives of each other; in the sigmoid loss they are positives.
            scale_and_bias: the result of an earlier call of `temperature`; None calls it.
        """
        if token_mask is not None:
            sides = checked_sides(Sides(image, text, token_mask, patch_mask))
            image = sides.image
            text = sides.text
        elif image.ndim != 2 or text.ndim != 2 or image.shape[1] != text.shape[1]:
            shapes = f"{list(image.shape)} and {list(text.shape)}"
            raise ValueError(f"image and text must be [B, D], or have a token_mask, not {shapes}")
        elif patch_mask is not None:
            raise ValueError("patch_mask is given without a token_mask: vectors have no patches")
        else:
            image, text = same_dtype(image, text)
        ids_fit = ids is None or (ids.ndim == 2 and len(ids) == len(image))
        if not ids_fit or len(image) != len(text):
            sizes = len(image), len(text), None if ids is None else list(ids.shape)
            raise ValueError(f"image, text and ids must have a row for each pair, not {sizes}")
        if scale_and_bias is None:
            scale_and_bias = self.temperature()
        scale_and_bias = scale_and_bias.to(score_dtype(image))
        tensors = image, text, scale_and_bias, token_mask, patch_mask, ids
        loss, num_duplicates = PairFunction.apply(*tensors, self.backend, self.scratch_bytes)
        self.num_duplicates.copy_(num_duplicates)
        return loss


class CMLILoss(PairLoss):
    """The loss of FILIP (Yao et al., 2021; equations 1 to 4), cross-modal late interaction.

    It is a `PairLoss` that starts at temperature 0.02, because means of maxima spread less than
    cosines. Of equal similarities, the one of the lowest index gets the gradient of the maximum.
    """

    def __init__(self, init_temperature: float = 0.02, **options):
        super().__init__(init_temperature, **options)
