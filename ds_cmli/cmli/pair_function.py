"""The autograd function of `PairLoss`: a loss over all pairs in closed form.

Forward scores the texts of all ranks with one block of this rank's images at a time, so the scores
of all pairs never exist at once. It saves log(sum(exp)) of each row and column of logits, and the
scores of the first blocks, as many as fit into the scratch memory. Backward computes the gradient
of each score from these, and scores the other blocks again.

Shapes: B pairs per rank, P ranks, G = B * P, b images of a block, N patches, M text positions, D
features, K ids of a pair. Scores are [b, G], one row per image and one column per text.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import exchange
from .exchange import TextSizes
from .normalize import l2_normalize, l2_normalize_backward
from .op import choose_kernels, refuse_second_derivative
from .sides import Sides, full_precision, index_dtype, slices, upcast, zero_gradient

CPU_BLOCK_BYTES = 16 * 2**20  # a larger block of images would leave the processor's cache
PAIR_BYTES = 32  # fp32 scratch per pair of a block: scores, logits and their gradients
PATCH_BYTES = 16  # fp32 scratch per feature of an image: copies and gradients
SCORE_BYTES = 8  # both scores of a pair


class PairBatch(NamedTuple):
    """This rank's pairs, and the texts of all ranks."""

    image: Tensor  # [B, N, D] or [B, D], not normalized
    local_text: Tensor  # [B, M, D] or [B, D], not normalized; M is this rank's
    local_token_mask: Tensor | None  # bool [B, M]
    patch_mask: Tensor | None  # bool [B, N]; None: all patches are valid
    local_ids: Tensor | None  # int64 [B, K]; None: there are no duplicates
    scale: Tensor  # scalar, 1/temperature
    bias: Tensor | None  # scalar; None: the contrastive loss
    global_text: Tensor  # [G, M, D] or [G, D], normalized; M is that of the longest text
    global_token_mask: Tensor | None  # bool [G, M]; None: vectors are compared
    global_ids: Tensor | None  # int64 [G, K]


class BlockScores(NamedTuple):
    """The scores of a block of images with the texts of all ranks."""

    i2t: Tensor  # [b, G]
    t2i: Tensor  # [b, G]
    # CMLI's gradient needs these: None for vectors, and empty unless they are kept.
    token_argmax: Tensor | None = None  # [b, G, N], the best token of each patch
    patch_argmax: Tensor | None = None  # [b, G, M], the best patch of each token


class Saved(NamedTuple):
    """The tensors that forward saves for backward."""

    batch: PairBatch
    row_lse: Tensor  # [B], log(sum(exp)) of an image's logits; not set for the sigmoid loss
    column_lse: Tensor  # [G], log(sum(exp)) of a text's logits over the images of all ranks
    block_scores: list[BlockScores]  # of the first blocks


class BlockPlan(NamedTuple):
    """The division of a rank's images into blocks."""

    backend: str  # of the op
    block_size: int  # images per block
    num_saved: int  # scores are saved of blocks that end at or before this image
    upcast_text: bool  # the texts are cast to fp32 once for all blocks
    sizes: TextSizes


