"""The losses over the pairs of a whole step, from cached features: gradient caching.

The method is that of Gao et al. (2021), with the pairs in tiles, so that neither scores nor argmax
indices of all pairs are held at once:

1. The engine computes the features of all micro-batches without a graph.
2. The normalised texts of all ranks are gathered, or pass round a ring.
3. First pass: the scores of each tile are added to log(sum(exp)) of their rows and columns. Then
   the columns are combined over ranks.
4. Second pass: the scores of each tile are computed again, and the gradients of the losses with
   respect to the tile's features are added up, those of texts over ranks too.
5. The gradient of each feature replaces it in the cache. The engine computes the features of each
   micro-batch again, and goes backward from there.

Where pairs are left out (`cmli.cut`), the first pass keeps the CMLI scores of all of this rank's
pairs (fp32, 8 bytes a pair). The losses are differentiated from them, and only the pairs whose
gradients are left are computed a second time.

Shapes: A micro-batches of B images with W texts each, P ranks, G = A * B * W * P texts, R = A * B
images of this rank.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType

import torch
from torch import Tensor

from ds_cmli.cmli import collectives, ring
from ds_cmli.cmli.contrastive import upcast
from ds_cmli.cmli.cut import Cut
from ds_cmli.cmli.inputs import Sides, Wanted
from ds_cmli.cmli.op import cmli_gradients
from ds_cmli.common.probe import probe
from ds_cmli.common.trees import tree_map
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.base import Loss
from ds_cmli.losses.pair_features import CachedStep, PairFeatures
from ds_cmli.losses.tiles import LARGER, Tile, TileSide, TileStatistics


@dataclass
class PairGradients:
    """The losses over the pairs of a step, and the gradients of their parameters."""

    total: Tensor  # the weighted sum of the losses of this rank's pairs, a scalar in fp32 (fp64)
    losses: dict[str, Tensor]  # each loss by name
    parameters: list[Tensor | None]  # the gradients, in the order of these losses' parameters
    ignored: Tensor  # how many texts of other pairs are no negatives of this rank's images
    cut: Tensor | None  # `Cut.found`, where pairs are left out


@dataclass
class PairLosses:
    """The losses over the pairs of a step, from the features of its micro-batches. Collective."""

    step: CachedStep
    losses: Mapping[str, Loss]  # those that compare pairs, by name
    weights: Mapping[str, float]  # of these losses, and perhaps of others
    score: ring.Score  # a `Scorer`, or `cmli_scores` with its options
    argmax_bytes: int  # limit for the argmax indices of a tile, which has at least one text
    config: LossConfig = field(default_factory=LossConfig)
    cut: Cut | None = None  # leaves out pairs

    def __post_init__(self) -> None:
        # Collective. `own_tokens`: of this rank's texts, if tokens pass round a ring.
        self.texts, self.own_tokens = self.step.gather_texts(self.score)
        self.statistics = TileStatistics(len(self.step), len(self.texts))
        self.kept: Tensor | None = None  # s_i2t and s_t2i where pairs are left out, [2, R, G]
        if self.cut is not None:
            tokens = (self.own_tokens or self.texts).features["tokens"]
            dtype = collectives.accumulated(tokens.dtype)
            self.kept = tokens.new_zeros(2, len(self.step), len(self.texts), dtype=dtype)

    def gradients(self) -> PairGradients:
        """Compute the losses, and replace the features by their gradients. Collective."""
        self._first_pass()  # collective
        # What is added up from here on.
        self.values: dict[str, Tensor] = {}  # of the losses
        self.parameters = [p for loss in self.losses.values() for p in loss.parameters()]
        self.of_parameters: list[Tensor | None] = [None] * len(self.parameters)
        self.ignored = torch.zeros((), dtype=torch.int64, device=self.step.device)
        self.texts = self.texts.with_zero_gradients()
        if self.own_tokens is not None:
            self.own_tokens = self.own_tokens.with_zero_gradients()
        left_out = None
        if self.cut is not None:
            self._leave_out(self.cut)  # collective
            left_out = self.cut.found
        self._second_pass()  # collective
        total = self._weighted(self.values)
        return PairGradients(total, self.values, self.of_parameters, self.ignored, left_out)

    def _first_pass(self) -> None:
        """Compute log(sum(exp)) of each row and column over all pairs. Collective."""
        for _, images in self.step.image_blocks():
            for texts in self._chunks(differentiated=False):  # collective
                self._over_tiles(self._collect, images, texts, self.argmax_bytes, LARGER)
            if not self.statistics.sums and self.kept is None:  # no loss uses them
                break
        self.statistics.merge()  # collective

    def _collect(self, images: TileSide, texts: TileSide) -> None:
        """Add a tile to log(sum(exp)), and keep its scores where pairs are left out."""
        tile = self._tile(images, texts, images.features | texts.features)
        values = self._values(tile, only_sums=True)
        if values:
            self.statistics.end_tile(self.step.scale * self._weighted(values))
        if self.kept is not None:
            for kept, scores in zip(self._kept_of(images, texts), tile.cmli_scores, strict=True):
                kept.copy_(scores)

    def _leave_out(self, cut: Cut) -> None:
        """Differentiate the losses from the kept scores, which their cut gradients replace.

        Class tokens of images are replaced by their gradients too. Collective.
        """
        assert self.kept is not None, "only token scores are cut"
        all_texts, count = self.texts.without("tokens"), len(self.own_tokens or self.texts)
        units = self.kept.new_zeros(2)
        function = partial(self._replace_kept, units)
        for micro_batch, block in self.step.image_blocks():
            images = block.without("patches").with_zero_gradients()
            for start in probe.turns(range(0, len(all_texts), count)):
                texts = all_texts.part(slice(start, start + count))
                self._over_tiles(function, images, texts, self.argmax_bytes // 8)
            units[1] *= len(self.step) / len(images)  # the losses of a tile are a share
            for name, grad in images.gradients.items():
                self.step.set_gradient(micro_batch, name, grad)
        cut.leave_out((self.kept[0], self.kept[1]), units, self.step.own)  # collective

    def _replace_kept(self, units: Tensor, images: TileSide, texts: TileSide) -> None:
        """Replace a tile's kept scores by their gradients, and `units` by that of the cut's."""
        i2t, t2i = self._kept_of(images, texts)
        scores = {"s_i2t": i2t, "s_t2i": t2i, "units": torch.zeros_like(units)}
        grads = self._differentiate(images, texts, scores)
        i2t.copy_(grads["s_i2t"])
        t2i.copy_(grads["s_t2i"])
        units.copy_(grads["units"])

    def _second_pass(self) -> None:
        """Compute the losses with their gradients, which replace the features. Collective."""
        for micro_batch, images in self.step.image_blocks():
            self._add_images(micro_batch, images)  # collective
        for name, grad in self.texts.gradients.items():
            self.step.set_text_gradients(name, collectives.sum_to_owner(grad))  # collective
        if self.own_tokens is not None:  # what has passed round a ring has been summed on its way
            self.step.set_text_gradients("tokens", self.own_tokens.gradients["tokens"])

    def _add_images(self, micro_batch: PairFeatures, images: TileSide) -> None:
        """Add the pairs of a micro-batch's images with all texts, and replace its image features.

        Collective.
        """
        function: Callable[[TileSide, TileSide], object] = self._differentiate
        larger = 1
        if self.kept is not None:  # the gradients of class tokens are known
            images = images.without("image_cls")
            function, larger = self._add_kept, LARGER
        images = images.with_zero_gradients()
        for texts in self._chunks(differentiated=True):  # collective
            self._over_tiles(function, images, texts, self.argmax_bytes, larger)
        for name, grad in images.gradients.items():
            self.step.set_gradient(micro_batch, name, grad)

    def _differentiate(
        self, images: TileSide, texts: TileSide, scores: Mapping[str, Tensor] = MappingProxyType({})
    ) -> dict[str, Tensor]:
        """Add a tile's losses and their gradients; returns the gradients, also of kept `scores`."""
        tensors = {**images.features, **texts.features, **scores}
        leaves = tree_map(tensors, lambda x: x.detach().requires_grad_())
        tile = self._tile(images, texts, leaves)
        values = self._values(tile)
        loss = self.step.scale * self._weighted(values)
        grads = torch.autograd.grad(loss, [*leaves.values(), *self.parameters], allow_unused=True)
        of_leaves = dict(zip(leaves, grads, strict=False))
        for name, total in (images.gradients | texts.gradients).items():
            if of_leaves[name] is not None:
                total += of_leaves[name]
        for n, grad in enumerate(grads[len(leaves) :]):
            if grad is not None:
                before, now = self.of_parameters[n], upcast(grad) / self.step.scale
                self.of_parameters[n] = now if before is None else before + now
        for name, value in values.items():
            self.values[name] = value.detach() + self.values.get(name, 0)
        if tile.duplicates is not None:
            self.ignored += tile.duplicates.sum()
        return of_leaves

    def _add_kept(self, images: TileSide, texts: TileSide) -> None:
        """Add the gradients of a tile's patches and tokens, given those of its scores."""
        assert isinstance(self.score, ring.Scorer) and texts.mask is not None
        patches, tokens = images.features["patches"], texts.features["tokens"]
        of_patches, of_tokens = cmli_gradients(
            self._kept_of(images, texts),
            Sides(patches, tokens, texts.mask, images.mask),
            Wanted(True, True),
            backend=self.score.backend,
            scratch_bytes=self.score.scratch_bytes,
        )
        images.gradients["patches"] += of_patches
        texts.gradients["tokens"] += of_tokens

    def _kept_of(self, images: TileSide, texts: TileSide) -> tuple[Tensor, Tensor]:
        """A tile's kept scores, or their gradients: views."""
        assert self.kept is not None
        i2t, t2i = self.kept[:, images.place, texts.place]
        return i2t, t2i

    def _chunks(self, differentiated: bool) -> Iterator[TileSide]:
        """Yields the texts of each rank in turn if tokens pass round a ring; otherwise all texts.

        The tokens' gradients that are added to a chunk, if `differentiated`, travel with it to its
        owner. Collective.
        """
        own = self.own_tokens
        if own is None:
            yield self.texts
            return
        returned = ring.ReturnedGradient(None)
        tokens, mask = own.features["tokens"], own.mask
        assert mask is not None
        for chunk in ring.chunks(tokens, mask, None):  # collective
            texts = self.texts.part(slice(chunk.owner * len(own), (chunk.owner + 1) * len(own)))
            texts.features["tokens"], texts.mask = chunk.text, chunk.mask
            if differentiated:
                texts.gradients["tokens"] = torch.zeros_like(own.gradients["tokens"])
            yield texts
            if differentiated:
                returned.add(chunk.owner, texts.gradients.pop("tokens"))  # collective
        if differentiated:
            own.gradients["tokens"] += returned.sum()

    def _over_tiles(
        self,
        function: Callable[[TileSide, TileSide], object],
        images: TileSide,
        texts: TileSide,
        limit: int,
        larger: int = 1,
    ) -> None:
        """Call `function` with each tile of a chunk, whose indices or scores fit into `limit`."""
        positions = 0 if texts.mask is None else texts.mask.shape[1]
        size = images.texts_of_a_tile(positions, limit, larger)
        for start in probe.turns(range(0, len(texts), size)):
            function(images, texts.part(slice(start, start + size)))
            self.step.heartbeat()

    def _tile(self, images: TileSide, texts: TileSide, tensors: dict[str, Tensor]) -> Tile:
        options = self.statistics, self.score, self.config
        return Tile(images, texts, tensors, self.step.own, *options)

    def _values(self, tile: Tile, only_sums: bool = False) -> dict[str, Tensor]:
        """Each loss of a tile, or each that uses sums: its share of the mean over this rank's
        images."""
        share, values = len(tile.images) / len(self.step), {}
        for name, loss in self.losses.items():
            if loss.sums or not only_sums:
                values[name] = loss(tile) * share
        return values

    def _weighted(self, values: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * x for name, x in values.items()]).sum()
