"""The losses over pairs of a whole step, from cached features: gradient caching (Gao et al., 2021).

The features of all micro-batches stand here without the graph that made them. Each loss is computed over the pairs of
all micro-batches of all ranks, and leaves the gradient of each feature in the feature's place. Image rows come in
blocks, so neither scores nor argmax indices of all rows are held at once: of each block the scores are computed first
for the columns' sums, and a second time with their gradient.

Shapes: K micro-batches of B pairs, P ranks, G = K * B * P texts, R rows of a block, N patches, M text positions,
H student width, D embedding dimension.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.cmli.check import index_dtype
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses.base import Loss, PairInputs
from ds_cmli.losses.functions import same_picture, upcast


@dataclass
class PairFeatures:
    """What the losses over pairs see of one micro-batch: not normalised, in the model's precision, without a graph."""

    token_mask: Tensor  # bool [B, M], True = valid
    image_id: Tensor  # int64 [B], equal where the picture is
    image_cls: Tensor | None  # [B, H], where class tokens are compared
    text_cls: Tensor | None  # [B, H]
    patches: Tensor | None  # [B, N, D], where patches and tokens are compared
    tokens: Tensor | None  # [B, M, D]

    def to(self, device: torch.device | str) -> "PairFeatures":
        def moved(tensor: Any) -> Any:
            return None if tensor is None else tensor.to(device)

        return PairFeatures(*(moved(getattr(self, f.name)) for f in fields(self)))


@dataclass
class PairGradients:
    """What the losses over pairs of a step come to."""

    total: Tensor  # their weighted sum of this rank's pairs, a scalar in fp32 (fp64)
    each: dict[str, Tensor]  # by name
    parameters: list[Tensor | None]  # the gradient of each parameter of these losses, in their order
    ignored: Tensor  # negatives of this rank's images that were ignored as captions of the same picture


@dataclass
class _Texts:
    """All G texts, in rank order and of each rank by micro-batch; normalised."""

    image_id: Tensor  # int64 [G]
    token_mask: Tensor  # bool [G, M]
    cls: Tensor | None  # [G, H] fp32 (fp64)
    tokens: Tensor | None  # [G, M, D]


class ColumnStatistics:
    """log(sum(exp)) of each column over the rows of all blocks and ranks, and the loss's gradient by it.

    A loss asks for it any number of times; the n-th time is the same of every block.
    """

    def __init__(self) -> None:
        self.lse: list[Tensor] = []  # [G] each
        self.gradients: list[Tensor] = []  # [G] each
        self.leaves: list[Tensor] = []  # of the present block
        self.asked = 0

    def collect(self, logits: Tensor) -> Tensor:
        """[R, G] -> [G], of which only the gradient has a meaning."""
        n, self.asked = self.asked, self.asked + 1
        lse = logits.detach().logsumexp(0)
        if n == len(self.lse):
            self.lse.append(lse)
            self.gradients.append(torch.zeros_like(lse))
        else:
            self.lse[n] = torch.logaddexp(self.lse[n], lse)
        self.leaves.append(torch.zeros_like(lse, requires_grad=True))
        return self.leaves[n]

    def end_block(self, loss: Tensor) -> None:
        """Add the gradients of the block whose loss this is, weighted and scaled."""
        if self.leaves:
            for total, grad in zip(self.gradients, torch.autograd.grad(loss, self.leaves), strict=True):
                total += grad
        self.leaves, self.asked = [], 0

    def merge(self) -> None:
        """Over ranks. Collective."""
        self.lse = [distributed.logsumexp_over_ranks(lse) for lse in self.lse]  # collective
        if distributed.world_size() > 1:
            for grad in self.gradients:
                dist.all_reduce(grad)  # collective: every rank's loss may use every column

    def known(self, logits: Tensor) -> Tensor:
        """[R, G] -> [G], now that it is known."""
        n = self.asked % len(self.lse)
        self.asked += 1
        return _KnownLogSumExp.apply(logits, self.lse[n], self.gradients[n])  # type: ignore[no-untyped-call]


