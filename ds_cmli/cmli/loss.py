"""Losses over every pair of the global batch, in closed form, for any PyTorch project.

The pairs are of sequences, compared by CMLI, or of vectors, compared by their cosine. Scores are
there for a block of this rank's images at a time, never for all pairs.

Shapes: B pairs per rank, P ranks, G = B * P, N patches, M text positions, D features.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import distributed, op
from .op import Implementation, Pair, Sides, full_precision, index_dtype, slices, upcast

MAX_SCALE = 100.0  # the maximum of 1/temperature, as in CLIP (Radford et al., 2021)
# Of a sigmoid loss on cosines: SigLIP's models have learned up to 120, without a maximum.
MAX_SIGMOID_SCALE = 1000.0
SCRATCH_BYTES = 2**27
CPU_BLOCK_BYTES = 16 * 2**20  # of a block of images on a CPU: larger ones leave the cache
# What a block takes beside argmax indices, in fp32: matrices of pairs, copies of patches.
PAIR_BYTES, PATCH_BYTES = 32, 16


def l2_normalize(x: Tensor) -> Tensor:
    """Unit length over the last dimension, computed in fp32 (fp64 for fp64), returned in x's dtype.

    A row of zeros, or shorter than 1e-12, has no direction: it gives zeros, and its gradient is 0,
    where that of `F.normalize` is divided by 1e-12.
    """
    return (upcast(x) / _lengths(x)).to(x.dtype)


def _lengths(x: Tensor) -> Tensor:
    return F.threshold(torch.linalg.vector_norm(upcast(x), dim=-1, keepdim=True), 1e-12, math.inf)


def _l2_normalize_backward(d_unit: Tensor, x: Tensor) -> Tensor:
    """The gradient of x [.., D], in place of that of its unit rows."""
    lengths = _lengths(x)
    unit = upcast(x) / lengths
    along = (unit * d_unit).sum(-1, keepdim=True)
    return d_unit.addcmul_(unit, along, value=-1).div_(lengths)


class Temperature(nn.Module):
    """1/temperature, learned as its logarithm `logit_scale`, at most `most`; and a bias, if any.

    A module of its own, as ZeRO-3 gathers parameters where their module is called. The clamp is
    straight-through: above the limit the value is constant but the gradient still passes, so a
    parameter that drifted over it can return.
    """

    def __init__(self, init: float, bias: float | None = None, most: float = MAX_SCALE):
        super().__init__()
        if not 1 / most <= init < math.inf:
            raise ValueError(f"the temperature at the start is {init}: give at least {1 / most}")
        self.most = most
        # One element, not zero dimensions: DeepSpeed sends parameters as bytes, which a 0-dim
        # tensor has no view of.
        self.logit_scale = nn.Parameter(torch.tensor([-math.log(init)]))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor([bias]))

    def forward(self) -> Tensor:
        """In fp32, [1], or with a bias [2]."""
        x = upcast(self.logit_scale)
        scale = (x + (x.clamp(max=math.log(self.most)) - x).detach()).exp()
        return scale if self.logit_bias is None else torch.cat([scale, upcast(self.logit_bias)])


class _Texts(NamedTuple):
    """Those of all ranks, and what of a rank's images is compared with them."""

    units: Tensor  # [G, M, D] or [G, D], normalised
    token_mask: Tensor | None  # bool [G, M]
    ids: Tensor | None  # int64 [G, K]
    patch_mask: Tensor | None  # bool [B, N]
    own_ids: Tensor | None  # [B, K]


