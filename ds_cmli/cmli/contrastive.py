"""The contrastive loss of pair scores with a learned temperature, as pure functions of tensors.

Shapes: a tile of the scores of all pairs, R images and T texts; an image has W texts of its own,
of which K are right and the last J are wrong.
Everything is computed in fp32, or in fp64 for fp64 inputs.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.inputs import check_shapes

SHORTEST = 1e-12  # length of a row that has a direction, as in `F.normalize`
MAX_SCALE = 100.0  # the maximum of 1/temperature, as in CLIP (Radford et al., 2021)
# Of a sigmoid loss on cosines: SigLIP's models have learned up to 120, without a maximum.
MAX_SIGMOID_SCALE = 1000.0


def upcast(x: Tensor) -> Tensor:
    """Cast to fp32; fp64 stays fp64."""
    return x if x.dtype == torch.float64 else x.float()


def unit_rows(x: Tensor) -> Tensor:
    """Unit length over the last dimension, in fp32 (fp64 for fp64), as by `F.normalize`.

    A row of zeros, or shorter than `SHORTEST`, has no direction: it gives zeros, and its gradient
    is 0, where that of `F.normalize` is divided by `SHORTEST`.
    """
    x = upcast(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / F.threshold(length, SHORTEST, math.inf)


def temperature_scale(logit_scale: Tensor, most: float = MAX_SCALE) -> Tensor:
    """exp(logit_scale), at most `most`, in fp32.

    The clamp is a straight-through one: above it the value is constant but the gradient still
    passes, so a parameter that drifted over the limit can return. A plain clamp has no gradient
    there, and the parameter would stay stuck.
    """
    x = upcast(logit_scale)
    return (x + (x.clamp(max=math.log(most)) - x).detach()).exp()


class Own(NamedTuple):
    """Which columns of a tile are its rows' own texts: row r's are the W from first + r * W on."""

    first: int = 0  # may lie outside of the tile
    texts: int = 1  # W, the number of each image's own texts
    wrong: int = 0  # J, how many of them, the last ones, are wrong captions of the image

    @property
    def right(self) -> int:
        """K."""
        return self.texts - self.wrong

    @classmethod
    def of(cls, first: "int | Own | None") -> "Own":
        """Itself, or one text for each image from column `first` on; None: from 0 on."""
        return first if isinstance(first, Own) else cls(first or 0)

    def pairs(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Rows and columns, int64, of the right pairs that the tile [R, T] has, image by image."""
        rows, columns = scores.shape
        start = max(0, -self.first)
        stop = max(start, min(rows * self.texts, columns - self.first))
        right = torch.arange(self._right(start), self._right(stop), device=scores.device)
        row = right // self.right
        return row, right + row * self.wrong + self.first

    def _right(self, count: int) -> int:
        """How many of the first own texts, image by image, are right."""
        images, rest = divmod(count, self.texts)
        return images * self.right + min(rest, self.right)

    def places(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """The row whose own text each column is, and which of its W: int64 [T] each."""
        text = torch.arange(scores.shape[1], device=scores.device) - self.first
        return text.div(self.texts, rounding_mode="floor"), text % self.texts

    def of_each(self, scores: Tensor) -> Iterator[Tensor]:
        """Yields the columns of the k-th text of every image, a view, for each of the W."""
        for k in range(self.texts):
            yield scores[:, (self.first + k) % self.texts :: self.texts]


def check_tile(first: int | Own | None, **tiles: Tensor | None) -> None:
    """Raise ValueError unless all have one shape [R, T]; R = T for a whole batch, without
    `first`."""
    legend = "B B" if first is None else "R T"
    check_shapes(**{name: (tile, legend) for name, tile in tiles.items() if tile is not None})


def contrastive_loss(
    s_i2t: Tensor,
    s_t2i: Tensor,
    logit_scale: Tensor,
    first: int | Own | None = None,
    row_logsumexp: Callable[[Tensor], Tensor] = lambda logits: logits.logsumexp(1),
    column_logsumexp: Callable[[Tensor], Tensor] = lambda logits: logits.logsumexp(0),
    ignore: Tensor | None = None,
) -> Tensor:
    """(CE(rows of t * s_i2t) + CE(columns of t * s_t2i)) / 2, summed over the tile's pairs and
    divided by R.

    Of K right texts each is the target of 1 / K of its image (Khosla et al., 2020, equation 2), and
    the columns of all of them count alike. Wrong texts are columns of the rows alone.

    Args:
        s_i2t: [R, T] fp32 or fp64, images against texts, scored from the image's side (3).
        s_t2i: [R, T], the same scored from the text's side (4); the global loss passes one matrix
            twice.
        logit_scale: one element, ln(1/temperature).
        first: the column that belongs to row 0: row r's text is column first + r, if the tile has
            it; or the columns of K texts of each image, as `Own`. None: the tile is the whole
            batch, as many texts as images.
        row_logsumexp: [R, T] -> [R], over all texts of the batch, or -> [R, K], what the k-th own
            text is compared with. The default is right if the tile has all texts.
        column_logsumexp: [R, T] -> [T], over all images of the batch, likewise; for images of
            several ranks pass `collectives.column_logsumexp`.
        ignore: bool [R, T], images and texts that are no negatives of each other; None: there are
            none.

    Returns:
        A scalar. Summed over the tiles of the same images, and averaged over those of all ranks, it
        is the loss of the whole batch.

    Raises:
        ValueError: on shapes that do not fit.
    """
    check_tile(first, s_i2t=s_i2t, s_t2i=s_t2i, ignore=ignore)
    scale = temperature_scale(logit_scale)  # one element
    rows, columns = scale * s_i2t, scale * s_t2i  # [R, T]
    if ignore is not None:
        rows.masked_fill_(ignore, -torch.inf)
        columns.masked_fill_(ignore, -torch.inf)
    own = Own.of(first)
    r, t = own.pairs(rows)
    sums = row_logsumexp(rows)  # [R] or [R, K]
    row_loss = (sums[r] if sums.dim() == 1 else sums[r, (t - own.first) % own.texts]) - rows[r, t]
    if own.wrong:  # a wrong text that counts for no image would have a sum of nothing
        columns.masked_fill_(own.places(columns)[1] >= own.right, 0.0)
    column_loss = column_logsumexp(columns)[t] - columns[r, t]
    return (row_loss.sum() + column_loss.sum()) / (2 * len(rows) * own.right)
