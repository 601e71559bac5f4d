"""The losses over the pairs of a whole step, from cached features: gradient caching.

The method is that of Gao et al. (2021).

The features of all micro-batches are cached without their autograd graph. Each loss is computed
over the pairs of all micro-batches of all ranks, and the gradient of each feature replaces the
feature in the cache. The pairs are processed in tiles, so that neither scores nor argmax indices of
all pairs are held at once. The scores of each tile are computed twice: first for the sums over rows
and columns, then with their gradient.

Where pairs are left out (`cmli.cut`), the CMLI scores of all of this rank's pairs are kept (fp32, 8
bytes a pair). The losses are differentiated from them, and only the pairs whose gradients are left
are computed a second time.

Shapes: K micro-batches of B pairs, P ranks, G = K * B * P texts, T texts of a tile, N patches, M
text positions, H student width, D embedding dimension.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ds_cmli.cmli import collectives
from ds_cmli.cmli.contrastive import upcast
from ds_cmli.cmli.cut import Cut
from ds_cmli.cmli.inputs import Sides, Wanted
from ds_cmli.cmli.op import cmli_gradients
from ds_cmli.cmli.ring import ReturnedGradient, Score, Scorer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses.base import Loss
from ds_cmli.losses.pair_features import CachedStep, PairFeatures
from ds_cmli.losses.tile_statistics import TileStatistics
from ds_cmli.losses.tiles import LARGER, FeatureGradients, Images, Stored, TextChunk, Texts, Tile


@dataclass(frozen=True)
class PairLosses:
    """The losses that compare pairs, and how they are computed."""

    losses: Mapping[str, Loss]  # by name
    weights: Mapping[str, float]  # of these losses, and perhaps of others
    score: Score  # a `Scorer`, or `cmli_scores` with its options
    argmax_bytes: int  # limit for the argmax indices of a tile, which has at least one text
    keep_duplicates: bool = False  # whether pairs of one picture or caption are negatives
    cut: Cut | None = None  # leaves out pairs

    def parameters(self) -> list[nn.Parameter]:
        return [p for loss in self.losses.values() for p in loss.parameters()]

    def of(self, tile: Tile, share: float) -> dict[str, Tensor]:
        """Each loss of a tile, whose images are a `share` of this rank's."""
        return {name: loss(tile) * share for name, loss in self.losses.items()}

    def weighted(self, each: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * loss for name, loss in each.items()]).sum()


@dataclass
class PairGradients:
    """The losses over the pairs of a step, and the gradients of their parameters."""

    total: Tensor  # the weighted sum of the losses of this rank's pairs, a scalar in fp32 (fp64)
    each: dict[str, Tensor]  # each loss by name
    parameters: list[Tensor | None]  # the gradients, in the order of these losses' parameters
    ignored: Tensor  # how many texts of other pairs are no negatives of this rank's images
    cut: Tensor | None = None  # `Cut.found`, where pairs are left out


def pair_gradients(pairs: PairLosses, step: CachedStep) -> PairGradients:
    """Compute the losses over all pairs of the step, and replace the features by their gradients.

    Collective.
    """
    texts = step.gather_texts(pairs.score)  # collective
    stored = None
    if pairs.cut is not None and texts.tokens is not None:
        dtype = collectives.accumulated(texts.tokens.dtype)
        both = texts.tokens.new_zeros(2, len(step), len(texts.pair_id), dtype=dtype)
        stored = Stored(both[0], both[1])
    statistics = first_pass(pairs, step, texts, stored)  # collective
    return second_pass(pairs, step, texts, statistics, stored)  # collective


