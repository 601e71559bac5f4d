"""A tile: the pairs of some images and some texts of a step with gradient caching.

Shapes: a tile of R images and T texts, N patches, M text positions, H student width, D embedding
dimension. An image has W texts of its own.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count

import torch
import torch.distributed as dist
from torch import Tensor

from ds_cmli.cmli import collectives
from ds_cmli.cmli.contrastive import Own
from ds_cmli.cmli.inputs import index_dtype
from ds_cmli.cmli.ring import Score
from ds_cmli.common.probe import probe
from ds_cmli.common.trees import tree_map
from ds_cmli.config.schema import LossConfig
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses.inputs import PairInputs

# A tile that saves no indices, or that leaves some of its pairs out, has so many times the pairs.
LARGER = 8
# Fewest pairs of a tile of token scores on a CPU, if the batch has as many: below, most of a tile's
# cost is to start it.
LEAST_PAIRS = 4096
ROWS, COLUMNS = 1, 0  # the dimension of a tile's logits over which each of them is reduced


@dataclass
class TileSide:
    """Normalised features of some images or texts, and where their gradients are added up.

    The names of an image's are "image_cls", [H] fp32 (fp64), and "patches", [N, D]; of a text's
    "text_cls" and "tokens", [M, D]. Only those are there that a loss compares.
    """

    first: int  # place of the first among this rank's images, or among the texts of all ranks
    pair_id: Tensor  # int64 [.., 1 + W] of images, [.., 2] of texts: see `functions.duplicates`
    features: dict[str, Tensor]
    mask: Tensor | None  # bool [.., N] or [.., M], True = valid; None: all patches are
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.pair_id)

    @property
    def place(self) -> slice:
        return slice(self.first, self.first + len(self))

    def part(self, part: slice) -> "TileSide":
        """Some of these images or texts: views."""
        return replace(tree_map(self, lambda x: x[part]), first=self.first + part.start)

    def without(self, name: str) -> "TileSide":
        """The same without one kind of features."""
        other = replace(self, features=dict(self.features), gradients=dict(self.gradients))
        other.features.pop(name, None)
        other.gradients.pop(name, None)
        return other

    def with_zero_gradients(self) -> "TileSide":
        """The same with gradients of 0, in fp32 (fp64 for fp64)."""

        def zeros(x: Tensor) -> Tensor:
            return torch.zeros_like(x, dtype=collectives.accumulated(x.dtype))

        return replace(self, gradients=tree_map(self.features, zeros))

    def texts_of_a_tile(self, positions: int, byte_limit: int, larger: int = 1) -> int:
        """T: as many texts as have argmax indices, or else scores, of at most `byte_limit`.

        It is at least one. Where tokens are compared on a CPU, a tile has no more pairs than a
        micro-batch, so it takes no more memory, except that it has `larger` times `LEAST_PAIRS`. A
        GPU computes a tile of that size in less time than it takes to launch its kernels.
        """
        R, M = len(self), positions
        if "patches" not in self.features or not M:  # no argmax indices
            return max(1, byte_limit // (4 * R))
        N = self.features["patches"].shape[1]
        indices = R * (N * index_dtype(M).itemsize + M * index_dtype(N).itemsize)
        if probe.on_gpu(self.pair_id.device):
            return max(1, byte_limit // indices)
        return max(1, min(max(R, larger * LEAST_PAIRS // R), byte_limit // indices))


@dataclass
class _Sum:
    """One log(sum(exp)) for each of this rank's images or for each text of all ranks."""

    dim: int
    lse: Tensor
    gradient: Tensor  # of the losses of all tiles with respect to `lse`


