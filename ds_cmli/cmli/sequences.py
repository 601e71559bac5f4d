"""What `maxsim` takes that `cmli_scores` does not: masks that are left out, packed sequences,
documents of each query.

Shape legend: Q queries of L_q tokens, C documents of L_d, K documents of each query, D features;
R tokens of all sequences of a packed side.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ds_cmli.cmli.inputs import (
    LONGEST_SIDE,
    Names,
    Sides,
    boolean,
    check_inputs,
    check_positions,
    check_tensors,
    promoted,
    refuse_other_derivatives,
    valid_positions,
)
from ds_cmli.cmli.without_data import assumed

MAXSIM = Names(
    *("maxsim", "documents", "queries", "query_mask", "document_mask"),
    *("[C, L_d, D] or packed [R, D]", "[Q, L_q, D] or packed [R, D]"),
)


def accepted_maxsim(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None,
    document_mask: Tensor | None,
    backend: str,
    scratch_bytes: int,
) -> tuple[Sides, Tensor]:
    """The arguments of `maxsim`, documents as images and queries as texts; and the valid tokens of
    each query [Q].

    Each query's own documents [Q, K, L_d, D] are images [Q * K, L_d, D].

    Raises:
        TypeError, ValueError, RuntimeError: as `inputs.accepted`.
    """
    check_tensors({"queries": queries, "documents": documents})
    shape = list(documents.shape)
    if documents.ndim == 4:
        if document_mask is not None:
            document_mask = boolean("document_mask", document_mask)
            check_tensors({"document_mask": document_mask})
            check_positions("document_mask", document_mask, "documents", documents)
            document_mask = document_mask.flatten(0, 1)
        documents = documents.flatten(0, 1)
    documents, queries = promoted(documents, queries)
    if document_mask is not None or documents.ndim == 2:
        document_mask = _mask("document_mask", document_mask, "documents", documents)
    if query_mask is None and queries.ndim != 2:
        query_mask = queries.new_ones(queries.shape[:2], dtype=torch.bool)
    else:
        query_mask = _mask("query_mask", query_mask, "queries", queries)
    check_inputs(documents, queries, query_mask, document_mask, backend, scratch_bytes, MAXSIM)
    refuse_other_derivatives(MAXSIM.call, documents, queries)
    sides = Sides(documents, queries, query_mask, document_mask, True)
    counts = valid_positions(query_mask)
    if len(shape) == 4:
        if shape[0] != len(counts):
            raise ValueError(
                f"documents [Q, K, L_d, D] has shape {shape}: there are {len(counts)} queries"
            )
        sides = sides._replace(own=shape[1])
    return sides, counts


def of_each_query(sides: Sides) -> Iterator[Sides]:
    """Yields each query alone with its own documents. CPU-GPU sync for packed queries."""
    if sides.text.ndim == 2:
        lengths = sides.token_mask.diff().tolist()  # CPU-GPU sync
        texts = sides.text.split(lengths)
        token_masks = [sides.token_mask.new_tensor([0, length]) for length in lengths]
    else:
        texts, token_masks = sides.text.split(1), list(sides.token_mask.split(1))
    image_masks: Sequence[Tensor | None] = [None] * len(texts)
    if sides.image_mask is not None:
        image_masks = sides.image_mask.split(sides.own)
    images = sides.image.split(sides.own)
    for parts in zip(images, texts, token_masks, image_masks, strict=True):
        yield Sides(*parts, True)


def _mask(name: str, mask: Tensor | None, of: str, features: Tensor) -> Tensor:
    """A mask as bool; where packed features begin as int64, at a CPU-GPU sync."""
    if features.ndim != 2 and mask is not None:
        return boolean(name, mask)
    if mask is None:
        raise ValueError(
            f"{of} of shape {list(features.shape)} are packed: give in {name} the row at which "
            "each sequence begins, and the number of rows (cu_seqlens)"
        )
    check_tensors({name: mask})
    if mask.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} of packed {of} must be int32 or int64, not {mask.dtype}")
    if mask.ndim != 1 or len(mask) < 2:
        raise ValueError(
            f"{name} of packed {of} has shape {list(mask.shape)}; it must be one number more than "
            "there are sequences"
        )
    return _starts(mask, len(features), name)


# An operator, so that torch.compile and fake tensors do not look at the values.
@torch.library.custom_op("ds_cmli::sequence_starts", mutates_args=())
def _starts(starts: Tensor, rows: int, name: str) -> Tensor:
    values = starts.tolist()  # CPU-GPU sync
    lengths = starts.diff().tolist()
    if values[0] != 0 or values[-1] != rows or min(lengths) < 0:
        raise ValueError(
            f"{name} goes from {values[0]} to {values[-1]}: it must rise from 0 to the number of "
            f"rows, {rows}"
        )
    if max(lengths) > LONGEST_SIDE:
        raise ValueError(
            f"{name} has a sequence of {max(lengths)}; at most {LONGEST_SIDE} are supported"
        )
    return starts.to(torch.int64, copy=True)


@_starts.register_fake
def _(starts, rows, name):
    return torch.empty_like(starts, dtype=torch.int64)


class Packing:
    """The places of a packed side's rows in a padded one. CPU-GPU sync for the longest length.

    Args:
        starts: int64 [B + 1], the row at which each sequence begins, and R.
        longest: the longest sequence, if it is known.
    """

    def __init__(self, starts: Tensor, longest: int | None = None):
        lengths = starts.diff()
        longest = int(lengths.max()) if longest is None else longest  # CPU-GPU sync
        place = torch.arange(max(1, longest), device=starts.device)
        self.valid = place < lengths[:, None]  # [B, P]
        # [B, P]: the row of each place; some row where there is none.
        self.rows = torch.where(self.valid, starts[:-1, None] + place, 0)

    def pad(self, x: Tensor, dim: int = 0) -> Tensor:
        """[.., R, ..] -> [.., B, P, ..], with any values outside of the sequences."""
        if not x.shape[dim]:  # of no rows, a zero is some row
            zero = x.new_zeros((*x.shape[:dim], 1, *x.shape[dim + 1 :]))
            x = torch.cat([x, zero], dim)
        return x.index_select(dim, self.rows.flatten()).unflatten(dim, self.rows.shape)

    def pack(self, x: Tensor, rows: int, dim: int = 0) -> Tensor:
        """[.., B, P, ..] -> [.., R, ..]."""
        place = torch.nonzero_static(self.valid.flatten(), size=rows)[:, 0]
        return x.flatten(dim, dim + 1).index_select(dim, place)


def packings(sides: Sides) -> tuple[Packing | None, Packing | None]:
    """The packings of the images and of the texts, as far as they are packed."""
    known, of_images, of_texts = assumed(), None, None
    longest: list[int | None] = [None, None]
    if known is not None:
        texts = sides.sizes()[1]
        longest = [max(known.lengths[texts:], default=None), max(known.lengths[:texts])]
    if sides.image.ndim == 2 and sides.image_mask is not None:
        of_images = Packing(sides.image_mask, longest[0])
    if sides.text.ndim == 2:
        of_texts = Packing(sides.token_mask, longest[1])
    return of_images, of_texts


def padded(sides: Sides, of_images: Packing | None, of_texts: Packing | None) -> Sides:
    """The same with no side packed."""
    if of_images is not None:
        sides = sides._replace(image=of_images.pad(sides.image), image_mask=of_images.valid)
    if of_texts is not None:
        sides = sides._replace(text=of_texts.pad(sides.text), token_mask=of_texts.valid)
    return sides