def first_pass(
    pairs: PairLosses, step: CachedStep, texts: Texts, stored: Stored | None = None
) -> TileStatistics:
    """Compute log(sum(exp)) of each row and column over all pairs. Collective."""
    statistics = TileStatistics(len(step), len(texts.pair_id))

    def add(images: Images, chunk: TextChunk, part: slice) -> None:
        tile = Tile(images, texts, chunk, part, pairs.score, pairs.keep_duplicates)
        tile.collect_into(statistics, stored)
        each = pairs.of(tile, len(images.pair_id) / len(step))
        statistics.end_tile(step.scale * pairs.weighted(each))

    for _, images in step.image_blocks():
        for chunk in texts.chunks():  # collective
            for part in step.parts(images, chunk, pairs.argmax_bytes, LARGER):
                add(images, chunk, part)
        if not statistics.sums and stored is None:  # no loss uses them
            break
    statistics.merge()  # collective
    return statistics


def second_pass(
    pairs: PairLosses,
    step: CachedStep,
    texts: Texts,
    statistics: TileStatistics,
    stored: Stored | None = None,
) -> PairGradients:
    """Compute the losses with their gradients, which replace the features. Collective."""
    sums = _Sums(pairs, step, texts, statistics)
    if stored is not None:
        sums.leave_out(stored)  # collective
    for features, images in step.image_blocks():
        sums.add_images(features, images)  # collective
    if sums.text_cls is not None:
        step.back_to_texts("text_cls", collectives.sum_to_owner(sums.text_cls))  # collective
    if sums.tokens is not None:
        own = sums.tokens
        if not texts.go_round:  # what has passed round a ring has been summed on its way
            own = collectives.sum_to_owner(sums.tokens)  # collective
        step.back_to_texts("tokens", own)
    total, found = pairs.weighted(sums.each), None if pairs.cut is None else pairs.cut.found
    return PairGradients(total, sums.each, sums.parameters, sums.ignored, found)