class _KnownLogSumExp(torch.autograd.Function):
    """The logits' gradient follows from all rows' losses, not from this block's alone."""

    @staticmethod
    def forward(ctx, logits, lse, grad):
        ctx.save_for_backward(logits, lse, grad)
        return lse.clone()

    @staticmethod
    def backward(ctx, block_grad):
        logits, lse, grad = ctx.saved_tensors
        return (logits - lse).exp_().mul_(grad), None, None


class _Block(PairInputs):
    """R rows of a micro-batch against all texts."""

    def __init__(
        self,
        first: int,
        image_id: Tensor,
        image_cls: Tensor | None,
        patches: Tensor | None,
        texts: _Texts,
        column_logsumexp: Callable[[Tensor], Tensor],
        score: Callable[..., tuple[Tensor, Tensor]],
    ):
        self._first, self.image_id, self.image_cls, self.patches = first, image_id, image_cls, patches
        self.texts, self.statistics, self.score = texts, column_logsumexp, score

    @property
    def first(self) -> int:
        return self._first

    @cached_property
    def ignore(self) -> Tensor:
        return same_picture(self.image_id, self.texts.image_id, self.first)

    @cached_property
    def global_scores(self) -> Tensor:
        assert self.image_cls is not None and self.texts.cls is not None
        return upcast(l2_normalize(self.image_cls)) @ self.texts.cls.t()

    @cached_property
    def cmli_scores(self) -> tuple[Tensor, Tensor]:
        assert self.patches is not None
        return self.score(l2_normalize(self.patches), self.texts.tokens, self.texts.token_mask)

    def column_logsumexp(self, logits: Tensor) -> Tensor:
        return self.statistics(logits)


def pair_gradients(
    losses: Mapping[str, Loss],
    weights: Mapping[str, float],
    cached: list[PairFeatures],
    score: Callable[..., tuple[Tensor, Tensor]],
    device: torch.device,
    scale: float,
    argmax_bytes: int,
    heartbeat: Callable[[], None] = lambda: None,
) -> PairGradients:
    """The losses over all pairs of the step; the features in `cached` become their gradients, times `scale`.

    Args:
        losses: those that compare pairs, by name.
        weights: of these, and perhaps of others.
        cached: of this rank's micro-batches, on `device` or on the host.
        score: `cmli_scores` with its options.
        scale: of the gradients in `cached`, so that they do not vanish in fp16.
        argmax_bytes: the most that the argmax indices of a block take; one row is always computed.
        heartbeat: called after each block.

    Collective.
    """
    texts = _gathered(cached, device)  # collective
    leaves = [x.requires_grad_() for x in (texts.cls, texts.tokens) if x is not None]
    sums = [torch.zeros_like(x, dtype=upcast(x[:0]).dtype) for x in leaves]
    parameters = [p for loss in losses.values() for p in loss.parameters()]
    pairs = sum(len(features.image_id) for features in cached)

    def blocks(column_logsumexp: Callable[[Tensor], Tensor]) -> Iterator[tuple[_Block, PairFeatures, slice]]:
        first = distributed.rank() * pairs
        for features in cached:
            rows = _rows_of_a_block(features, texts, argmax_bytes)
            for start in range(0, len(features.image_id), rows):
                part = slice(start, start + rows)
                image_cls, patches = (
                    None if x is None else x[part].detach().to(device) for x in (features.image_cls, features.patches)
                )
                ids = features.image_id[part].to(device)
                yield _Block(first + start, ids, image_cls, patches, texts, column_logsumexp, score), features, part
                heartbeat()
            first += len(features.image_id)

    def weighted(block: _Block, each: dict[str, Tensor]) -> Tensor:
        share = len(block.image_id) / pairs
        return torch.stack([weights[name] * share * loss for name, loss in each.items()]).sum()

    without_gradient = _Texts(
        texts.image_id, texts.token_mask, *(x if x is None else x.detach() for x in (texts.cls, texts.tokens))
    )
    statistics = ColumnStatistics()
    for block, _, _ in blocks(statistics.collect):
        block.texts = without_gradient
        statistics.end_block(scale * weighted(block, {name: loss(block) for name, loss in losses.items()}))
        if not statistics.lse:  # no loss asks for it
            break
    statistics.merge()  # collective

    found: dict[str, Tensor] = {}
    of_parameters: list[Tensor | None] = [None] * len(parameters)
    ignored = torch.zeros((), dtype=torch.int64, device=device)
    for block, features, part in blocks(statistics.known):
        rows = [x.requires_grad_() for x in (block.image_cls, block.patches) if x is not None]
        each = {name: loss(block) for name, loss in losses.items()}
        total = scale * weighted(block, each)
        grads = torch.autograd.grad(total, [*rows, *leaves, *parameters], allow_unused=True)
        targets = [x for x in (features.image_cls, features.patches) if x is not None]
        for target, grad in zip(targets, grads, strict=False):
            target[part] = 0.0 if grad is None else grad.to(target.device)  # CPU-GPU sync, for a cache on the host
        for summed, grad in zip(sums, grads[len(rows) :], strict=False):
            if grad is not None:
                summed += grad
        for n, grad in enumerate(grads[len(rows) + len(leaves) :]):
            if grad is not None:
                before = of_parameters[n]
                of_parameters[n] = upcast(grad) / scale if before is None else before + upcast(grad) / scale
        for name, loss in each.items():
            found[name] = loss.detach() * (len(block.image_id) / pairs) + found.get(name, 0)
        ignored += block.ignore.sum()
        del grads, each, total

    for leaf, summed in zip(leaves, sums, strict=True):
        _back_to_texts(cached, leaf is texts.tokens, distributed.sum_to_owner(summed), device)  # collective
    total = torch.stack([weights[name] * loss for name, loss in found.items()]).sum()
    return PairGradients(total, found, of_parameters, ignored)