class _Block:
    """The scores of a block of this rank's images with the texts of all ranks."""

    def __init__(self, image: Tensor, rows: slice, texts: _Texts, kernels: Implementation | None):
        self.rows, self.kernels, self.text = rows, kernels, texts.units
        self.image = l2_normalize(image[rows]).to(self.text.dtype)
        self.sides: Sides | None = None  # of vectors
        if texts.token_mask is not None:
            patch_mask = None if texts.patch_mask is None else texts.patch_mask[rows]
            self.sides = Sides(self.image, self.text, texts.token_mask, patch_mask)
        self.first = distributed.rank() * len(image) + rows.start  # the place of their own texts
        self.alike: Tensor | None = None  # bool [block, G], other pairs that share an id
        if texts.own_ids is not None and texts.ids is not None:
            own, shape = texts.own_ids[rows], (len(self.image), len(self.text))
            self.alike = torch.zeros(shape, dtype=torch.bool, device=own.device)
            for k in range(own.shape[1]):
                self.alike |= own[:, k, None] == texts.ids[:, k]
            self.own(self.alike).fill_(False)

    def own(self, matrix: Tensor) -> Tensor:
        """The images' own pairs of a matrix [block, G], a view."""
        return matrix.diagonal(self.first)

    def scores(self, keep: bool) -> tuple[Pair, Pair | None]:
        if self.sides is not None and self.kernels is not None:
            return op.cmli_forward(self.kernels, self.sides, keep)
        with full_precision(self.image.device):
            cosines = upcast(self.image) @ upcast(self.text).t()
        return (cosines, cosines), None

    def add_gradients(self, grads: Pair, argmax: Pair | None, d_sides: Pair) -> None:
        if self.sides is not None and self.kernels is not None and argmax is not None:
            op.cmli_backward(self.kernels, self.sides, grads, argmax, d_sides)
            return
        with full_precision(self.image.device):
            both = grads[0] + grads[1]
            d_sides[0].addmm_(both, upcast(self.text))
            d_sides[1].addmm_(both.t(), upcast(self.image))

    def logits(self, scores: Tensor, scale: Tensor) -> Tensor:
        """Of the contrastive loss: -inf where a text is no negative."""
        logits = scores * scale
        return logits if self.alike is None else logits.masked_fill_(self.alike, -torch.inf)

    def signed(self, matrix: Tensor) -> Tensor:
        """-1 times a matrix, in place, but for pairs that are positives of the sigmoid loss."""
        matrix.neg_()
        self.own(matrix).neg_()
        return matrix if self.alike is None else torch.where(self.alike, -matrix, matrix)


class _PairLoss(torch.autograd.Function):
    """Both losses in closed form, collective: forward keeps log(sum(exp)) of rows and columns, and
    scores and argmax indices while they fit into the scratch; backward makes the others again."""

    @staticmethod
    def forward(ctx, image, text, learned, token_mask, patch_mask, ids, backend, scratch_bytes):
        B, G = len(image), len(image) * distributed.world_size()
        units, ctx.kernels = l2_normalize(text), None
        if token_mask is not None:
            ctx.kernels = op.implementation(Sides(image, text, token_mask, patch_mask), backend)
            units, token_mask = distributed.pad_to_longest(units, token_mask)
            token_mask = distributed.gather(token_mask)
        all_ids = None if ids is None else distributed.gather(ids)
        texts = _Texts(distributed.gather(units), token_mask, all_ids, patch_mask, ids)
        ctx.cpu = image.device.type == "cpu" and backend in ("auto", "cpu")
        ctx.size, pair_bytes = _sizes(image, texts.units, ctx.cpu, scratch_bytes)
        fitting = scratch_bytes // (G * pair_bytes)  # images whose scores and indices stay
        ctx.keep = fitting if any(ctx.needs_input_grad) else 0

        sigmoid, total = len(learned) == 2, learned.new_zeros(())
        over_texts, own = learned.new_empty(2, B), learned.new_empty(2, B)
        over_images = learned.new_full((G,), -torch.inf)
        alike, kept = torch.zeros((), dtype=torch.int64, device=image.device), list[Tensor]()
        for block in _blocks(ctx, image, texts):
            keep = block.rows.stop <= ctx.keep
            scores, argmax = block.scores(keep)
            if keep:
                kept += *scores, *(argmax or ())
            if block.alike is not None:
                alike += block.alike.sum()
            if sigmoid:
                for s in scores:
                    logits = block.signed(torch.addcmul(learned[1], s, learned[0]))
                    total += F.softplus(logits.neg_()).sum()
                continue
            of_texts, of_images = (block.logits(s, learned) for s in scores)
            own[0, block.rows], own[1, block.rows] = block.own(of_texts), block.own(of_images)
            over_texts[0, block.rows] = of_texts.logsumexp(1)
            over_images = torch.logaddexp(over_images, of_images.logsumexp(0))
        if not sigmoid:
            over_images = distributed.logsumexp_over_ranks(over_images)
            first = distributed.rank() * B
            over_texts[1] = over_images[first : first + B]
            total = (over_texts - own).sum()
        ctx.save_for_backward(image, text, learned, *texts, over_texts[0], over_images, *kept)
        ctx.mark_non_differentiable(alike)
        return total / (2 * B), alike

    @staticmethod
    def backward(ctx, grad, _):
        op.refuse_second_derivative()
        saved = ctx.saved_tensors  # once: checkpointing unpacks them only once
        image, text, learned = saved[:3]
        d_image, d_learned = torch.empty_like(image), torch.zeros_like(learned)
        d_texts = _add_gradients(ctx, grad, saved, d_image, d_learned)
        d_text = distributed.sum_to_owner(d_texts)
        del d_texts
        d_text = d_text if text.ndim == 2 else d_text[:, : text.shape[1]]
        for rows in slices(len(text), ctx.size):
            _l2_normalize_backward(d_text[rows], text[rows])
        return d_image, d_text.to(text.dtype).contiguous(), d_learned, *[None] * 5


