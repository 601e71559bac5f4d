"""Indices and gradients of single pairs, where most pairs have a gradient of exactly 0.

`cmli.cut` leaves them out. The tokens of all texts that an image keeps are gathered for one
product, and the entries of kept pairs alone are sorted and summed. On a CPU only: which pairs are
kept has to be known on the host.

Shapes: I images, J texts, in the order of their `PackedBatch`; N patches; T tokens of kept texts;
E entries, one for each maximum of a row of a kept pair. Sides are named as in `backward.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.chunked.forward import ArgmaxIndices
from ds_cmli.cmli.chunked.packed import Chunk, Group, PackedBatch, largest
from ds_cmli.cmli.chunked.product import product
from ds_cmli.cmli.chunked.tile_gradients import Tile, TileIndices

FEW = 0.2  # The largest share of pairs for which this is faster than all pairs, as measured.
TOKENS = 512  # of a product, at the most
SIMILARITIES = 2**18  # whose maxima are found together, at the most
SIMILARITY_BYTES = 32  # of each, with copies


def few_pairs(grads: tuple[Tensor, Tensor]) -> bool:
    """Whether so few pairs have a gradient that they are computed alone."""
    of_all = FEW * grads[0].numel()
    return grads[0].device.type == "cpu" and all(g.count_nonzero() <= of_all for g in grads)


def find_indices(
    texts: PackedBatch,
    images: PackedBatch,
    image_chunks: list[Chunk],
    grads: tuple[Tensor, Tensor],
    indices: ArgmaxIndices,
    budget: int,
) -> None:
    """Fill in the indices of these images' pairs that have a gradient.

    `budget`: bytes for the similarities of one pair or more, and for the tokens of a product.
    """
    elements = min(SIMILARITIES, budget // 2 // SIMILARITY_BYTES)
    most = min(TOKENS, budget // 8 // (images.features.shape[1] * images.wide.itemsize))
    buffers = images.load_buffers(largest(image_chunks).rows)
    for chunk in image_chunks:
        V = images.load(chunk, buffers)
        for group in chunk.groups:
            patches = V.narrow(0, group.row, group.number * group.length)
            here = group._replace(
                sequence=chunk.sequence + group.sequence, row=chunk.row + group.row
            )
            kept = torch.zeros(group.number, len(texts.counts), dtype=torch.bool)
            for grad in grads:
                kept |= grad[images.order[here.sequences()]] != 0
            kept = kept.index_select(1, texts.order).logical_and_(texts.counts > 0)
            image, text = kept.nonzero(as_tuple=True)
            size = max(1, elements // (group.length * texts.lengths[-1]))
            for pairs in zip(image.split(size), text.split(size), strict=True):
                _find(texts, here, patches, pairs, indices, max(1, most))


def _find(
    texts: PackedBatch,
    group: Group,
    patches: Tensor,
    pairs: tuple[Tensor, Tensor],
    indices: ArgmaxIndices,
    most: int,
) -> None:
    """Fill in the indices of pairs with images of one length, sorted by image within the group.

    `most`: tokens of a product.
    """
    (image, text), N = pairs, group.length
    counts = texts.counts[text]
    pair, token = _rows_of(counts, (texts.last - texts.counts + 1)[text])  # [T]
    S = patches.new_empty(len(token), N)
    each, number = image.unique_consecutive(return_counts=True)
    stops = counts.cumsum(0)[number.cumsum(0) - 1].tolist()
    start = 0
    for sequence, stop in zip(each.tolist(), stops, strict=True):
        V = patches.narrow(0, sequence * N, N)
        for first in range(start, stop, most):
            part = slice(first, min(first + most, stop))
            S[part] = product(texts.rows(token[part]), V)
        start = stop
    column = image + (group.sequence - indices.sequence)
    indices.arg_t2i[token, column[pair]] = _first_best(S, 1).to(indices.arg_t2i.dtype)
    row = image * N + (group.row - indices.row)
    starts = counts.cumsum(0) - counts
    for length in counts.unique().tolist():
        same = (counts == length).nonzero()[:, 0]
        rows = starts[same][:, None] + torch.arange(length)
        block = S.index_select(0, rows.flatten()).view(*rows.shape, N)
        where = text[same][:, None], row[same][:, None] + torch.arange(N)
        indices.arg_i2t[where] = _first_best(block, 1).to(indices.arg_i2t.dtype)


def _first_best(S: Tensor, dim: int) -> Tensor:
    """The first maximum's distance from the last position."""
    distance = torch.arange(S.shape[dim] - 1, -1, -1, dtype=S.dtype)
    shape = [1] * S.ndim
    shape[dim] = -1
    equal = (S.amax(dim, keepdim=True) == S).to(S.dtype)
    return equal.mul_(distance.view(shape)).amax(dim)


def _rows_of(counts: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of sequences with these lengths and first rows: which sequence's, and the row."""
    sequence = torch.repeat_interleave(counts)
    before = first - counts.cumsum(0) + counts
    return sequence, before.index_select(0, sequence).add_(torch.arange(len(sequence)))


class Kept:
    """A tile's pairs that have a gradient."""

    def __init__(self, tile: Tile):
        self.tile, self.own_pairs, self.other_pairs = tile, tile.own_pairs(), tile.other_pairs()
        kept = (self.own_pairs != 0).logical_or_(self.other_pairs != 0)
        self.pairs = kept.nonzero(as_tuple=True)  # sorted by own sequence

    def __len__(self) -> int:
        return len(self.pairs[0])


def add_kept(
    kept: Kept, tile_indices: TileIndices, table: Tensor, sums: Tensor, entries: int
) -> None:
    """Add to `sums` [rows, D] both kinds of weighted rows, of the tile's kept pairs.

    `entries`: how many of them are sorted together, but those of one pair at least.
    """
    tile = kept.tile
    own_chunk, other_chunk = tile.own_chunk, tile.other_chunk
    won, lost = tile_indices(own_chunk, other_chunk)
    own, other = _Places(tile.own, own_chunk), _Places(tile.other, other_chunk)
    numbers = torch.arange(own_chunk.height, dtype=torch.int32)
    size = max(1, entries // (own_chunk.shape().longest + other_chunk.shape().longest))
    for x, y in zip(*(each.split(size) for each in kept.pairs), strict=True):
        pair, row = own.rows(x)
        of_pair = y, other.last[y], kept.own_pairs[x, y]
        column, winner, shares = (values.index_select(0, pair) for values in of_pair)
        winner -= won[row, column]
        pair, loser = other.rows(y)
        of_pair = x, own.last[x], kept.other_pairs[x, y]
        sequence, key, of_lost = (values.index_select(0, pair) for values in of_pair)
        key -= lost[sequence, loser]
        keys, order = torch.cat([row, key]).to(torch.int32).sort(stable=True)
        of_table = torch.cat([winner, loser]).index_select(0, order)
        shares = torch.cat([shares, of_lost]).index_select(0, order)
        rows = slice(int(keys[0]), int(keys[-1]) + 1)
        starts = torch.searchsorted(keys, numbers[rows])
        sums[rows] += F.embedding_bag(
            of_table, table, starts, per_sample_weights=shares, mode="sum"
        )


class _Places:
    """Where a chunk's sequences are among its rows."""

    def __init__(self, side: PackedBatch, chunk: Chunk):
        self.counts = side.counts[chunk.sequences()]
        self.last = side.last[chunk.sequences()].long() - chunk.row

    def rows(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """All rows of these sequences: which of them, and the row in the chunk."""
        return _rows_of(self.counts[sequences], (self.last - self.counts + 1)[sequences])