@torch.no_grad()
def _gathered(cached: list[PairFeatures], device: torch.device) -> _Texts:
    """Every rank's texts. Collective."""
    count, longest = sum(len(f.image_id) for f in cached), max(f.token_mask.shape[1] for f in cached)
    ids = torch.cat([f.image_id.to(device) for f in cached])
    mask = torch.zeros(count, longest, dtype=torch.bool, device=device)
    cls = tokens = None
    first = 0
    for f in cached:
        part = slice(first, first + len(f.image_id))
        length = f.token_mask.shape[1]
        mask[part, :length] = f.token_mask.to(device)
        if f.text_cls is not None:
            x = upcast(l2_normalize(f.text_cls.to(device)))
            cls = x.new_empty(count, x.shape[1]) if cls is None else cls
            cls[part] = x
        if f.tokens is not None:
            x = l2_normalize(f.tokens.to(device))
            tokens = x.new_zeros(count, longest, x.shape[2]) if tokens is None else tokens
            tokens[part, :length] = x
        first += len(f.image_id)
    if tokens is not None:
        tokens, mask = distributed.gather_text(tokens, mask)  # collective
    if cls is not None:
        cls = distributed.gather_with_gradient(cls)  # collective
    return _Texts(distributed.gather(ids), mask, cls, tokens)  # collective


def _rows_of_a_block(features: PairFeatures, texts: _Texts, argmax_bytes: int) -> int:
    """R: a micro-batch, or as much of it as has argmax indices of `argmax_bytes`."""
    B = len(features.image_id)
    if features.patches is None:
        return B
    G, M, N = *texts.token_mask.shape, features.patches.shape[1]
    row = G * (N * index_dtype(M).itemsize + M * index_dtype(N).itemsize)
    return max(1, min(B, argmax_bytes // row))


def _back_to_texts(cached: list[PairFeatures], of_tokens: bool, grad: Tensor, device: torch.device) -> None:
    """Put the gradients of this rank's normalised texts, [K * B, ...], through the normalisation into their places."""
    first = 0
    for features in cached:
        place = features.tokens if of_tokens else features.text_cls
        assert place is not None
        part = grad[first : first + len(place)]
        x = place.detach().to(device, copy=True).requires_grad_()
        y = l2_normalize(x)
        (back,) = torch.autograd.grad(y, x, (part[:, : x.shape[1]] if of_tokens else part).to(y.dtype))
        place.copy_(back)
        first += len(place)