class PairFunction(torch.autograd.Function):
    """Returns the mean loss of this rank's pairs, and the number of duplicates. Collective."""

    @staticmethod
    def forward(
        ctx, image, text, scale_and_bias, token_mask, patch_mask, ids, backend, scratch_bytes
    ):
        if token_mask is not None:
            # Called to raise before the first collective, if this rank does not run the backend.
            choose_kernels(Sides(image, text, token_mask, patch_mask), backend)
        sizes = exchange.gather_sizes(len(image), token_mask, image.device)  # collective
        global_text, global_token_mask = exchange.gather_texts(
            l2_normalize(text), token_mask, sizes
        )  # collectives
        global_ids = None if ids is None else exchange.gather(ids)  # collective
        scale = scale_and_bias[0]
        bias = scale_and_bias[1] if len(scale_and_bias) == 2 else None
        local = image, text, token_mask, patch_mask, ids  # the first fields of PairBatch
        batch = PairBatch(*local, scale, bias, global_text, global_token_mask, global_ids)
        plan = plan_blocks(batch, sizes, backend, scratch_bytes)
        if not any(ctx.needs_input_grad):
            plan = plan._replace(num_saved=0)

        num_images = len(image)
        loss_sum = scale.new_zeros(())
        row_lse = scale.new_empty(num_images)
        column_lse = scale.new_full((len(batch.global_text),), -torch.inf)
        positive_i2t = scale.new_empty(num_images)  # the logits of the images' own texts
        positive_t2i = scale.new_empty(num_images)
        num_duplicates = torch.zeros((), dtype=torch.int64, device=image.device)
        saved_scores: list[BlockScores] = []
        for block in blocks(batch, plan):
            is_saved = block.rows.stop <= plan.num_saved
            scores = block.score(keep_argmax=is_saved)
            if is_saved:
                saved_scores.append(scores)
            if block.duplicates is not None:
                num_duplicates += block.duplicates.sum()
            if bias is not None:
                loss_sum += block.sigmoid_loss(scores.i2t, scale, bias)
                loss_sum += block.sigmoid_loss(scores.t2i, scale, bias)
            else:
                logits_i2t = block.contrastive_logits(scores.i2t, scale)
                logits_t2i = block.contrastive_logits(scores.t2i, scale)
                positive_i2t[block.rows] = block.positives(logits_i2t)
                positive_t2i[block.rows] = block.positives(logits_t2i)
                row_lse[block.rows] = logits_i2t.logsumexp(1)
                column_lse = torch.logaddexp(column_lse, logits_t2i.logsumexp(0))
        if bias is None:
            column_lse = exchange.logsumexp_over_ranks(column_lse)  # collectives
            first_column = exchange.this_rank() * num_images
            local_column_lse = column_lse[first_column : first_column + num_images]
            lse = torch.stack([row_lse, local_column_lse])
            loss_sum = (lse - torch.stack([positive_i2t, positive_t2i])).sum()

        saved = Saved(batch, row_lse, column_lse, saved_scores)
        tensors, ctx.structure = tree_flatten(saved)
        ctx.save_for_backward(*tensors)
        ctx.plan = plan
        ctx.mark_non_differentiable(num_duplicates)
        return loss_sum / (2 * num_images), num_duplicates

    @staticmethod
    def backward(ctx, d_loss, _d_num_duplicates):
        refuse_second_derivative()
        # Activation checkpointing lets `saved_tensors` be read only once.
        saved: Saved = tree_unflatten(ctx.saved_tensors, ctx.structure)
        batch = saved.batch
        text = batch.local_text
        d_image = torch.empty_like(batch.image)
        d_scale_and_bias = batch.scale.new_zeros(1 if batch.bias is None else 2)
        d_global_text = backward_blocks(
            saved, ctx.plan, d_loss, d_image, d_scale_and_bias
        )  # collective
        d_text = exchange.sum_to_owner(
            d_global_text, batch.global_token_mask, batch.local_token_mask, ctx.plan.sizes
        )  # collective
        del d_global_text  # its memory is free for what follows
        for rows in slices(len(text), ctx.plan.block_size):
            l2_normalize_backward(d_text[rows], text[rows])
        d_text = d_text.to(text.dtype).contiguous()
        return d_image, d_text, d_scale_and_bias, None, None, None, None, None


