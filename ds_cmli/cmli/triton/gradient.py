"""The gradient of one side of the pairs: by the dense kernel or by the sparse ones, chosen on the
device from what the masks and the score gradients leave to do.

Shape legend: P sequences of the gradient's side, Q of the other, D features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ds_cmli.cmli.triton.backward_kernel import gradient_kernel
from ds_cmli.cmli.triton.library import tl, triton
from ds_cmli.cmli.triton.sparse_kernels import pairs_kernel, sort_kernel, sparse_gradient_kernel
from ds_cmli.cmli.triton.tiles import (
    Sequences,
    backward_tiles,
    device_limits,
    launcher,
    power_of_two,
    row_tiles,
    source_steps,
)

SEGMENTS = 8  # programs that sort the pairs of one sequence
CHUNK = 256  # pairs or sequences that are looked at together
# Of the sparse gradient kernel: listed positions a product takes, sequences that a row gathers from
# at a time. Four warps take 80 to 165 registers: three programs share a multiprocessor.
SPARSE = {"STEP": 32, "UNROLL": 4, "num_warps": 4, "num_stages": 2}
# Positions: the warp that sorts holds a matrix of 16 of Q or more and all tiles of P, of
# `SORTED` entries or more. With 256 tiles it takes up to 168 registers, with 512 all.
LONGEST, SORTED = 4096, 1024


class Costs(NamedTuple):
    """Warp instructions for 256 features, counted in the kernels compiled for sm_80.

    A row of 16 bits that is gathered takes 27 or 30, but its 512 bytes come from L2 while an A100
    executes 40, at 55% of its rate, and an H100 85, at its full rate: assumed, of 4.5 and 5.6 TB/s.
    """

    dense: float  # a row times a position of the source
    gathered: float  # a row, from what it won in one sequence
    listed: float  # a position that won a row, its sorting included


COSTS = {
    torch.float16: Costs(1.3, 40.0, 41.0),
    torch.bfloat16: Costs(1.8, 40.0, 46.0),
    torch.float32: Costs(13.0, 33.0, 206.0),
    torch.float64: Costs(13.0, 68.0, 170.0),
}
SM_90 = Costs(1.1, 85.0, 85.0)  # of both 16-bit types


def costs(dtype: torch.dtype, capability: tuple[int, int]) -> Costs:
    """What `sparse_pays` compares on a GPU."""
    return SM_90 if capability[0] == 9 and dtype.itemsize == 2 else COSTS[dtype]


class OneSide(NamedTuple):
    """One side of the pairs in a backward.

    The pair axes of indices and gradients are images and texts, in this order.
    """

    sequences: Sequences
    # [I, J, positions]: what each position of this side won; [I, J, 0] if only the other side wins.
    indices: Tensor
    grad: Tensor  # [I, J], of the score that is a mean over this side's positions

    def wins(self) -> bool:
        return self.indices.shape[2] > 0


class Lists(NamedTuple):
    """Sizes of the lists that the sparse kernels take for one side."""

    bits: int  # that number a position of Q
    tiles: int
    width: int  # positions that are sorted together
    group: int  # sequences of P at a time

    @classmethod
    def of(cls, p: tuple[int, int], q: tuple[int, int], list_bytes: int) -> "Lists | None":
        """Lists within `list_bytes`, of one sequence at least.

        None: the dense kernel runs in any case, as P has more than `LONGEST` positions or an entry
        does not fit 32 bits.

        Args:
            p, q: sequences and positions of each.
        """
        (P, p_length), (Q, q_length) = p, q
        bits = (q_length - 1).bit_length()
        if p_length > LONGEST or Q << bits >= 2**27:
            return None
        tiles = max(2, power_of_two(p_length) // 16)
        width = max(16, min(power_of_two(q_length), SORTED // tiles))
        one = 4 * (Q * q_length + SEGMENTS * tiles + tiles + 1)
        return cls(bits, tiles, width, min(P, max(1, list_bytes // one)))


def sparse_features(D: int, dtype: torch.dtype) -> int:
    """Features that a program of the sparse gradient kernel owns."""
    return min(512 // dtype.itemsize, power_of_two(D))


@triton.jit
def sparse_pays(kept, P, Q, p_rows, q_steps, q_positions, dense, gathered, listed):
    """Whether the sparse kernels take fewer instructions than the dense one.

    The dense kernel multiplies every row of P, in tiles of 16, with every position of Q, in steps
    of 16: `p_rows * q_steps` times `dense` instructions, whatever the coefficients. The sparse
    kernels visit the kept pairs alone. There each row of P gathers one row, and each position of Q
    is sorted and added once: `gathered * p_rows / P + listed * q_positions / Q` instructions a
    pair on average. With all pairs kept and 196 patches, dense wins below about 25 tokens in bf16
    and 35 in fp16.
    """
    a_pair = gathered * p_rows / P + listed * q_positions / Q
    return kept * a_pair < dense * p_rows * q_steps


@triton.jit(do_not_specialize=["P", "Q"])
def choose_kernel(
    sparse,  # [1] int32 out
    kept_count,  # [P] int32
    p_ends,  # [P] int32, last valid position + 1
    q_ends,  # [Q]
    q_count,  # [Q] int32, valid positions
    P,
    Q,
    dense,
    gathered,
    listed,
    CHUNK: tl.constexpr,
):
    kept, rows = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for start in range(0, P, CHUNK):
        p = start + tl.arange(0, CHUNK)
        kept += tl.sum(tl.load(kept_count + p, mask=p < P, other=0).to(tl.float32), 0)
        ends = tl.load(p_ends + p, mask=p < P, other=0)
        rows += tl.sum(((ends + 15) // 16 * 16).to(tl.float32), 0)
    steps, positions = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for start in range(0, Q, CHUNK):
        q = start + tl.arange(0, CHUNK)
        ends = tl.load(q_ends + q, mask=q < Q, other=0)
        steps += tl.sum(((ends + 15) // 16 * 16).to(tl.float32), 0)
        positions += tl.sum(tl.load(q_count + q, mask=q < Q, other=0).to(tl.float32), 0)
    pays = sparse_pays(kept, P, Q, rows, steps, positions, dense, gathered, listed)
    tl.store(sparse, pays.to(tl.int32))


class KeptPairs(NamedTuple):
    """What `pairs_kernel` finds, and the choice."""

    scale: Tensor
    kept: Tensor
    kept_count: Tensor
    p_weight: Tensor
    q_weight: Tensor
    sparse: Tensor

    @classmethod
    def of(cls, p: OneSide, q: OneSide, p_axis: int) -> "KeptPairs":
        P, Q = p.sequences, q.sequences
        shape, integers = (P.sequences, Q.sequences), P.counts
        pairs = cls(
            p.grad.new_empty(P.sequences),
            integers.new_empty(shape),
            integers.new_empty(P.sequences),
            p.grad.new_empty(shape),
            p.grad.new_empty(shape),
            integers.new_zeros(1),
        )
        strides = p.grad.stride(p_axis), p.grad.stride(1 - p_axis)
        launcher(pairs_kernel, (P.sequences,))(
            *pairs[:5], P.counts, Q.counts, p.grad, q.grad, *strides, Q.sequences, WIDTH=CHUNK
        )
        return pairs


def write_gradient(
    out: Tensor, source: Tensor, p: OneSide, q: OneSide, p_axis: int, list_bytes: int
) -> None:
    """Write the gradient `out` of side p, zeros before, a sum of features `source` of side q.

    Args:
        p_axis: the place of p's sequences among the axes of indices and gradients, 0 or 1.
        list_bytes: bound on the sparse kernels' lists; those of one sequence are always made.
    """
    P, Q = p.sequences, q.sequences
    pairs = KeptPairs.of(p, q, p_axis)
    lists = Lists.of((P.sequences, P.length), (Q.sequences, Q.length), list_bytes)
    if lists is not None:
        inputs = (pairs.kept_count, P.ends, Q.ends, Q.counts, P.sequences, Q.sequences)
        dense, gathered, listed = costs(out.dtype, device_limits(out.device)[0])
        amounts = dense, gathered * p.wins(), listed * q.wins()
        launcher(choose_kernel, (1,))(pairs.sparse, *inputs, *amounts, CHUNK=CHUNK)
        write_sparse(out, source, p, q, p_axis, lists, pairs)
    write_dense(out, source, p, q, p_axis, pairs)


def write_sparse(
    out: Tensor,
    source: Tensor,
    p: OneSide,
    q: OneSide,
    p_axis: int,
    lists: Lists,
    pairs: KeptPairs,
) -> None:
    """Write `out` by the sparse kernels if `pairs.sparse` is not 0, a group of P at a time."""
    P, Q = p.sequences, q.sequences
    D, features = out.shape[-1], sparse_features(out.shape[-1], out.dtype)
    integers, other = P.counts, 1 - p_axis
    listed = lists.group * q.wins()
    counts = integers.new_empty((listed, SEGMENTS, lists.tiles))
    entries = integers.new_empty((listed, Q.sequences * Q.length))
    starts = integers.new_empty((listed, lists.tiles + 1))
    sorting = {"TILES": lists.tiles, "WIDTH": lists.width, "SEGMENTS": SEGMENTS, "num_warps": 1}
    adding = {"D": D, "BD": features, "TILES": lists.tiles, "P_MASKED": P.masked, **SPARSE}
    adding |= {"TWO_TERMS": out.dtype == torch.bfloat16, "P_WINS": p.wins(), "Q_WINS": q.wins()}
    blocks, parts = math.ceil(P.length / 16), math.ceil(D / features)
    for start in range(0, P.sequences, lists.group):
        some = slice(start, start + lists.group)
        number = len(integers[some])
        p_win = p.indices.narrow(p_axis, start, number)
        q_win = q.indices.narrow(p_axis, start, number)
        scale, kept, kept_count, p_weight, q_weight = (x[some] for x in pairs[:5])
        sorted_ = (counts, entries, starts, pairs.sparse, kept, kept_count, q_win, Q.mask)
        sizes = (q_win.stride(p_axis), q_win.stride(other), Q.sequences, Q.length, lists.bits)
        for fill in (False, True) if q.wins() else ():
            step = {"FILL": fill, "MASKED": Q.masked, **sorting}
            launcher(sort_kernel, (number, SEGMENTS))(*sorted_, *sizes, **step)
        inputs = (pairs.sparse, P.mask[some], P.ends[some], scale, source, p_win)
        lengths = (Q.sequences, P.length, Q.length, lists.bits, blocks)
        strides = (p_win.stride(p_axis), p_win.stride(other))
        weights = (kept, kept_count, p_weight, q_weight, entries, starts)
        launcher(sparse_gradient_kernel, (number * blocks, parts))(
            out[some], *inputs, *weights, *strides, *lengths, **adding
        )


def write_dense(
    out: Tensor, source: Tensor, p: OneSide, q: OneSide, p_axis: int, pairs: KeptPairs
) -> None:
    """Write `out` by the dense kernel if `pairs.sparse` is 0."""
    P, Q = p.sequences, q.sequences
    capability, _ = device_limits(out.device)
    tiles = backward_tiles(out.shape[-1], out.dtype, capability, Q.length)
    rows, (long, short) = row_tiles(P), source_steps(Q, tiles.step)
    other = 1 - p_axis
    two_terms = out.dtype == torch.bfloat16
    programs = math.ceil(rows.bound / (tiles.rows // 16)), math.ceil(out.shape[-1] / tiles.features)
    launcher(gradient_kernel, programs)(
        out, pairs.sparse, P.mask, rows.code, rows.first, P.counts, pairs.scale, source, Q.mask,
        long.code, long.first, short.code, short.first, p.indices, q.indices, p.grad,
        pairs.q_weight, p.indices.stride(p_axis), p.indices.stride(other),
        q.indices.stride(p_axis), q.indices.stride(other),
        p.grad.stride(p_axis), p.grad.stride(other),
        P.sequences, Q.sequences, P.length, Q.length, rows.slots, long.slots,
        2 if two_terms else 1, D=out.shape[-1], BD=tiles.features, ROWS=tiles.rows, LONG=tiles.step,
        P_MASKED=P.masked, Q_MASKED=Q.masked, TWO_TERMS=two_terms, STAGES=tiles.stages,
        P_WINS=p.wins(), Q_WINS=q.wins(),
        num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