def _add_gradients(ctx, grad, saved, d_image, d_learned):
    """Write the gradients of images, and of what is learned; returns that of all unit texts."""
    image, learned, kept, sigmoid = saved[0], saved[2], iter(saved[10:]), len(saved[2]) == 2
    texts = _Texts(*saved[3:8])
    d_texts = op.zero_gradient(texts.units)
    share = grad / (2 * len(image))  # what a weight of 1 is
    # A column belongs to the loss of the rank that owns its text.
    factors = share, distributed.gather(share.repeat(len(image)))
    for block in _blocks(ctx, image, texts):
        if block.rows.stop <= ctx.keep:
            scores = next(kept), next(kept)
            argmax = None if ctx.kernels is None else (next(kept), next(kept))
        else:
            scores, argmax = block.scores(True)
        grads = list[Tensor]()
        log_sums = saved[8][block.rows, None], saved[9]
        for s, log_sum, factor in zip(scores, log_sums, factors, strict=True):
            if sigmoid:
                logits = block.signed(torch.addcmul(learned[1], s, learned[0]))
                g = block.signed(logits.neg_().sigmoid_()).neg_().mul_(share)
                d_learned[1] += g.sum()
            else:
                g = block.logits(s, learned[0]).sub_(log_sum).exp_()  # the softmax weights
                block.own(g).sub_(1)
                g.mul_(factor)
            d_learned[0] += torch.dot(g.flatten(), s.flatten())
            grads.append(g.mul_(learned[0]))
        d_units = op.zero_gradient(block.image)
        block.add_gradients((grads[0], grads[1]), argmax, (d_units, d_texts))
        d_image[block.rows] = _l2_normalize_backward(d_units, image[block.rows])
    return d_texts


def _sizes(image: Tensor, texts: Tensor, cpu: bool, scratch_bytes: int) -> tuple[int, int]:
    """Images of a block, and bytes of the argmax indices and scores of a pair."""
    indices, copies, least = 0, PATCH_BYTES * image[0].numel(), 1
    if image.ndim == 3:
        (_, N, _), M = image.shape, texts.shape[1]
        indices = N * index_dtype(M).itemsize + M * index_dtype(N).itemsize
    if cpu:  # each thread takes an image at least
        scratch_bytes, least = CPU_BLOCK_BYTES, torch.get_num_threads()
    images = scratch_bytes // (len(texts) * (indices + PAIR_BYTES) + copies)
    return min(len(image), max(least, images)), indices + 8


def _blocks(ctx, image: Tensor, texts: _Texts) -> Iterator[_Block]:
    if ctx.cpu:  # once, as a CPU multiplies 16 bits no faster
        texts = texts._replace(units=upcast(texts.units))
    for rows in slices(len(image), ctx.size):
        yield _Block(image, rows, texts, ctx.kernels)


