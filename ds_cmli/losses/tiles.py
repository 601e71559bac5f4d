"""The pairs of a step with gradient caching, tile by tile.

Shapes: K micro-batches of B pairs, P ranks, G = K * B * P texts, a tile of B images and T texts, N patches, M text
positions, H student width, D embedding dimension.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from ds_cmli.cmli import ring
from ds_cmli.cmli.check import index_dtype
from ds_cmli.cmli.ring import scores_from
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses.base import PairInputs
from ds_cmli.losses.functions import duplicates
from ds_cmli.losses.tile_statistics import COLUMNS, ROWS, TileStatistics

# Fewest pairs of a tile of token scores, if the batch has as many: below, most of a tile's cost is to start it.
LEAST_PAIRS = 4096

Chunk = tuple[int, Tensor | None, Tensor]  # of texts: (rank, their tokens, their mask)


@dataclass
class Texts:
    """All G texts, normalised; ordered by rank, and for each rank by micro-batch.

    With the ring exchange (`go_round`), `tokens` and `token_mask` are those of this rank's K * B texts only.
    """

    pair_id: Tensor  # int64 [G, 2]
    token_mask: Tensor  # bool [G, M]
    cls: Tensor | None  # [G, H] fp32 (fp64)
    tokens: Tensor | None  # [G, M, D]
    go_round: bool

    def chunks(self) -> Iterator[Chunk]:
        """Yields (rank, its tokens, its mask) of each rank in turn in a ring, otherwise (0, all tokens, all masks).

        Collective.
        """
        if self.go_round:
            assert self.tokens is not None
            yield from ring.chunks(self.tokens, self.token_mask, None)  # collective
        else:
            yield 0, self.tokens, self.token_mask


@dataclass
class Images:
    """The B images of a micro-batch, normalised."""

    first: int  # place of the first one among this rank's images
    pair_id: Tensor  # int64 [B, 2]
    cls: Tensor | None  # [B, H] fp32 (fp64)
    patches: Tensor | None  # [B, N, D]

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.pair_id))

    def texts_of_a_tile(self, positions: int, byte_limit: int) -> int:
        """T: as many texts as have argmax indices, or else scores, of at most `byte_limit`, but at least one.

        Where tokens are compared a tile has no more pairs than a micro-batch, so it takes no more memory, except that
        it has `LEAST_PAIRS`.
        """
        B = len(self.pair_id)
        if self.patches is None:
            return max(1, byte_limit // (4 * B))
        N, M = self.patches.shape[1], positions
        indices = B * (N * index_dtype(M).itemsize + M * index_dtype(N).itemsize)
        return max(1, min(max(B, LEAST_PAIRS // B), byte_limit // indices))


class Tile(PairInputs):
    """B images and T texts.

    Args:
        chunk: one of `texts.chunks()`.
        part: which texts of the chunk the tile has.
        known: whether the sums in `statistics` are complete. If so, the tile's features are leaves of a graph.
    """

    def __init__(
        self,
        images: Images,
        texts: Texts,
        chunk: Chunk,
        part: slice,
        statistics: TileStatistics,
        score: Callable[..., tuple[Tensor, Tensor]],
        keep_duplicates: bool,
        known: bool,
    ):
        def leaf(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().requires_grad_(known)

        owner, tokens, mask = chunk
        self.images, self.part, self.score, self.keep_duplicates = (
            images,
            part,
            score,
            keep_duplicates,
        )
        self.columns = slice(owner * len(mask) + part.start, owner * len(mask) + part.stop)
        self.pair_ids = images.pair_id, texts.pair_id[self.columns]
        self.image_cls, self.patches = leaf(images.cls), leaf(images.patches)
        self.text_cls = leaf(None if texts.cls is None else texts.cls[self.columns])
        self.tokens, self.token_mask = leaf(None if tokens is None else tokens[part]), mask[part]
        self.of_this_rank = distributed.rank() * (len(texts.pair_id) // distributed.world_size())
        statistics.begin_tile(images.rows, self.columns)
        self.logsumexp = statistics.known if known else statistics.collect

    def leaves(self) -> list[Tensor]:
        return [
            x for x in (self.image_cls, self.patches, self.text_cls, self.tokens) if x is not None
        ]

    def places(
        self,
        image_cls: Tensor | None,
        patches: Tensor | None,
        text_cls: Tensor | None,
        tokens: Tensor | None,
    ) -> list[Tensor]:
        """What belongs to each of `leaves()` in tensors like those of the images, of all texts and of the chunk."""
        of_texts = (
            text_cls if text_cls is None else text_cls[self.columns],
            tokens if tokens is None else tokens[self.part],
        )
        return [x for x in (image_cls, patches, *of_texts) if x is not None]

    @property
    def first(self) -> int:
        return self.of_this_rank + self.images.first - self.columns.start

    @cached_property
    def duplicates(self) -> Tensor | None:
        return None if self.keep_duplicates else duplicates(*self.pair_ids, self.first)

    @cached_property
    def global_scores(self) -> Tensor:
        assert self.image_cls is not None and self.text_cls is not None
        return self.image_cls @ self.text_cls.t()

    @cached_property
    def cmli_scores(self) -> tuple[Tensor, Tensor]:
        return scores_from(
            self.columns.start, self.score, self.patches, self.tokens, self.token_mask
        )

    def row_logsumexp(self, logits: Tensor) -> Tensor:
        return self.logsumexp(logits, ROWS)

    def column_logsumexp(self, logits: Tensor) -> Tensor:
        return self.logsumexp(logits, COLUMNS)
