"""`maxsim_across_ranks` on real gloo processes, against one process with all documents in fp64."""

import random

import pytest
import torch
from torch.testing import assert_close

from ds_cmli.cmli.across_ranks import maxsim_across_ranks
from tests.cmli.test_maxsim import DTYPES, TOLERANCE, lengths_mask, packed, reference
from tests.conftest import spawn

WAYS = (
    {},
    {"recompute": True},
    {"exchange": "ring"},
    {"exchange": "ring", "scratch_bytes": 3000},
    {"exchange": "ring", "backend": "reference"},
    {"gather_bytes": 0, "empty": -3.0},
    {"empty": -3.0},
)


class Case:
    """Random arguments of every rank: as many queries and documents as it likes, and lengths."""

    def __init__(self, seed, ranks):
        rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
        self.D, self.dtype, self.reduction = rng.randint(1, 9), rng.choice(DTYPES), rng.choice(("sum", "mean"))
        self.options, self.flat = rng.choice(WAYS), rng.random() < 0.3
        self.ranks = [self._arguments(rng, g) for _ in range(ranks)]
        # [Q, all documents of all ranks, in rank order]: gradients of the scores
        documents = sum(len(x[1]) for x in self.ranks)
        self.upstream = [torch.randn(len(x[0]), documents, generator=g, dtype=torch.float64) for x in self.ranks]

    def _arguments(self, rng, g):
        Q, C, L_q, L_d = rng.randint(1, 4), rng.randint(1, 5), rng.randint(1, 6), rng.randint(1, 9)
        queries = torch.randn(Q, L_q, self.D, generator=g).to(self.dtype)
        documents = torch.randn(C, L_d, self.D, generator=g).to(self.dtype)
        lengths = [rng.randint(0, L_q) for _ in range(Q)], [rng.randint(0, L_d) for _ in range(C)]
        masks = [lengths_mask(x, most) for x, most in zip(lengths, (L_q, L_d), strict=True)]
        if not self.flat:
            masks = [x[:, torch.randperm(x.shape[1], generator=g)] for x in masks]
            masks = [x if rng.random() < 0.7 else torch.ones_like(x) for x in masks]
        return queries, documents, *masks

    def columns(self, rank):
        """Of this rank first, then of those before it."""
        counts = [len(x[1]) for x in self.ranks]
        starts = [sum(counts[:r]) for r in range(len(counts))]
        order = [(rank - step) % len(counts) for step in range(len(counts))]
        return torch.cat([torch.arange(starts[r], starts[r] + counts[r]) for r in order])

    def on_rank(self, rank):
        """Scores in rank order and the gradients of this rank's features."""
        queries, documents, *masks = self.ranks[rank]
        queries, documents = queries.clone().requires_grad_(), documents.clone().requires_grad_()
        arguments = queries, documents, *(None if x.all() else x for x in masks)
        if self.flat:
            lengths = [x.sum(1).tolist() for x in masks]
            flat = [packed(x, n) for x, n in zip((queries, documents), lengths, strict=True)]
            arguments = flat[0][0], flat[1][0], flat[0][1], flat[1][1]
        scores = maxsim_across_ranks(*arguments, self.reduction, **self.options)
        columns = self.columns(rank)
        upstream = self.upstream[rank][:, columns].to(scores.dtype)
        grads = torch.autograd.grad(scores, (queries, documents), upstream)
        whole = torch.empty_like(scores)
        whole[:, columns] = scores.detach()
        return [whole, *grads]

    def check(self, results):
        """Against one process, a query and a document of every rank at a time, in fp64."""
        queries = [x[0].double().requires_grad_() for x in self.ranks]
        documents = [x[1].double().requires_grad_() for x in self.ranks]
        total = 0
        for rank, (scores, _, _) in enumerate(results):
            wanted = torch.cat(
                [
                    reference(queries[rank], documents[r], self.ranks[rank][2], self.ranks[r][3], self.reduction)
                    for r in range(len(self.ranks))
                ],
                1,
            )
            none = torch.cat([~x[3].any(1) for x in self.ranks])
            wanted = wanted.masked_fill(none, self.options.get("empty", 0.0))
            assert_close(scores.double(), wanted.detach(), rtol=1e-5, atol=1e-5)
            total = total + (wanted * self.upstream[rank]).sum()
        grads = torch.autograd.grad(total, (*queries, *documents))
        tolerance = TOLERANCE[self.dtype]
        for result, d_queries, d_documents in zip(results, grads[: len(results)], grads[len(results) :], strict=True):
            for got, want in ((result[1], d_queries), (result[2], d_documents)):
                assert got.dtype == self.dtype
                assert_close(got.double(), want, rtol=4 * tolerance, atol=4 * tolerance * float(1 + want.abs().max()))


def cases(rank, ranks, seeds):
    return [Case(seed, ranks).on_rank(rank) for seed in seeds]


def check_cases(seeds, ranks):
    results = spawn(cases, ranks, seeds)
    for number, seed in enumerate(seeds):
        Case(seed, ranks).check([result[number] for result in results])


def test_two_ranks_equal_one():
    check_cases(range(25), 2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_300_random_cases_against_fp64(ranks):
    check_cases(range(100 * ranks, 100 * ranks + 100), ranks)


def mistaken(rank, ranks):
    """The error of each batch on this rank: rank 0's is wrong in its own way, then the ranks' do not fit together."""
    queries, documents = torch.rand(2, 3, 4), torch.rand(2, 5, 4) + rank
    first = rank == 0
    batches = {
        "no tensor": (None if first else queries, documents),
        "own documents": (queries, documents[:, None]) if first else (queries, documents),
        "mask": (queries, documents, None, torch.full((2, 5), 2)) if first else (queries, documents),
        "D": (queries[..., :3], documents[..., :3]) if first else (queries, documents),
        "dtype": (queries.half(), documents.half()) if first else (queries, documents),
        "gathered": (queries, torch.arange(40.0).view(2, 5, 4)),
    }
    by_name = {}
    for name, batch in batches.items():
        with pytest.raises((ValueError, TypeError)) as caught:
            maxsim_across_ranks(*batch)
        by_name[name] = str(caught.value)
    with pytest.raises(ValueError, match="exchange='mail' is unknown"):
        maxsim_across_ranks(queries, documents, exchange="mail")
    same_but_nan = torch.full((2, 5, 4), torch.nan)
    assert maxsim_across_ranks(queries, same_but_nan).isnan().all()
    return by_name


def test_a_mistake_of_one_rank_ends_all():
    own, other = spawn(mistaken, 2)
    for name in ("no tensor", "own documents", "mask"):
        assert other[name] == f"rank 0: {own[name]}"
    assert own["D"] == other["D"] == "the ranks' documents must agree in D, found 3, 4"
    assert (
        own["dtype"] == other["dtype"] == "the ranks' documents must agree in dtype, found torch.float16, torch.float32"
    )
    assert own["gathered"] == other["gathered"] and "the documents of all 2 ranks are the same" in own["gathered"]
