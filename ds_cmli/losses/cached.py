"""The losses over the pairs of a whole step, from cached features: gradient caching (Gao et al., 2021).

The features of all micro-batches are cached without their autograd graph. Each loss is computed over the pairs of all
micro-batches of all ranks, and the gradient of each feature replaces the feature in the cache. The pairs are processed
in tiles, so that neither scores nor argmax indices of all pairs are held at once. The scores of each tile are computed
twice: first for the sums over rows and columns, then with their gradient.

Shapes: K micro-batches of B pairs, P ranks, G = K * B * P texts, T texts of a tile, N patches, M text positions,
H student width, D embedding dimension.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ds_cmli.cmli import collectives
from ds_cmli.cmli.contrastive import upcast
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.cmli.ring import ReturnedGradient, Scorer
from ds_cmli.cmli.token_keep import Selection
from ds_cmli.common import uniform
from ds_cmli.losses.base import Loss
from ds_cmli.losses.tile_statistics import TileStatistics
from ds_cmli.losses.tiles import Chunk, Images, Texts, Tile


@dataclass
class PairFeatures:
    """The features of one micro-batch that losses over pairs need: not normalised, in the model's precision, no graph.

    In `Objective.replay` the features have their graph.
    """

    token_mask: Tensor  # bool [B, M], True = valid
    pair_id: (
        Tensor  # int64 [B, 2], hashes of picture and caption: equal for equal pictures or captions
    )
    image_cls: Tensor | None  # [B, H]; None if no loss compares class tokens
    text_cls: Tensor | None  # [B, H]
    patches: Tensor | None  # [B, N, D]; None if no loss compares patches and tokens
    tokens: Tensor | None  # [B, M, D]
    selection: Selection | None = (
        None  # which patches and tokens were kept, if only a share of them is
    )

    def to(self, device: torch.device | str) -> "PairFeatures":
        image_cls, text_cls, patches, tokens = (
            None if x is None else fetched(x, device) for x in self._features()
        )
        mask, pair_id, selection = (
            fetched(self.token_mask, device),
            fetched(self.pair_id, device),
            self.selection,
        )
        if selection is not None:
            selection = Selection(*(fetched(x, device) for x in vars(selection).values()))
        return PairFeatures(mask, pair_id, image_cls, text_cls, patches, tokens, selection)

    def copied(self) -> "PairFeatures":
        """These features without the memory around them: a class token is a view of its whole sequence."""
        views = {
            name: x
            for name, x in vars(self).items()
            if isinstance(x, Tensor) and x.is_floating_point()
        }
        own = {
            name: x.clone() for name, x in views.items() if x.untyped_storage().nbytes() > x.nbytes
        }
        return replace(self, **own)  # type: ignore[arg-type]

    def _features(self) -> tuple[Tensor | None, ...]:
        return self.image_cls, self.text_cls, self.patches, self.tokens

    def tensors(self) -> list[Tensor]:
        """All tensors except those of the batch (`token_mask` and `pair_id`)."""
        selected = [] if self.selection is None else vars(self.selection).values()
        return [x for x in (*self._features(), *selected) if x is not None]


def fetched(x: Tensor, device: torch.device | str) -> Tensor:
    """A cached tensor on `device`, detached. It is copied only from another device."""
    return x.detach().to(device)


def stored(value: Tensor, place: Tensor) -> None:
    """Replace a cached tensor by `value`. CPU-GPU sync if the cache is on the host."""
    place.copy_(value)


@dataclass
class PairGradients:
    """The losses over the pairs of a step, and the gradients of their parameters."""

    total: Tensor  # the weighted sum of the losses of this rank's pairs, a scalar in fp32 (fp64)
    each: dict[str, Tensor]  # each loss by name
    parameters: list[
        Tensor | None
    ]  # the gradient of each parameter of these losses, in the order of the parameters
    ignored: Tensor  # how many texts of other pairs are no negatives of this rank's images


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
        argmax_bytes: limit for the argmax indices of a tile in bytes; a tile has at least one text.
        keep_duplicates: whether pairs with the same picture or caption are negatives of each other.
        heartbeat: called after each tile.

    Collective.
    """
    texts = _gathered(cached, device, score)  # collective
    parameters = [p for loss in losses.values() for p in loss.parameters()]
    pairs = sum(len(features.pair_id) for features in cached)

    def micro_batches() -> Iterator[tuple[PairFeatures, Images]]:
        firsts = accumulate((len(features.pair_id) for features in cached), initial=0)
        for features, first in uniform.turns(list(zip(cached, firsts, strict=False))):
            yield features, _images(features, first, device)

    def tiles(images: Images, chunk: Chunk, known: bool) -> Iterator[Tile]:
        texts_of_chunk, positions = chunk[2].shape
        size = images.texts_of_a_tile(positions, argmax_bytes)
        for start in uniform.turns(range(0, texts_of_chunk, size)):
            part = slice(start, min(start + size, texts_of_chunk))
            yield Tile(images, texts, chunk, part, statistics, score, keep_duplicates, known)
            heartbeat()

    def computed(tile: Tile) -> tuple[dict[str, Tensor], Tensor]:
        """Each loss, and their weighted sum times `scale`, as shares of those of this rank's pairs."""
        each = {
            name: loss(tile) * (len(tile.images.pair_id) / pairs) for name, loss in losses.items()
        }
        return each, scale * torch.stack(
            [weights[name] * loss for name, loss in each.items()]
        ).sum()

    statistics = TileStatistics(pairs, len(texts.pair_id))
    for _, images in micro_batches():
        for chunk in texts.chunks():  # collective
            for tile in tiles(images, chunk, known=False):
                statistics.end_tile(computed(tile)[1])
                del tile
        if not statistics.sums:  # no loss uses them
            break
    statistics.merge()  # collective

    found: dict[str, Tensor] = {}
    of_parameters: list[Tensor | None] = [None] * len(parameters)
    ignored = torch.zeros((), dtype=torch.int64, device=device)
    of_cls, of_tokens = _zeros(texts.cls), _zeros(texts.tokens)
    for features, images in micro_batches():
        of_images = _zeros(images.cls), _zeros(images.patches)
        returned = ReturnedGradient(None)
        for chunk in texts.chunks():  # collective
            owner, tokens, _ = chunk
            of_chunk = _zeros(tokens) if texts.go_round else of_tokens
            for tile in tiles(images, chunk, known=True):
                each, total = computed(tile)
                leaves = tile.leaves()
                grads = torch.autograd.grad(total, [*leaves, *parameters], allow_unused=True)
                for place, grad in zip(
                    tile.places(*of_images, of_cls, of_chunk), grads, strict=False
                ):
                    if grad is not None:
                        place += grad
                for n, grad in enumerate(grads[len(leaves) :]):
                    if grad is not None:
                        before, now = of_parameters[n], upcast(grad) / scale
                        of_parameters[n] = now if before is None else before + now
                for name, loss in each.items():
                    found[name] = loss.detach() + found.get(name, 0)
                if tile.duplicates is not None:
                    ignored += tile.duplicates.sum()
                del tile, each, total, leaves, grads, grad
            if texts.go_round and of_chunk is not None:
                returned.add(owner, of_chunk)  # collective
            del chunk, tokens, of_chunk
        if texts.go_round and of_tokens is not None:
            of_tokens += returned.sum()
        for feature, summed in zip((features.image_cls, features.patches), of_images, strict=True):
            if feature is not None and summed is not None:
                _replace(feature, summed, device)

    if of_cls is not None:
        _back_to_texts(
            [f.text_cls for f in cached], collectives.sum_to_owner(of_cls), device
        )  # collective
    if of_tokens is not None:
        own = of_tokens if texts.go_round else collectives.sum_to_owner(of_tokens)  # collective
        _back_to_texts([f.tokens for f in cached], own, device)
    total = torch.stack([weights[name] * loss for name, loss in found.items()]).sum()
    return PairGradients(total, found, of_parameters, ignored)