class TileStatistics:
    """log(sum(exp)) of each row and column over all tiles and ranks, with the losses' gradients.

    They may be requested any number of times per tile; the n-th request must be for the same scores
    in every tile.
    """

    def __init__(self, images: int, texts: int) -> None:
        self.sizes = {ROWS: images, COLUMNS: texts}  # this rank's images, all ranks' texts
        self.sums: list[_Sum] = []
        self.merged = False  # whether the first pass has ended

    def begin_tile(self, rows: slice, columns: slice) -> None:
        self.places = {ROWS: rows, COLUMNS: columns}
        self.requests = count()
        self.leaves: list[Tensor] = []  # those returned for this tile in the first pass

    def logsumexp(self, logits: Tensor, dim: int) -> Tensor:
        """log(sum(exp)) over all tiles, [R, T] -> [R] or [T], with the gradient for this tile.

        The first pass adds the tile, and returns zeros, with which `end_tile` finds gradients.
        """
        n, place = next(self.requests), self.places[dim]
        if self.merged:
            known = self.sums[n].lse[place], self.sums[n].gradient[place]
            return _KnownLogSumExp.apply(logits, *known, dim)  # type: ignore[no-untyped-call]
        if n == len(self.sums):
            lse = logits.new_full((self.sizes[dim],), -torch.inf)
            self.sums.append(_Sum(dim, lse, torch.zeros_like(lse)))
        part = self.sums[n].lse[place]
        part.copy_(torch.logaddexp(part, logits.detach().logsumexp(dim)))
        self.leaves.append(torch.zeros_like(part, requires_grad=True))
        return self.leaves[n]

    def end_tile(self, loss: Tensor) -> None:
        """End a tile of the first pass: add the gradients of its weighted and scaled loss."""
        if self.leaves:
            for total, grad in zip(self.sums, torch.autograd.grad(loss, self.leaves), strict=True):
                total.gradient[self.places[total.dim]] += grad

    def merge(self) -> None:
        """End the first pass: combine the columns of all ranks. Collective."""
        self.merged = True
        for total in self.sums:
            if total.dim == COLUMNS and distributed.world_size() > 1:
                total.lse = collectives.logsumexp_over_ranks(total.lse)  # collective
                dist.all_reduce(total.gradient)  # collective; each rank's loss may use every column


class _KnownLogSumExp(torch.autograd.Function):
    """Returns `lse`; its backward uses `grad`, the gradient of the losses of all tiles."""

    @staticmethod
    def forward(ctx, logits, lse, grad, dim):
        ctx.save_for_backward(logits, lse, grad)
        ctx.dim = dim
        return lse.clone()

    @staticmethod
    def backward(ctx, tile_grad):
        logits, lse, grad = ctx.saved_tensors
        lse, grad = lse.unsqueeze(ctx.dim), grad.unsqueeze(ctx.dim)
        return (logits - lse).exp_().mul_(grad), None, None, None


@dataclass
class Tile(PairInputs):
    """What the losses compute a tile from, given the tensors that they are to be differentiated by.

    These are the features of both sides, and "s_i2t" and "s_t2i", [R, T], instead of patches and
    tokens if the scores are known; "units" then is what `cmli.cut` differentiates by.
    """

    images: TileSide
    texts: TileSide
    tensors: dict[str, Tensor]
    own_texts: Own  # where the texts of this rank's images are among those of all ranks
    statistics: TileStatistics
    score: Score
    config: LossConfig

    def __post_init__(self) -> None:
        self.units = self.tensors.get("units")
        self.statistics.begin_tile(self.images.place, self.texts.place)

    @property
    def own(self) -> Own:
        first = self.own_texts.first + self.images.first * self.own_texts.texts
        return self.own_texts._replace(first=first - self.texts.first)

    @property
    def ids(self) -> tuple[Tensor, Tensor]:
        return self.images.pair_id, self.texts.pair_id

    @cached_property
    def global_scores(self) -> Tensor:
        return self.tensors["image_cls"] @ self.tensors["text_cls"].t()

    @cached_property
    def cmli_scores(self) -> tuple[Tensor, Tensor]:
        if "s_i2t" in self.tensors:
            return self.tensors["s_i2t"], self.tensors["s_t2i"]
        probe.texts_from(self.texts.first)
        patches, tokens = self.tensors["patches"], self.tensors["tokens"]
        return self.score(patches, tokens, self.texts.mask, self.images.mask)

    def row_logsumexp(self, logits: Tensor) -> Tensor:
        return self.statistics.logsumexp(logits, ROWS)

    def column_logsumexp(self, logits: Tensor) -> Tensor:
        return self.statistics.logsumexp(logits, COLUMNS)