class _Sums:
    """Adds up the losses and gradients of the second pass."""

    def __init__(
        self, pairs: PairLosses, step: CachedStep, texts: Texts, statistics: TileStatistics
    ):
        self.pairs, self.step, self.texts, self.statistics = pairs, step, texts, statistics
        self.of_pairs = pairs.parameters()
        self.each: dict[str, Tensor] = {}
        self.parameters: list[Tensor | None] = [None] * len(self.of_pairs)
        self.ignored = torch.zeros((), dtype=torch.int64, device=step.device)
        self.text_cls, self.tokens = _zeros(texts.cls), _zeros(texts.tokens)
        self.stored: Stored | None = None  # the gradients of the scores, where pairs are left out

    def leave_out(self, stored: Stored) -> None:
        """Differentiate the losses from the kept scores, which their cut gradients replace.

        Class tokens of images are replaced by their gradients too. Collective.
        """
        assert self.pairs.cut is not None
        units = stored.i2t.new_zeros(2)
        for features, images in self.step.image_blocks():
            image_cls = _zeros(images.cls)
            sums = FeatureGradients(image_cls, None, self.text_cls, None)
            of_cls = replace(images, patches=None)
            for chunk in self.texts.chunks_of_scores():
                for part in self.step.parts(of_cls, chunk, self.pairs.argmax_bytes // 8):
                    tile = self._tile(of_cls, chunk, part)
                    known = tile.differentiate_known(self.statistics, stored)
                    *grads, units = self._add_losses(tile, sums, known)
                    stored.replace(*tile.place, grads)
            units[1] *= len(self.step) / len(images.pair_id)  # the losses of a tile are a share
            if image_cls is not None:
                features.set_gradient("image_cls", image_cls, self.step.device)
        first = distributed.rank() * len(self.step)
        self.pairs.cut.leave_out((stored.i2t, stored.t2i), units, first)  # collective
        self.stored = stored

    def add_images(self, features: PairFeatures, images: Images) -> None:
        """Add the pairs of a micro-batch's images with all texts, and replace its image features.

        Collective.
        """
        image_cls, patches = _zeros(images.cls), _zeros(images.patches)
        sums = FeatureGradients(image_cls, patches, self.text_cls, self.tokens)
        if self.stored is not None:  # the gradients of class tokens are known
            image_cls = None
            sums = replace(sums, image_cls=None, text_cls=None)
        returned = self._add_chunks(images, sums)  # collective
        if self.texts.go_round and self.tokens is not None:
            self.tokens += returned.sum()
        if image_cls is not None:
            features.set_gradient("image_cls", image_cls, self.step.device)
        if patches is not None:
            features.set_gradient("patches", patches, self.step.device)

    def _add_chunks(self, images: Images, sums: FeatureGradients) -> ReturnedGradient:
        returned = ReturnedGradient(None)
        for chunk in self.texts.chunks():  # collective
            if self.texts.go_round:
                returned.add(chunk.owner, self._of_chunk(images, chunk, sums))  # collective
            else:
                self._add_tiles(images, chunk, sums)
        return returned

    def _of_chunk(self, images: Images, chunk: TextChunk, sums: FeatureGradients) -> Tensor:
        """Add the pairs of a chunk in a ring, and return the gradient of its tokens."""
        tokens = _zeros(chunk.tokens)
        assert tokens is not None
        self._add_tiles(images, chunk, replace(sums, tokens=tokens))
        return tokens

    def _add_tiles(self, images: Images, chunk: TextChunk, sums: FeatureGradients) -> None:
        larger = 1 if self.stored is None else LARGER
        for part in self.step.parts(images, chunk, self.pairs.argmax_bytes, larger):
            tile = self._tile(images, chunk, part)
            if self.stored is not None:
                self._add_kept(tile, sums, self.stored)
                continue
            tile.differentiate(self.statistics)
            self._add_losses(tile, sums)

    def _tile(self, images: Images, chunk: TextChunk, part: slice) -> Tile:
        return Tile(images, self.texts, chunk, part, self.pairs.score, self.pairs.keep_duplicates)

    def _add_kept(self, tile: Tile, sums: FeatureGradients, stored: Stored) -> None:
        """Add the gradients of the tile's patches and tokens, given those of its scores."""
        score = self.pairs.score
        assert isinstance(score, Scorer) and tile.patches is not None and tile.tokens is not None
        grads = cmli_gradients(
            stored.of(*tile.place),
            Sides(tile.patches, tile.tokens, tile.token_mask, tile.images.patch_mask),
            Wanted(True, True),
            backend=score.backend,
            scratch_bytes=score.scratch_bytes,
        )
        for place, grad in zip(tile.places(sums), grads, strict=False):
            place += grad

    def _add_losses(
        self, tile: Tile, sums: FeatureGradients, known: Sequence[Tensor] = ()
    ) -> tuple[Tensor, ...]:
        """Add the tile's losses and gradients; returns the gradients of further leaves, `known`."""
        each = self.pairs.of(tile, len(tile.images.pair_id) / len(self.step))
        leaves = tile.leaves()
        grads = torch.autograd.grad(
            self.step.scale * self.pairs.weighted(each),
            [*leaves, *known, *self.of_pairs],
            allow_unused=True,
        )
        for place, grad in zip(tile.places(sums), grads, strict=False):
            if grad is not None:
                place += grad
        of_known, of_parameters = grads[len(leaves) :], grads[len(leaves) + len(known) :]
        for n, grad in enumerate(of_parameters):
            if grad is not None:
                before, now = self.parameters[n], upcast(grad) / self.step.scale
                self.parameters[n] = now if before is None else before + now
        for name, loss in each.items():
            self.each[name] = loss.detach() + self.each.get(name, 0)
        if tile.duplicates is not None:
            self.ignored += tile.duplicates.sum()
        return of_known[: len(known)]


def _zeros(x: Tensor | None) -> Tensor | None:
    """Where gradients of `x` are added up: in fp32 (fp64 for fp64)."""
    if x is None:
        return None
    return torch.zeros_like(x, dtype=collectives.accumulated(x.dtype))
