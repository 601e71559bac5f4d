"""The losses over the pairs of a whole step, from cached features: gradient caching (Gao et al., 2021).

The features of all micro-batches are cached without their autograd graph. Each loss is computed over the pairs of all
micro-batches of all ranks, and the gradient of each feature replaces the feature in the cache. Image rows are processed
in blocks, so that neither scores nor argmax indices of all rows are held at once. The scores of each block are computed
twice: first for the sums over columns, then with their gradient.

Shapes: K micro-batches of B pairs, P ranks, G = K * B * P texts, R rows of a block, N patches, M text positions,
H student width, D embedding dimension.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ds_cmli.cmli.check import index_dtype
from ds_cmli.cmli.contrastive import upcast
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.cmli.ring import Scorer, ring_scores
from ds_cmli.cmli.token_keep import Selection
from ds_cmli.common import uniform
from ds_cmli.distributed import collectives
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses.base import Loss, PairInputs
from ds_cmli.losses.column_statistics import ColumnStatistics
from ds_cmli.losses.functions import duplicates


@dataclass
class PairFeatures:
    """The features of one micro-batch that losses over pairs need: not normalised, in the model's precision, no graph.

    In `Objective.replay` the features have their graph.
    """

    token_mask: Tensor  # bool [B, M], True = valid
    pair_id: Tensor  # int64 [B, 2], hashes of picture and caption: equal for equal pictures or captions
    image_cls: Tensor | None  # [B, H]; None if no loss compares class tokens
    text_cls: Tensor | None  # [B, H]
    patches: Tensor | None  # [B, N, D]; None if no loss compares patches and tokens
    tokens: Tensor | None  # [B, M, D]
    selection: Selection | None = None  # which patches and tokens were kept, if only a share of them is

    def to(self, device: torch.device | str) -> "PairFeatures":
        image_cls, text_cls, patches, tokens = (None if x is None else fetched(x, device) for x in self._features())
        mask, pair_id, selection = fetched(self.token_mask, device), fetched(self.pair_id, device), self.selection
        if selection is not None:
            selection = Selection(*(fetched(x, device) for x in vars(selection).values()))
        return PairFeatures(mask, pair_id, image_cls, text_cls, patches, tokens, selection)

    def copied(self) -> "PairFeatures":
        """These features without the memory around them: a class token is a view of its whole sequence."""
        views = {name: x for name, x in vars(self).items() if isinstance(x, Tensor) and x.is_floating_point()}
        own = {name: x.clone() for name, x in views.items() if x.untyped_storage().nbytes() > x.nbytes}
        return replace(self, **own)  # type: ignore[arg-type]

    def _features(self) -> tuple[Tensor | None, ...]:
        return self.image_cls, self.text_cls, self.patches, self.tokens

    def tensors(self) -> list[Tensor]:
        """All tensors except those of the batch (`token_mask` and `pair_id`)."""
        selected = [] if self.selection is None else vars(self.selection).values()
        return [x for x in (*self._features(), *selected) if x is not None]


def fetched(x: Tensor, device: torch.device | str, rows: slice = slice(None), copy: bool = False) -> Tensor:
    """Rows of a cached tensor on `device`, detached. Without `copy` they are copied only from another device."""
    return x[rows].detach().to(device, copy=copy)


def stored(value: Tensor | float, place: Tensor, rows: slice = slice(None)) -> None:
    """Put `value` into rows of a cached tensor. CPU-GPU sync if the cache is on the host."""
    place[rows] = value.to(place.device) if isinstance(value, Tensor) else value


@dataclass
class PairGradients:
    """The losses over the pairs of a step, and the gradients of their parameters."""

    total: Tensor  # the weighted sum of the losses of this rank's pairs, a scalar in fp32 (fp64)
    each: dict[str, Tensor]  # each loss by name
    parameters: list[Tensor | None]  # the gradient of each parameter of these losses, in the order of the parameters
    ignored: Tensor  # how many texts of other pairs are no negatives of this rank's images


@dataclass
class _Texts:
    """All G texts, normalised; ordered by rank, and for each rank by micro-batch.

    With the ring exchange (`go_round`), `tokens` and `token_mask` are those of this rank's K * B texts only.
    """

    pair_id: Tensor  # int64 [G, 2]
    token_mask: Tensor  # bool [G, M]
    cls: Tensor | None  # [G, H] fp32 (fp64)
    tokens: Tensor | None  # [G, M, D]
    go_round: bool


class _Block(PairInputs):
    """R image rows of a micro-batch against all G texts."""

    def __init__(
        self,
        first: int,
        pair_id: Tensor,
        image_cls: Tensor | None,
        patches: Tensor | None,
        texts: _Texts,
        column_logsumexp: Callable[[Tensor], Tensor],
        score: Callable[..., tuple[Tensor, Tensor]],
        keep_duplicates: bool,
    ):
        self._first, self.pair_id, self.image_cls, self.patches = first, pair_id, image_cls, patches
        self.keep_duplicates = keep_duplicates
        self.texts, self.statistics, self.score = texts, column_logsumexp, score

    @property
    def first(self) -> int:
        return self._first

    @cached_property
    def duplicates(self) -> Tensor | None:
        return None if self.keep_duplicates else duplicates(self.pair_id, self.texts.pair_id, self.first)

    @cached_property
    def global_scores(self) -> Tensor:
        assert self.image_cls is not None and self.texts.cls is not None
        return upcast(l2_normalize(self.image_cls)) @ self.texts.cls.t()

    @cached_property
    def cmli_scores(self) -> tuple[Tensor, Tensor]:
        assert self.patches is not None and self.texts.tokens is not None
        inputs = l2_normalize(self.patches), self.texts.tokens, self.texts.token_mask
        if self.texts.go_round:
            assert isinstance(self.score, Scorer)
            return ring_scores(*inputs, score=self.score)  # collective
        return self.score(*inputs)

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
    keep_duplicates: bool = False,
    heartbeat: Callable[[], None] = lambda: None,
) -> PairGradients:
    """Compute the losses over all pairs of the step, and replace the features in `cached` by their gradients.

    Args:
        losses: the losses that compare pairs, by name.
        weights: the weights of these losses, and perhaps of others.
        cached: the features of this rank's micro-batches, on `device` or on the host.
        score: a `Scorer`, or `cmli_scores` with its options.
        scale: multiplies the gradients in `cached`, so that they do not vanish in fp16.
        argmax_bytes: limit for the argmax indices of a block in bytes; a block has at least one row.
        keep_duplicates: whether pairs with the same picture or caption are negatives of each other.
        heartbeat: called after each block.

    Collective.
    """
    texts = _gathered(cached, device, score)  # collective
    leaves = [x.requires_grad_() for x in (texts.cls, texts.tokens) if x is not None]
    sums = [torch.zeros_like(x, dtype=upcast(x[:0]).dtype) for x in leaves]
    parameters = [p for loss in losses.values() for p in loss.parameters()]
    pairs = sum(len(features.pair_id) for features in cached)

    def blocks(column_logsumexp: Callable[[Tensor], Tensor]) -> Iterator[tuple[_Block, PairFeatures, slice]]:
        sizes = [len(features.pair_id) for features in cached]
        firsts = accumulate(sizes, initial=distributed.rank() * pairs)
        for features, size, first in uniform.turns(list(zip(cached, sizes, firsts, strict=False))):
            rows = _rows_of_a_block(features, texts, argmax_bytes)
            for start in uniform.turns(range(0, size, rows)):
                part = slice(start, start + rows)
                image_cls, patches = (
                    None if x is None else fetched(x, device, part) for x in (features.image_cls, features.patches)
                )
                ids = fetched(features.pair_id, device, part)
                block = _Block(first + start, ids, image_cls, patches, texts, column_logsumexp, score, keep_duplicates)
                yield block, features, part
                del block
                heartbeat()

    def weighted(block: _Block, each: dict[str, Tensor]) -> Tensor:
        share = len(block.pair_id) / pairs
        return torch.stack([weights[name] * share * loss for name, loss in each.items()]).sum()

    without_gradient = _Texts(
        texts.pair_id,
        texts.token_mask,
        None if texts.cls is None else texts.cls.detach(),
        None if texts.tokens is None else texts.tokens.detach(),
        texts.go_round,
    )
    statistics = ColumnStatistics()
    for block, _, _ in blocks(statistics.collect):
        block.texts = without_gradient
        statistics.end_block(scale * weighted(block, {name: loss(block) for name, loss in losses.items()}))
        if not statistics.lse:  # no loss uses `column_logsumexp`
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
            stored(0.0 if grad is None else grad, target, part)
        for summed, grad in zip(sums, grads[len(rows) :], strict=False):
            if grad is not None:
                summed += grad
        for n, grad in enumerate(grads[len(rows) + len(leaves) :]):
            if grad is not None:
                before = of_parameters[n]
                of_parameters[n] = upcast(grad) / scale if before is None else before + upcast(grad) / scale
        for name, loss in each.items():
            found[name] = loss.detach() * (len(block.pair_id) / pairs) + found.get(name, 0)
        if block.duplicates is not None:
            ignored += block.duplicates.sum()
        del grads, each, total

    for leaf, summed in zip(leaves, sums, strict=True):
        if not (texts.go_round and leaf is texts.tokens):  # the ring has summed it already
            summed = collectives.sum_to_owner(summed)  # collective
        _back_to_texts(cached, leaf is texts.tokens, summed, device)
    total = torch.stack([weights[name] * loss for name, loss in found.items()]).sum()
    return PairGradients(total, found, of_parameters, ignored)


@torch.no_grad()
def _gathered(cached: list[PairFeatures], device: torch.device, score: Callable[..., Any]) -> _Texts:
    """Gather the texts of all ranks, except the tokens if they go round a ring. Collective."""
    count, longest = sum(len(f.pair_id) for f in cached), max(f.token_mask.shape[1] for f in cached)
    ids = torch.cat([fetched(f.pair_id, device) for f in cached])
    mask = torch.zeros(count, longest, dtype=torch.bool, device=device)
    cls = tokens = None
    first = 0
    for f in cached:
        part = slice(first, first + len(f.pair_id))
        length = f.token_mask.shape[1]
        mask[part, :length] = fetched(f.token_mask, device)
        if f.text_cls is not None:
            x = upcast(l2_normalize(fetched(f.text_cls, device)))
            cls = x.new_empty(count, x.shape[1]) if cls is None else cls
            cls[part] = x
        if f.tokens is not None:
            x = l2_normalize(fetched(f.tokens, device))
            tokens = x.new_zeros(count, longest, x.shape[2]) if tokens is None else tokens
            tokens[part, :length] = x
        first += len(f.pair_id)
    go_round = False
    if tokens is not None:
        tokens, mask = collectives.pad_text(tokens, mask)  # collective
        go_round = isinstance(score, Scorer) and score.goes_round(tokens)
    if tokens is not None and not go_round:
        tokens, mask = collectives.gather_text(tokens, mask)  # collective
    if cls is not None:
        cls = collectives.gather_with_gradient(cls)  # collective
    return _Texts(collectives.gather(ids), mask, cls, tokens, go_round)  # collective


def _rows_of_a_block(features: PairFeatures, texts: _Texts, argmax_bytes: int) -> int:
    """R: a micro-batch, or as many rows as have argmax indices of at most `argmax_bytes`; a ring keeps no indices."""
    B = len(features.pair_id)
    if features.patches is None or texts.go_round:
        return B
    G, M, N = *texts.token_mask.shape, features.patches.shape[1]
    row = G * (N * index_dtype(M).itemsize + M * index_dtype(N).itemsize)
    return max(1, min(B, argmax_bytes // row))


def _back_to_texts(cached: list[PairFeatures], of_tokens: bool, grad: Tensor, device: torch.device) -> None:
    """Replace cached text features by their gradients, given those of this rank's normalised texts, [K * B, ...]."""
    first = 0
    for features in cached:
        place = features.tokens if of_tokens else features.text_cls
        assert place is not None
        part = grad[first : first + len(place)]
        x = fetched(place, device, copy=True).requires_grad_()
        y = l2_normalize(x)
        (back,) = torch.autograd.grad(y, x, (part[:, : x.shape[1]] if of_tokens else part).to(y.dtype))
        stored(back, place)
        first += len(place)
