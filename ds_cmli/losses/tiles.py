"""The pairs of a step with gradient caching, tile by tile.

Shapes: K micro-batches of B pairs, P ranks, G = K * B * P texts, a tile of B images and T texts,
N patches, M text positions, H student width, D embedding dimension.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from torch import Tensor

from ds_cmli.cmli import ring
from ds_cmli.cmli.inputs import index_dtype
from ds_cmli.cmli.ring import Score
from ds_cmli.common.probe import probe
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses.base import PairInputs
from ds_cmli.losses.functions import duplicates
from ds_cmli.losses.tile_statistics import COLUMNS, ROWS, TileStatistics

# A tile that saves no indices, or that leaves some of its pairs out, has so many times the pairs.
LARGER = 8
# Fewest pairs of a tile of token scores on a CPU, if the batch has as many: below, most of a tile's
# cost is to start it.
LEAST_PAIRS = 4096


def present(*tensors: Tensor | None) -> list[Tensor]:
    return [x for x in tensors if x is not None]


def _rows(x: Tensor | None, part: slice) -> Tensor | None:
    return None if x is None else x[part]


class TextChunk(NamedTuple):
    """Texts whose pairs are processed together: all of them, or those of one rank in a ring."""

    owner: int  # the rank
    tokens: Tensor | None  # [.., M, D]; None if no loss compares tokens
    mask: Tensor  # bool [.., M]


@dataclass
class Texts:
    """All G texts, normalised; ordered by rank, and for each rank by micro-batch.

    With the ring exchange (`go_round`), `tokens` and `token_mask` are those of this rank's K * B
    texts only.
    """

    pair_id: Tensor  # int64 [G, 2]
    token_mask: Tensor  # bool [G, M]
    cls: Tensor | None  # [G, H] fp32 (fp64)
    tokens: Tensor | None  # [G, M, D]
    go_round: bool

    def chunks(self) -> Iterator[TextChunk]:
        """Yields the chunk of each rank in turn in a ring, otherwise all texts as one.

        Collective.
        """
        if self.go_round:
            assert self.tokens is not None
            for chunk in ring.chunks(self.tokens, self.token_mask, None):  # collective
                yield TextChunk(*chunk)
        else:
            yield TextChunk(0, self.tokens, self.token_mask)

    def chunks_of_scores(self) -> Iterator[TextChunk]:
        """Yields the chunks where scores are known, and nothing has to be exchanged."""
        owners = range(len(self.pair_id) // len(self.token_mask))
        for owner in probe.turns(owners):
            yield TextChunk(owner, None, self.token_mask)


@dataclass
class Images:
    """The B images of a micro-batch, normalised."""

    first: int  # place of the first one among this rank's images
    pair_id: Tensor  # int64 [B, 2]
    cls: Tensor | None  # [B, H] fp32 (fp64)
    patches: Tensor | None  # [B, N, D]
    patch_mask: Tensor | None = None  # bool [B, N]; None: all

    @property
    def rows(self) -> slice:
        return slice(self.first, self.first + len(self.pair_id))

    def texts_of_a_tile(self, positions: int, byte_limit: int, larger: int = 1) -> int:
        """T: as many texts as have argmax indices, or else scores, of at most `byte_limit`.

        It is at least one. Where tokens are compared on a CPU, a tile has no more pairs than a
        micro-batch, so it takes no more memory, except that it has `larger` times `LEAST_PAIRS`. A
        GPU computes a tile of that size in less time than it takes to launch its kernels.
        """
        B = len(self.pair_id)
        if self.patches is None:
            return max(1, byte_limit // (4 * B))
        N, M = self.patches.shape[1], positions
        indices = B * (N * index_dtype(M).itemsize + M * index_dtype(N).itemsize)
        if probe.on_gpu(self.pair_id.device):
            return max(1, byte_limit // indices)
        return max(1, min(max(B, larger * LEAST_PAIRS // B), byte_limit // indices))


@dataclass(frozen=True)
class FeatureGradients:
    """Where the gradients of features are added up; None for what no loss compares."""

    image_cls: Tensor | None  # [B, H], of the images of a micro-batch
    patches: Tensor | None  # [B, N, D]
    text_cls: Tensor | None  # [G, H], of all texts
    tokens: Tensor | None  # [.., M, D], of the texts of a chunk


@dataclass(frozen=True)
class Stored:
    """The CMLI scores of this rank's R images and all G texts, [R, G] each; then their gradients.

    They are kept where pairs are left out: which ones is known only from all scores.
    """

    i2t: Tensor
    t2i: Tensor

    def of(self, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        return self.i2t[rows, columns], self.t2i[rows, columns]

    def replace(self, rows: slice, columns: slice, values: Sequence[Tensor]) -> None:
        for place, value in zip(self.of(rows, columns), values, strict=True):
            place.copy_(value)


class Tile(PairInputs):
    """B images and T texts: the texts `part` of a chunk of `texts`."""

    logsumexp: Callable[[Tensor, int], Tensor]  # given logits and the dimension
    stored: Stored | None = None  # where the first pass keeps the scores
    known: tuple[Tensor, Tensor] | None = None  # the scores, where they were kept
    units: Tensor | None = None

    def __init__(
        self,
        images: Images,
        texts: Texts,
        chunk: TextChunk,
        part: slice,
        score: Score,
        keep_duplicates: bool,
    ):
        self.images, self.part = images, part
        self.score, self.keep_duplicates = score, keep_duplicates
        before = chunk.owner * len(chunk.mask)
        self.columns = slice(before + part.start, before + part.stop)
        self.pair_ids = images.pair_id, texts.pair_id[self.columns]
        self.image_cls, self.patches = images.cls, images.patches
        self.text_cls = _rows(texts.cls, self.columns)
        self.tokens = _rows(chunk.tokens, part)
        self.token_mask = chunk.mask[part]
        per_rank = len(texts.pair_id) // distributed.world_size()
        self.of_this_rank = distributed.rank() * per_rank

    def collect_into(self, statistics: TileStatistics, stored: Stored | None) -> None:
        """Let the losses add this tile to the sums over rows and columns, and keep its scores."""
        self.stored = stored
        statistics.begin_tile(self.images.rows, self.columns)
        self.logsumexp = statistics.collect

    def differentiate(self, statistics: TileStatistics) -> None:
        """Make the tile's features leaves of a graph, and take the complete sums."""
        for name in ("image_cls", "patches", "text_cls", "tokens"):
            x = getattr(self, name)
            if x is not None:
                setattr(self, name, x.detach().requires_grad_())
        statistics.begin_tile(self.images.rows, self.columns)
        self.logsumexp = statistics.known

    def differentiate_known(self, statistics: TileStatistics, stored: Stored) -> list[Tensor]:
        """Do so with the kept scores in the place of patches and tokens.

        Returns these leaves of the graph: both scores [R, T], and the units of a cut.
        """
        self.patches = self.tokens = None
        self.differentiate(statistics)
        s_i2t, s_t2i = (x.detach().requires_grad_() for x in stored.of(*self.place))
        self.known, self.units = (s_i2t, s_t2i), s_i2t.new_zeros(2, requires_grad=True)
        return [s_i2t, s_t2i, self.units]

    @property
    def place(self) -> tuple[slice, slice]:
        """The tile's rows and columns, among this rank's images and the texts of all ranks."""
        return self.images.rows, self.columns

    def leaves(self) -> list[Tensor]:
        return present(self.image_cls, self.patches, self.text_cls, self.tokens)

    def places(self, sums: FeatureGradients) -> list[Tensor]:
        """What belongs to each of `leaves()` in these sums."""
        of_texts = _rows(sums.text_cls, self.columns), _rows(sums.tokens, self.part)
        return present(sums.image_cls, sums.patches, *of_texts)

    @property
    def first(self) -> int:
        return self.of_this_rank + self.images.first - self.columns.start

    @cached_property
    def duplicates(self) -> Tensor | None:
        if self.keep_duplicates:
            return None
        return duplicates(*self.pair_ids, self.first)

    @cached_property
    def global_scores(self) -> Tensor:
        assert self.image_cls is not None and self.text_cls is not None
        return self.image_cls @ self.text_cls.t()

    @cached_property
    def cmli_scores(self) -> tuple[Tensor, Tensor]:
        if self.known is not None:
            return self.known
        probe.texts_from(self.columns.start)
        scores = self.score(self.patches, self.tokens, self.token_mask, self.images.patch_mask)
        if self.stored is not None:
            self.stored.replace(*self.place, scores)
        return scores

    def row_logsumexp(self, logits: Tensor) -> Tensor:
        return self.logsumexp(logits, ROWS)

    def column_logsumexp(self, logits: Tensor) -> Tensor:
        return self.logsumexp(logits, COLUMNS)