class PairLoss(nn.Module):
    """A contrastive or sigmoid loss over all pairs, with its learned temperature.

    Contrastive: (CE(rows of t * s_i2t) + CE(columns of t * s_t2i)) / 2, as in CLIP (Radford et al.,
    2021). With a bias: the sigmoid loss of SigLIP (Zhai et al., 2023, equation 1), the mean over
    both directions, summed over the texts of an image and averaged over images.

    Where a process group is initialised the batch is that of all its ranks: texts travel, each rank
    scores its own images against all of them. The mean over the ranks' losses is the loss of the
    global batch, and averaging gradients over ranks (as DistributedDataParallel and DeepSpeed do)
    gives its gradient, for the features and for the temperature.

    Args:
        init_temperature: at the start, at least 1 / `max_scale`.
        init_bias: of the sigmoid loss; None: the loss is contrastive.
        max_scale: the most that 1/temperature can be.
        backend: see `cmli_scores`.
        scratch_bytes: for scores and argmax indices, G * (N + M + 8) bytes an image, of which
            backward computes again what does not fit; on a GPU also for a block of images.
    """

    alike: Tensor

    def __init__(
        self,
        init_temperature: float = 0.07,
        init_bias: float | None = None,
        max_scale: float = MAX_SCALE,
        backend: str = "auto",
        scratch_bytes: int = SCRATCH_BYTES,
    ):
        super().__init__()
        self.temperature = Temperature(init_temperature, init_bias, max_scale)
        self.backend, self.scratch_bytes = backend, scratch_bytes
        # How many pairs shared an id in the last call.
        self.register_buffer("alike", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        token_mask: Tensor | None = None,
        patch_mask: Tensor | None = None,
        ids: Tensor | None = None,
        learned: Tensor | None = None,
    ) -> Tensor:
        """The mean loss of this rank's B pairs, a scalar in fp32 (fp64 for fp64). Collective.

        Raises ValueError if an argument does not fit, or the ranks' numbers of pairs differ.

        Args:
            image: [B, N, D] patches, compared by CMLI, or [B, D], by the cosine, which is made here
                in fp32: they need not be normalised.
            text: [B, M, D] tokens or [B, D], of the same dtype and device. Ranks may differ in M.
            token_mask: bool [B, M], True = valid. Leave out class, separator and padding tokens.
            patch_mask: bool [B, N]; None: all are valid.
            ids: int64 [B, K]. Pairs that share one, as the hash of their picture or of their
                caption, are no negatives of each other; in the sigmoid loss they are positives.
            learned: what `temperature` has returned, in its place.
        """
        if token_mask is not None:
            image, text, *_ = op.checked(Sides(image, text, token_mask, patch_mask))
        elif image.ndim != 2 or image.shape != text.shape or image.dtype != text.dtype:
            shapes = f"{list(image.shape)} {image.dtype} and {list(text.shape)} {text.dtype}"
            raise ValueError(f"image and text must be [B, D], or have a token_mask, not {shapes}")
        fit = ids is None or (ids.ndim == 2 and len(ids) == len(image))
        if not fit or len(image) != len(text):
            counts = len(image), len(text), ids if ids is None else list(ids.shape)
            raise ValueError(f"image, text and ids must have a row for each pair, not {counts}")
        learned = self.temperature() if learned is None else learned
        learned = learned.to(torch.promote_types(image.dtype, torch.float32))
        options = self.backend, self.scratch_bytes
        loss, alike = _PairLoss.apply(image, text, learned, token_mask, patch_mask, ids, *options)
        self.alike.copy_(alike)
        return loss


class CMLILoss(PairLoss):
    """FILIP's cross-modal late interaction (Yao et al., 2021; (1) to (4)) over all pairs: a
    `PairLoss` that starts sharper than at 0.07, as means of maxima spread less than cosines."""

    def __init__(self, init_temperature: float = 0.02, **options):
        super().__init__(init_temperature, **options)