def _zeros(x: Tensor | None) -> Tensor | None:
    """Where gradients of `x` are added up: in fp32 (fp64 for fp64)."""
    return None if x is None else torch.zeros_like(x, dtype=collectives.accumulated(x.dtype))


@torch.no_grad()
def _images(features: PairFeatures, first: int, device: torch.device) -> Images:
    cls, patches = (
        None if x is None else l2_normalize(fetched(x, device))
        for x in (features.image_cls, features.patches)
    )
    return Images(
        first, fetched(features.pair_id, device), None if cls is None else upcast(cls), patches
    )


@torch.no_grad()
def _gathered(cached: list[PairFeatures], device: torch.device, score: Callable[..., Any]) -> Texts:
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
    return Texts(collectives.gather(ids), mask, cls, tokens, go_round)  # collective


def _back_to_texts(places: list[Tensor | None], grad: Tensor, device: torch.device) -> None:
    """Replace cached text features by their gradients, given those of this rank's normalised texts, [K * B, ...]."""
    first = 0
    for place in places:
        if place is not None:
            _replace(place, grad[first : first + len(place)], device)
            first += len(place)


def _replace(place: Tensor, grad: Tensor, device: torch.device) -> None:
    """Replace a cached feature by its gradient, given that of the normalised feature, which may have more positions."""
    x = fetched(place, device).requires_grad_()
    y = l2_normalize(x)
    (back,) = torch.autograd.grad(
        y, x, (grad[:, : x.shape[1]] if x.dim() == 3 else grad).to(y.dtype)
    )
    stored(back, place)
