"""The contrast with negatives that come in tiles, against one whole matrix in fp64."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ds_cmli.losses.negatives import Candidates, Compared, contrast_loss
from tests.cmli.helpers import allocator_peak

F64 = torch.float64
Q, C, K, H = 9, 20, 7, 6
ID = torch.arange(Q) % 5  # of the queries; no candidate has 4


def given(dtype=F64):
    generator = torch.Generator().manual_seed(0)
    queries, targets, candidates, entries = (
        torch.randn(n, H, dtype=F64, generator=generator).to(dtype) for n in (Q, Q, C, K)
    )
    return queries, targets, candidates, entries


def compared(candidates, entries, scratch_bytes=2**20):
    """A batch, and a bank with three of its entries still empty, one of which would be the best of all."""
    entries = entries.clone()
    entries[4:] = 0
    bank = Candidates(entries, torch.full((K,), -1), torch.arange(K) < 4)
    return Compared(ID, [Candidates(candidates, torch.arange(C) % 4), bank], scratch_bytes)


def plain(queries, targets, scale, candidates, entries):
    unit = F.normalize(queries, dim=1)
    own = (unit * F.normalize(targets, dim=1)).sum(1, keepdim=True)
    others = unit @ F.normalize(torch.cat([candidates, entries[:4]]), dim=1).t()
    same = torch.cat([ID[:, None] == torch.arange(C) % 4, torch.zeros(Q, 4, dtype=torch.bool)], 1)
    logits = torch.cat([scale * own, (scale * others).masked_fill(same, -torch.inf)], 1)
    return F.cross_entropy(logits, torch.zeros(Q, dtype=torch.int64), reduction="none")


@pytest.mark.parametrize("scratch_bytes", [1, 700, 2**20])  # tiles of one, of a few, of all
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_against_one_matrix_in_fp64(scratch_bytes, scale):
    queries, targets, candidates, entries = given()
    results = []
    for function in (
        lambda q, s: contrast_loss(q, targets, s, compared(candidates, entries, scratch_bytes)),
        lambda q, s: plain(q, targets, s, candidates, entries),
    ):
        q, s = queries.clone().requires_grad_(), torch.tensor([scale], dtype=F64, requires_grad=True)
        loss = function(q, s)
        weights = torch.arange(1.0, Q + 1, dtype=F64)
        results.append([loss.detach(), *torch.autograd.grad((loss * weights).sum(), (q, s))])
    assert_close(results[0], results[1], rtol=1e-11, atol=1e-11)
    assert results[0][0].min() >= 0 and results[0][0].max() > 0.1


def test_by_hand():
    # The target is at 60 degrees, the only negative at 90: cosines 1/2 and 0, at scale 2 logits 1 and 0.
    queries, targets = torch.tensor([[3.0, 0.0]]), torch.tensor([[1.0, math.sqrt(3.0)]])
    candidates = Candidates(torch.tensor([[0.0, 5.0], [4.0, 0.0]]), torch.tensor([1, 0]))
    only = Compared(torch.tensor([0]), [candidates], 2**20)
    loss = contrast_loss(queries, targets, torch.tensor([2.0]), only)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)))


def test_without_negatives_there_is_nothing_to_learn():
    queries, targets, candidates, _ = given(torch.float32)
    queries.requires_grad_()
    empty = Candidates(candidates, torch.full((C,), -1), torch.zeros(C, dtype=torch.bool))
    loss = contrast_loss(queries, targets, torch.tensor([3.0]), Compared(ID, [empty], 500))
    loss.sum().backward()
    assert (loss == 0).all() and (queries.grad == 0).all()


def test_features_of_16_bits_are_compared_in_fp32():
    queries, targets, candidates, entries = given(torch.bfloat16)
    scale = torch.tensor([14.0])
    outcome = contrast_loss(queries, targets, scale, compared(candidates, entries))
    with torch.autocast("cpu", torch.bfloat16):
        again = contrast_loss(queries, targets, scale, compared(candidates, entries))
    assert outcome.dtype == torch.float32 and torch.equal(outcome, again)
    wide = [x.double() for x in (queries, targets, candidates, entries)]
    expected = plain(wide[0], wide[1], scale.double(), wide[2], wide[3])
    assert_close(outcome.double(), expected, rtol=1e-5, atol=1e-5)


def test_memory_is_that_of_the_limit():
    """Not of the matrix of all queries and candidates, 16 MB."""
    queries, candidates = torch.randn(1000, 16, requires_grad=True), torch.randn(4000, 16)
    ids = torch.arange(4000)

    def step(scratch_bytes):
        only = Compared(ids[:1000], [Candidates(candidates, ids)], scratch_bytes)
        contrast_loss(queries, candidates[:1000], torch.tensor([10.0]), only).sum().backward()
        queries.grad = None

    small, large = (allocator_peak(lambda b=b: step(b)) for b in (2**20, 2**23))
    assert small < 2**20 + 5 * queries.nbytes + 100_000 and large < 2**23 + 5 * queries.nbytes + 100_000
    print(f"peak {small:,} B at a limit of 1 MiB, {large:,} B at 8 MiB")


def test_a_query_of_zeros_learns_nothing():
    queries, targets, candidates, entries = given(torch.float32)
    queries[1] = 0.0
    queries.requires_grad_()
    contrast_loss(queries, targets, torch.tensor([10.0]), compared(candidates, entries)).sum().backward()
    assert queries.grad[1].eq(0).all() and queries.grad.abs().max() < 100