def plan_blocks(batch: PairBatch, sizes: TextSizes, backend: str, scratch_bytes: int) -> BlockPlan:
    """Choose the size of a block, and the number of images whose scores are saved."""
    num_texts = len(batch.global_text)
    index_bytes = 0  # argmax indices of a pair
    if batch.image.ndim == 3:
        N = batch.image.shape[1]
        M = batch.global_text.shape[1]
        index_bytes = N * index_dtype(M).itemsize + M * index_dtype(N).itemsize
    num_saved = scratch_bytes // (num_texts * (index_bytes + SCORE_BYTES))

    block_bytes = scratch_bytes
    min_images = 1
    is_cpu = batch.image.device.type == "cpu" and backend in ("auto", "cpu")
    if is_cpu:
        block_bytes = CPU_BLOCK_BYTES
        min_images = torch.get_num_threads()  # one for each thread
    image_bytes = num_texts * (index_bytes + PAIR_BYTES) + PATCH_BYTES * batch.image[0].numel()
    block_size = min(len(batch.image), max(min_images, block_bytes // image_bytes))
    # A CPU multiplies 16-bit numbers no faster than fp32.
    return BlockPlan(backend, block_size, num_saved, upcast_text=is_cpu, sizes=sizes)


def backward_blocks(
    saved: Saved, plan: BlockPlan, d_loss: Tensor, d_image: Tensor, d_scale_and_bias: Tensor
) -> Tensor:
    """Write `d_image`, add to `d_scale_and_bias`, return `global_text`'s gradient. Collective."""
    batch = saved.batch
    scale = batch.scale
    bias = batch.bias
    num_images = len(batch.image)
    d_global_text = zero_gradient(batch.global_text)
    row_weight = d_loss / (2 * num_images)  # the gradient of the loss for one term of its sum
    # A column belongs to the loss of the rank that owns its text.
    column_weights = exchange.gather(row_weight.repeat(num_images))  # [G], collective
    saved_scores = iter(saved.block_scores)
    for block in blocks(batch, plan):
        is_saved = block.rows.stop <= plan.num_saved
        scores = next(saved_scores) if is_saved else block.score(keep_argmax=True)
        if bias is not None:
            d_logits_i2t = block.sigmoid_gradient(scores.i2t, scale, bias, row_weight)
            d_logits_t2i = block.sigmoid_gradient(scores.t2i, scale, bias, row_weight)
            d_scale_and_bias[1] += d_logits_i2t.sum()
            d_scale_and_bias[1] += d_logits_t2i.sum()
        else:
            row_lse = saved.row_lse[block.rows, None]  # [b, 1]
            d_logits_i2t = block.contrastive_gradient(scores.i2t, scale, row_lse, row_weight)
            d_logits_t2i = block.contrastive_gradient(
                scores.t2i, scale, saved.column_lse, column_weights
            )
        d_scale_and_bias[0] += torch.dot(d_logits_i2t.flatten(), scores.i2t.flatten())
        d_scale_and_bias[0] += torch.dot(d_logits_t2i.flatten(), scores.t2i.flatten())
        d_i2t = d_logits_i2t.mul_(scale)
        d_t2i = d_logits_t2i.mul_(scale)
        d_unit_image = zero_gradient(block.image)
        block.add_feature_gradients(d_unit_image, d_global_text, d_i2t, d_t2i, scores)
        d_image[block.rows] = l2_normalize_backward(d_unit_image, batch.image[block.rows])
    return d_global_text


class ImageBlock:
    """A block of this rank's images, compared with the texts of all ranks."""

    def __init__(self, batch: PairBatch, rows: slice, global_text: Tensor):
        self.rows = rows
        self.image = l2_normalize(batch.image[rows]).to(global_text.dtype)  # [b, N, D] or [b, D]
        self.text = global_text  # [G, M, D] or [G, D]
        # The column of the first image's own text. Those of the next images are the next columns.
        self.first_column = exchange.this_rank() * len(batch.image) + rows.start
        # bool [b, G]: the texts of other pairs that share an id with an image's pair
        self.duplicates: Tensor | None = None
        if batch.local_ids is not None and batch.global_ids is not None:
            ids = batch.local_ids[rows]
            duplicates = ids.new_zeros((len(ids), len(global_text)), dtype=torch.bool)
            for k in range(ids.shape[1]):
                duplicates |= ids[:, k, None] == batch.global_ids[:, k]
            self.positives(duplicates).fill_(False)
            self.duplicates = duplicates

    def positives(self, matrix: Tensor) -> Tensor:
        """Return a view [b] of a matrix [b, G]: the elements of the images' own texts."""
        return matrix.diagonal(self.first_column)

    def contrastive_logits(self, scores: Tensor, scale: Tensor) -> Tensor:
        """Return scale * scores, with -inf for duplicates, which are not negatives."""
        logits = scores * scale
        if self.duplicates is not None:
            logits.masked_fill_(self.duplicates, -torch.inf)
        return logits

    def contrastive_gradient(
        self, scores: Tensor, scale: Tensor, lse: Tensor, weight: Tensor
    ) -> Tensor:
        """Return the gradient of the logits: weight * (softmax - 1 for the positive pair)."""
        d_logits = self.contrastive_logits(scores, scale).sub_(lse).exp_()
        self.positives(d_logits).sub_(1)
        return d_logits.mul_(weight)

    def sigmoid_loss(self, scores: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        """Return the sum of -log(sigmoid(z * logits)); z: 1 for positives, duplicates; else -1."""
        signed_logits = self._times_z(torch.addcmul(bias, scores, scale))
        return F.softplus(signed_logits.neg_()).sum()

    def sigmoid_gradient(
        self, scores: Tensor, scale: Tensor, bias: Tensor, weight: Tensor
    ) -> Tensor:
        """Return the gradient of the logits: -weight * z * sigmoid(-z * logits)."""
        signed_logits = self._times_z(torch.addcmul(bias, scores, scale))
        return self._times_z(signed_logits.neg_().sigmoid_()).neg_().mul_(weight)

    def _times_z(self, matrix: Tensor) -> Tensor:
        """Return a matrix [b, G] times z of `sigmoid_loss`, and overwrite the matrix."""
        matrix.neg_()
        self.positives(matrix).neg_()
        if self.duplicates is None:
            return matrix
        return torch.where(self.duplicates, -matrix, matrix)


class VectorBlock(ImageBlock):
    """Compares vectors by their cosine, which is the score of both directions."""

    def score(self, keep_argmax: bool) -> BlockScores:
        with full_precision(self.image.device):
            cosines = upcast(self.image) @ upcast(self.text).t()
        return BlockScores(cosines, cosines)

    def add_feature_gradients(self, d_image, d_text, d_i2t, d_t2i, scores):
        """Add to the gradients of the unit images [b, D] and of the unit texts [G, D]."""
        with full_precision(self.image.device):
            d_cosines = d_i2t + d_t2i
            d_image.addmm_(d_cosines, upcast(self.text))
            d_text.addmm_(d_cosines.t(), upcast(self.image))


class SequenceBlock(ImageBlock):
    """Compares patches and tokens by CMLI."""

    def __init__(self, batch: PairBatch, rows: slice, global_text: Tensor, backend: str):
        super().__init__(batch, rows, global_text)
        self.token_mask = batch.global_token_mask
        self.patch_mask = None if batch.patch_mask is None else batch.patch_mask[rows]
        self.backend = backend

    def score(self, keep_argmax: bool) -> BlockScores:
        scores = torch.ops.ds_cmli.scores(
            self.image, self.text, self.token_mask, self.patch_mask, self.backend, keep_argmax
        )
        return BlockScores(*scores)

    def add_feature_gradients(self, d_image, d_text, d_i2t, d_t2i, scores):
        """Add to the gradients of the unit images [b, N, D] and of the unit texts [G, M, D]."""
        torch.ops.ds_cmli.add_feature_gradients(
            d_image, d_text, self.image, self.text, self.token_mask, self.patch_mask, d_i2t, d_t2i,
            scores.token_argmax, scores.patch_argmax, self.backend,
        )  # fmt: skip


def blocks(batch: PairBatch, plan: BlockPlan) -> Iterator[VectorBlock | SequenceBlock]:
    """Yield the blocks of this rank's images, in their order."""
    global_text = upcast(batch.global_text) if plan.upcast_text else batch.global_text
    for rows in slices(len(batch.image), plan.block_size):
        if batch.global_token_mask is None:
            yield VectorBlock(batch, rows, global_text)
        else:
            yield SequenceBlock(batch, rows, global_text, plan.backend)
