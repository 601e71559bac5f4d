"""Gradients of single pairs, where most pairs have a gradient of exactly 0.

`cmli.cut` leaves them out. An image's patches are multiplied with the tokens of all texts that it
keeps, which gives the argmax positions, unless they were saved. Each position is an entry: a weight
with which a patch is added to a token's gradient, and the token to the patch's. On a CPU only:
which pairs are kept has to be known on the host. Features are in fp32 or fp64.

Shapes: I images of N patches each; J texts, in the order of their `PackedBatch`; P kept pairs,
sorted by image, then by text, with T tokens; E entries, one for each patch and token; D features.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.chunked.forward import ArgmaxIndices
from ds_cmli.cmli.chunked.packed import Chunk, Group, PackedBatch, largest

# Nanoseconds of a position, a similarity and a token of a pair, measured at D=256 on an AMD EPYC
# with one thread: where all pairs are computed, and where kept ones alone.
NANOSECONDS = torch.tensor([[107, 12.5, 0], [230, 9, 600]])
THREADS_EXPONENT = 0.35  # many small operators gain less from threads: with two 1.27 times as dear
ROWS = 2048  # of features that are gathered or summed together, at the most
ENTRIES = 2**16  # of pairs that are sorted together, at the most; a pair itself takes as 2 more
PAIR_BYTES = 80  # of each pair where kept ones are looked for
Both = tuple[Tensor, Tensor]


def few_pairs(texts: PackedBatch, images: PackedBatch, grads: Both, saved: bool) -> bool:
    """Whether so few pairs have a gradient that it is faster to compute them alone."""
    # In 16 bits all texts' features and gradient would be held in fp32 too.
    if grads[0].device.type != "cpu" or texts.features.dtype != texts.wide:
        return False
    N, M = (sum(side.lengths) / len(side.lengths) for side in (images, texts))
    work = torch.tensor([N + M, N * M, M])
    work[1:] *= not saved  # no similarities
    of_all, of_kept = (NANOSECONDS @ work).tolist()
    of_kept *= torch.get_num_threads() ** THREADS_EXPONENT
    return all(g.count_nonzero() * of_kept <= g.numel() * of_all for g in grads)


def limits_of(texts: PackedBatch, N: int, budget: int) -> tuple[int, int, int]:
    """The images whose pairs are listed, the rows of features, and the entries that are taken
    together within so many bytes; a number is not positive if they are too few."""
    width, longest = texts.wide.itemsize, texts.lengths[-1]
    of_row = max(texts.features.shape[1] + N, 4 * N) * width + 32
    return (
        budget // 8 // (PAIR_BYTES * len(texts.lengths)),
        min(ROWS, budget * 3 // 8 // of_row - longest),
        min(ENTRIES, budget // 2 // (56 + 7 * width) - N - longest - 2),
    )


@dataclass
class KeptGradient:
    """The gradient of both sides, from the kept pairs.

    Args:
        grads: of both scores, [all images, J] each.
        saved: the argmax indices of all pairs, where they were saved.
        limits: those of `limits_of`, all positive.
    """

    texts: PackedBatch
    images: PackedBatch
    grads: Both
    saved: ArgmaxIndices | None
    limits: tuple[int, int, int]

    def add_up(self, chunks: list[Chunk], d_image: Tensor, d_text: Tensor) -> None:
        """Write the images' gradient, and add the texts'; an empty tensor if it is not wanted."""
        images, most = self.images, largest(chunks).rows
        buffers = images.load_buffers(most)
        total = images.features.new_empty(most, images.features.shape[1])
        for chunk in chunks:
            V, sums = images.load(chunk, buffers), total[: chunk.height].zero_()
            for group in chunk.groups:
                rows, own = (group.by_sequence(x, 0).flatten(0, 1) for x in (V, sums))
                sequence, row = chunk.sequence + group.sequence, chunk.row + group.row
                self._add_group(group._replace(sequence=sequence, row=row), rows, own, d_text)
            if d_image.numel():
                images.store(chunk, sums, d_image, False)

    def _add_group(self, group: Group, V: Tensor, d_image: Tensor, d_text: Tensor) -> None:
        """Add the pairs of images of one length, whose patches V and sums are [I * N, D]."""
        W, N, places = self.texts.features, group.length, self.texts.source
        for image, text, *weights in self._batches(group):
            counts = self.texts.counts[text]
            starts = counts.cumsum(0).sub_(counts)
            pair = torch.repeat_interleave(counts)  # [T]
            before = self.texts.last[text] + 1 - counts - starts
            row = before[pair].add_(torch.arange(len(pair)))
            assert places is not None
            place = places[row]  # [T] in W
            if self.saved is None:
                best_token, best_patch = self._find(place, V.unflatten(0, (-1, N)), image, counts)
            else:
                best_token, best_patch = self._saved(group, image, text, pair, row)
                best_token += counts[:, None] - 1
            first, best_token = image * N, best_token.add_(starts[:, None]).flatten()
            patches = (first[:, None] + torch.arange(N)).flatten(), first[pair].add_(best_patch)
            patch = torch.cat(patches).int()  # [E]
            token = torch.cat([place[best_token], place]).int()
            weight = torch.cat([weights[0].repeat_interleave(N), weights[1][pair]])
            del best_token, best_patch, patches
            self._add(W, token, weight, patch, d_image)
            if d_text.numel():
                self._add(V, patch, weight, token, d_text)

    def _batches(self, group: Group) -> Iterator[tuple[Tensor, ...]]:
        """Yields the group's kept pairs, as many at a time as the limits allow, [P] each: the image
        within the group, the text, and the weights of each patch's and of each token's best."""
        texts, N, first = self.texts, group.length, 0
        for order in self.images.order[group.sequences()].split(self.limits[0]):
            i2t, t2i = (g[order].index_select(1, texts.order) for g in self.grads)
            kept = (i2t != 0).logical_or_(t2i != 0).logical_and_(texts.counts > 0)
            image, text = kept.nonzero(as_tuple=True)
            weights = i2t[image, text].div_(N), t2i[image, text].mul_(texts.scale[text])
            batch = texts.counts[text].add_(N + 2).cumsum_(0).floor_divide_(self.limits[2])
            number = batch.unique_consecutive(return_counts=True)[1].tolist()
            of_all = image.add_(first), text, *weights
            yield from zip(*(x.split(number) for x in of_all), strict=True)
            first += len(order)

    def _saved(self, group: Group, image: Tensor, text: Tensor, pair: Tensor, row: Tensor) -> Both:
        """Each patch's best token [P, N], counted from the text's last, and best patches [T]."""
        assert self.saved is not None
        (i2t, t2i, *_), N = self.saved, group.length
        first = text * i2t.shape[1] + image * N + group.row
        best_token = i2t.flatten()[first[:, None] + torch.arange(N)].long().neg_()
        best_patch = t2i.flatten()[row * t2i.shape[1] + image[pair] + group.sequence]
        return best_token, best_patch.long().neg_().add_(N - 1)

    def _find(self, place: Tensor, V: Tensor, image: Tensor, counts: Tensor) -> Both:
        """Each patch's best token [P, N] and each token's best patch [T], counted from the first,
        of tokens at these places [T] with patches V [I, N, D]."""
        number = torch.arange(len(image)).sub_(torch.searchsorted(image, image))  # in its image
        part = number.floor_divide_(max(1, self.limits[1] // self.texts.lengths[-1]))
        part += image * len(image)
        sizes = part.unique_consecutive(return_counts=True)[1].tolist()
        best_token = torch.empty(len(image), V.shape[1], dtype=torch.int64)
        best_patch, start = torch.empty_like(place), 0
        parts = image.split(sizes), counts.split(sizes), best_token.split(sizes)
        for own, count, best in zip(*parts, strict=True):
            tokens = slice(start, start := start + int(count.sum()))
            S = torch.mm(self.texts.features[place[tokens]], V[int(own[0])].t())  # [tokens, N]
            starts, longest = (count.cumsum(0) - count)[:, None], int(count[-1])
            # The last position again in the place of padding.
            rows = torch.arange(longest).minimum(count[:, None] - 1).add_(starts)
            _first_best(S.index_select(0, rows.flatten()).view(*rows.shape, -1), best)
            _first_best(S, best_patch[tokens])
        return best_token, best_patch

    def _add(self, table: Tensor, index: Tensor, weight: Tensor, key: Tensor, sums: Tensor) -> None:
        """Add to row `key` of the sums the weighted row `index` of the table, for each entry."""
        key, order = key.sort(stable=True)
        index, weight = index.index_select(0, order), weight.index_select(0, order)
        rows, number = key.unique_consecutive(return_counts=True)
        numbers = number.split(self.limits[1])
        sizes = [int(each.sum()) for each in numbers]
        parts = index.split(sizes), weight.split(sizes), rows.split(self.limits[1]), numbers
        for of_table, weights, keys, number in zip(*parts, strict=True):
            starts = number.cumsum(0).sub_(number).int()
            added = F.embedding_bag(of_table, table, starts, per_sample_weights=weights, mode="sum")
            sums.index_add_(0, keys, added)


def _first_best(S: Tensor, out: Tensor) -> None:
    """Write where dimension 1 has its first maximum; its end where it is NaN. Overwrites S."""
    last = S.shape[1] - 1
    distance = torch.arange(last, -1, -1, dtype=S.dtype).view(-1, *[1] * (S.ndim - 2))
    best = S.eq_(S.amax(1, keepdim=True)).mul_(distance).amax(1)
    out.copy_(best.neg_().add_(last))
