"""`maxsim`, one direction of the all-pairs op: against fp64, packed and padded, of each query's own documents.

As a file it runs the checks of Triton's kernels in Triton's interpreter, which multiplies bf16 wrongly.
"""

import json
import random
import sys
from itertools import product

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ds_cmli.cmli import chunked, cmli_peak_bytes, cmli_scores, maxsim
from ds_cmli.cmli.inputs import Sides, Wanted
from tests.cmli.helpers import allocator_peak, in_interpreter, without_kernels

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def lengths_mask(lengths, positions):
    return torch.arange(positions) < torch.tensor(lengths)[:, None]


def packed(x, lengths):
    """Rows of all sequences, and where each begins."""
    return torch.cat([row[:n] for row, n in zip(x, lengths, strict=True)]), torch.tensor([0, *lengths]).cumsum(0)


def reference(queries, documents, query_mask, document_mask, reduction):
    """Scores in fp64 with all similarities stored; documents [C, L, D] or [Q, K, L, D]."""
    equation = "qld,ckd->qclk" if documents.ndim == 3 else "qld,qckd->qclk"
    S = torch.einsum(equation, queries, documents)
    of_pairs = document_mask[None] if documents.ndim == 3 else document_mask
    best = S.masked_fill(~of_pairs[:, :, None, :], -torch.inf).max(3).values
    counts = query_mask[:, None, :] & of_pairs.any(2)[..., None]
    scores = torch.where(counts, best, 0).sum(2)
    return scores / query_mask.sum(1).clamp(min=1)[:, None] if reduction == "mean" else scores


def quarters(*shape, generator):
    return torch.randint(-4, 5, shape, generator=generator) / 4


class Case:
    """Random arguments of `maxsim`: masks of any pattern or none, packed sides, own documents, or all of these."""

    def __init__(self, seed, dtypes=DTYPES, sizes=(6, 7, 9, 40, 33)):
        rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
        Q, C, L, K, D = (rng.randint(1, most) for most in sizes)
        self.dtype, self.reduction, self.own = rng.choice(dtypes), rng.choice(("sum", "mean")), rng.random() < 0.3
        shape = (Q, C, K) if self.own else (C, K)
        # Multiples of 1/4 are equal in all dtypes, and often as similarities: ties go to the lowest index.
        draw = quarters if rng.random() < 0.3 else torch.randn
        self.queries = draw(Q, L, D, generator=g).to(self.dtype)
        self.documents = draw(*shape, D, generator=g).to(self.dtype)
        self.arguments = {"queries": self.queries, "documents": self.documents}
        self.query_mask = self._masked("query", Q, L, rng, g)
        if self.own:
            self.document_mask = torch.rand(shape, generator=g) < 0.6
            self.arguments["document_mask"] = self.document_mask.to(rng.choice((torch.bool, torch.int64)))
        else:
            self.document_mask = self._masked("document", C, K, rng, g)
        self.upstream = torch.randn(Q, C, generator=g, dtype=torch.float64)

    def _masked(self, side, sequences, positions, rng, g):
        kind, name = rng.choice(("none", "any", "packed")), {"query": "queries", "document": "documents"}[side]
        if kind == "none":
            return torch.ones(sequences, positions, dtype=torch.bool)
        if kind == "any":
            mask = torch.rand(sequences, positions, generator=g) < 0.6
            self.arguments[f"{side}_mask"] = mask
            return mask
        lengths = [rng.randint(0, positions) for _ in range(sequences)]
        self.arguments[name], starts = packed(self.arguments[name], lengths)
        self.arguments[f"{side}_mask"] = starts.to(rng.choice((torch.int32, torch.int64)))
        return lengths_mask(lengths, positions)

    def scores(self, **options):
        """Scores and gradients of both sides, those of packed ones packed."""
        features = {name: self.arguments[name].clone().requires_grad_() for name in ("queries", "documents")}
        scores = maxsim(**{**self.arguments, **features}, reduction=self.reduction, **options)
        return scores, *torch.autograd.grad(scores, list(features.values()), self.upstream.to(scores.dtype))

    def check(self, **options):
        wide = [x.double().requires_grad_() for x in (self.queries, self.documents)]
        expected = reference(*wide, self.query_mask, self.document_mask, self.reduction)
        gradients = torch.autograd.grad(expected, wide, self.upstream)
        scores, *result = self.scores(**options)
        assert scores.dtype == torch.promote_types(self.dtype, torch.float32) and scores.is_contiguous()
        tolerance = min(TOLERANCE[self.dtype], 2e-5)
        torch.testing.assert_close(scores.double(), expected.detach(), rtol=tolerance, atol=tolerance)
        for got, want, mask in zip(result, gradients, (self.query_mask, self.document_mask), strict=True):
            assert got.dtype == self.dtype
            want = want[mask] if got.ndim == 2 else want
            size, tolerance = max(1.0, float(want.abs().max()) if want.numel() else 1.0), TOLERANCE[self.dtype]
            torch.testing.assert_close(got.double() / size, want / size, rtol=tolerance, atol=tolerance)


WAYS = ({}, {"recompute": True}, {"recompute": True, "scratch_bytes": 100}, {"backend": "reference"})


@pytest.mark.parametrize("seed", range(8))
def test_against_fp64(seed):
    for options in WAYS:
        Case(seed).check(**options)
    with without_kernels():
        Case(seed).check(**WAYS[seed % 3])


@pytest.mark.slow
def test_300_random_cases_against_fp64():
    for seed in range(100, 400):
        Case(seed).check(**WAYS[seed % 4])
        with without_kernels():
            Case(seed).check(**WAYS[seed % 3])


def test_by_hand():
    """Two tokens; the first finds 3 and the second 2 in document 0, and 1 and -1 in document 1."""
    queries = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    documents = torch.tensor([[[3.0, -5.0], [3.0, 2.0]], [[1.0, -1.0], [9.0, 9.0]]], requires_grad=True)
    document_mask = torch.tensor([[1, 1], [1, 0]])
    scores = maxsim(queries, documents, None, document_mask)
    assert scores.tolist() == [[5.0, 0.0]]
    assert maxsim(queries, documents, None, document_mask, "mean").tolist() == [[2.5, 0.0]]
    scores.sum().backward()
    # Of the two 3s the first one has the gradient.
    assert documents.grad.tolist() == [[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [0.0, 0.0]]]
    assert queries.grad.tolist() == [[[4.0, -6.0], [4.0, 1.0]]]


def test_nothing_valid_scores_0_without_gradient():
    queries, documents = torch.randn(2, 3, 4, requires_grad=True), torch.randn(3, 5, 4, requires_grad=True)
    query_mask, document_mask = torch.ones(2, 3).bool(), torch.ones(3, 5).bool()
    query_mask[0] = document_mask[1] = False
    scores = maxsim(queries, documents, query_mask, document_mask)
    assert (scores == 0).tolist() == [[True, True, True], [False, True, False]]
    scores.sum().backward()
    assert not queries.grad[0].any() and not documents.grad[1].any() and queries.grad[1].any()


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_direction_of_cmli_scores(reduction):
    """The mean has the bits of s_t2i, of scores and, where it alone has a gradient, of gradients up to their order."""
    queries, documents = torch.randn(5, 7, 16, requires_grad=True), torch.randn(6, 40, 16, requires_grad=True)
    mask = torch.rand(5, 7) < 0.7
    expected = cmli_scores(documents, queries, mask)[1].t()
    scores = maxsim(queries, documents, mask, reduction=reduction)
    if reduction == "mean":
        assert torch.equal(scores, expected)
    else:
        expected = expected * mask.sum(1, keepdim=True)
        assert torch.equal(scores, expected)
    upstream = torch.randn(5, 6)
    for got, want in zip(
        *(torch.autograd.grad(s, (queries, documents), upstream) for s in (scores, expected)), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("compiled", [True, False])
def test_packed_equals_padded_to_the_bit(dtype, compiled):
    """The same longest sequences give the same tiles and the same order of sums."""
    lengths, of_documents = [4, 0, 9, 2, 9], [30, 1, 40, 0, 17, 40]
    queries, documents = torch.randn(5, 9, 24).to(dtype), torch.randn(6, 40, 24).to(dtype)
    masks = lengths_mask(lengths, 9), lengths_mask(of_documents, 40)
    flat, flat_documents = packed(queries, lengths), packed(documents, of_documents)
    upstream = torch.randn(5, 6, dtype=torch.promote_types(dtype, torch.float32))

    def run(queries, documents, *masks, **options):
        queries, documents = queries.clone().requires_grad_(), documents.clone().requires_grad_()
        scores = maxsim(queries, documents, *masks, **options)
        return scores, *torch.autograd.grad(scores, (queries, documents), upstream)

    for options in WAYS[: 3 if compiled else 1]:
        with without_kernels() if not compiled else torch.enable_grad():
            scores, d_queries, d_documents = run(queries, documents, *masks, **options)
            result = run(flat[0], flat_documents[0], flat[1], flat_documents[1], **options)
            one = run(queries, flat_documents[0], masks[0], flat_documents[1], **options)
        assert torch.equal(result[0], scores) and torch.equal(one[0], scores)
        assert torch.equal(result[1], packed(d_queries, lengths)[0]) and torch.equal(one[1], d_queries)
        assert torch.equal(result[2], packed(d_documents, of_documents)[0]) and torch.equal(one[2], result[2])


def test_own_documents_equal_a_query_at_a_time():
    queries, documents = torch.randn(4, 5, 16), torch.randn(4, 3, 20, 16)
    masks = torch.rand(4, 5) < 0.7, torch.rand(4, 3, 20) < 0.7
    scores = maxsim(queries, documents, *masks)
    for q in range(4):
        one = maxsim(queries[q : q + 1], documents[q], masks[0][q : q + 1], masks[1][q])
        assert torch.equal(scores[q : q + 1], one)


def test_own_documents_need_what_is_predicted():
    queries, documents = torch.randn(6, 32, 16), torch.randn(24, 90, 16)
    sides = Sides(documents, queries, torch.ones(6, 32).bool(), None, True, own=4)
    lengths = {"text_lengths": [32] * 6, "dtype": torch.float32, "scratch_bytes": 2**19}
    peak = cmli_peak_bytes(24, 6, 90, 32, 16, **lengths, one_way=True, own=4)
    results = []
    assert allocator_peak(lambda: results.extend(chunked.forward(sides, 2**19, True))) == peak.forward
    if chunked.kernels.load():  # other pairs are not computed
        assert results[1].unflatten(0, (6, 4)).diagonal(dim1=0, dim2=2).all() and (results[1] != 0).sum() == 24
    grads = torch.empty(0), results[1]
    back = allocator_peak(lambda: chunked.backward(sides, grads, results[2:], Wanted(True, True), 2**19))
    assert back == peak.backward


def test_only_what_one_direction_needs_is_kept():
    queries, documents = torch.randn(3, 5, 8, requires_grad=True), torch.randn(4, 60, 8, requires_grad=True)

    def kept(**options):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
            maxsim(queries, documents, **options)
        return sum(x.nbytes for x in saved if x.dtype in (torch.uint8, torch.int16))

    assert (kept(), kept(recompute=True)) == (3 * 4 * 5, 0)


def test_compile_fake_tensors_and_vmap():
    def scalar(queries, documents, mask):
        return maxsim(queries, documents, mask).square().sum()

    queries, documents = torch.randn(3, 5, 8, requires_grad=True), torch.randn(4, 6, 8, requires_grad=True)
    mask = torch.rand(3, 5) < 0.7
    flat = torch.randn(9, 8, requires_grad=True), documents, torch.tensor([0, 4, 4, 9])
    for arguments in ((queries, documents, mask), flat):
        compiled = torch.compile(scalar, fullgraph=True, backend="aot_eager")(*arguments)
        for got, want in zip(
            *(torch.autograd.grad(x, arguments[:2]) for x in (compiled, scalar(*arguments))), strict=True
        ):
            assert torch.equal(got, want)
        with FakeTensorMode() as mode:
            fake = maxsim(*(mode.from_tensor(x) for x in arguments))
        real = maxsim(*arguments)
        assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    batches = torch.stack([queries, queries.flip(0)]).detach(), torch.stack([documents, documents + 1]).detach()
    assert torch.equal(torch.vmap(maxsim)(*batches)[1], maxsim(batches[0][1], batches[1][1]))


def test_gradcheck():
    queries, documents = (torch.randn(*shape, 5, dtype=torch.float64, requires_grad=True) for shape in ((2, 3), (3, 4)))
    assert torch.autograd.gradcheck(
        lambda q, d: maxsim(q, d, torch.tensor([[1, 1, 0], [1, 1, 1]])), (queries, documents)
    )


@pytest.mark.slow
@pytest.mark.parametrize("flat", [False, True])
def test_opcheck(flat):
    queries, mask = torch.randn(3, 5, 8), torch.rand(3, 5) < 0.7
    if flat:
        queries, mask = torch.randn(7, 8), torch.tensor([0, 3, 3, 7])
    features = torch.randn(4, 6, 8), queries
    for save in (False, True):
        options = "chunked", 2**20, save, True
        torch.library.opcheck(
            torch.ops.ds_cmli.cmli_forward, (*(x.clone().requires_grad_() for x in features), mask, None, *options)
        )
        results = torch.ops.ds_cmli.cmli_forward(*features, mask, None, *options)
        backward = (*results[:2], *features, mask, None, *results[2:], "chunked", 2**20, True, True, True)
        torch.library.opcheck(torch.ops.ds_cmli.cmli_backward, backward)


SIZES = {"I": 8, "J": 10, "N": 60, "M": 16, "D": 32}
LENGTHS = [1 + (7 * j) % 16 for j in range(9)] + [16], [(55 * i) % 61 for i in range(7)] + [60]
SCRATCH = 2**15


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("compiled", [True, False])
def test_memory_is_predicted(monkeypatch, flat, recompute, compiled):
    """To the byte, of forward and backward; and it is a fraction of both directions' argmax indices."""
    monkeypatch.setattr("ds_cmli.cmli.chunked.tiling.ONEDNN", False)
    queries, documents = torch.randn(10, 16, 32), torch.randn(8, 60, 32)
    masks = [lengths_mask(lengths, most) for lengths, most in zip(LENGTHS, (16, 60), strict=True)]
    sides = Sides(documents, queries, *masks, True)
    if flat:
        (queries, starts), (documents, of_documents) = packed(queries, LENGTHS[0]), packed(documents, LENGTHS[1])
        sides = Sides(documents, queries, starts, of_documents, True)
    with torch.enable_grad() if compiled else without_kernels():
        options = {"recompute": recompute, "packed": flat, "scratch_bytes": SCRATCH, "dtype": torch.float32}
        lengths = dict(zip(("text_lengths", "image_lengths"), LENGTHS, strict=True))
        peak = cmli_peak_bytes(**SIZES, **options, **lengths, one_way=True)
        results = []
        held = allocator_peak(lambda: results.extend(chunked.forward(sides, SCRATCH, not recompute)))
        assert held == peak.forward
        assert (
            sum(x.nbytes for x in results[2:])
            == peak.saved
            == (not recompute) * 8 * queries[..., 0].numel() * (1 + flat)
        )
        grads = torch.empty(0), torch.randn(8, 10)
        back = allocator_peak(lambda: chunked.backward(sides, grads, results[2:], Wanted(True, True), SCRATCH))
        if compiled:  # sorts and bags of operators hold more
            assert back == peak.backward
        assert peak.gradients == queries.nbytes + documents.nbytes


def test_a_step_needs_what_is_predicted():
    queries, documents = torch.randn(10, 16, 32, requires_grad=True), torch.randn(8, 60, 32, requires_grad=True)
    mask, upstream = torch.ones(10, 16).bool(), torch.randn(10, 8)

    def step():
        torch.autograd.grad(maxsim(queries, documents, mask), (queries, documents), upstream)

    peak = cmli_peak_bytes(**SIZES, dtype=torch.float32, one_way=True, text_lengths=[16] * 10)
    scores = 10 * 8 * 4
    # The incoming gradient is there before; int64 [Q] are the numbers of tokens.
    assert abs(allocator_peak(step) - max(peak.forward, peak.extra + peak.gradients - scores)) <= 2 * 10 * 8


GOOD = {"queries": torch.zeros(2, 3, 4), "documents": torch.zeros(5, 6, 4)}
OWN = {"documents": torch.zeros(2, 5, 6, 4)}
FLAT = {"queries": torch.zeros(7, 4), "query_mask": torch.tensor([0, 3, 7])}
BAD = {
    "no tensor": ({"queries": [1.0]}, TypeError, "queries must be a tensor, not list"),
    "queries of four dimensions": ({"queries": torch.zeros(1, 2, 3, 4)}, ValueError, "queries must have 3 dimensions"),
    "D differs": ({"documents": torch.zeros(5, 6, 8)}, ValueError, "documents has D=8 features and queries has D=4"),
    "dtypes differ": ({"queries": torch.zeros(2, 3, 4).half()}, TypeError, "queries is torch.float16: cast one"),
    "integers": ({"queries": torch.zeros(2, 3, 4).int()}, TypeError, "queries must be float64"),
    "other device": ({"queries": torch.zeros(2, 3, 4, device="meta")}, ValueError, "queries is on meta and documents"),
    "mask elsewhere": ({"query_mask": torch.ones(2, 3, device="meta").bool()}, ValueError, "query_mask is on meta"),
    "no documents": ({"documents": torch.zeros(0, 6, 4)}, ValueError, r"documents \[C, L_d, D\] .* empty dimension"),
    "mask of other shape": ({"query_mask": torch.ones(2, 4).bool()}, ValueError, r"query_mask has shape \[2, 4\]"),
    "mask of numbers": ({"document_mask": torch.ones(5, 6)}, TypeError, "document_mask must be a bool tensor"),
    "mask of twos": ({"query_mask": torch.full((2, 3), 2)}, ValueError, "query_mask holds 2"),
    "reduction": ({"reduction": "max"}, ValueError, "reduction='max' is unknown; it must be sum or mean"),
    "backend": ({"backend": "cuda"}, ValueError, "backend='cuda' is unknown"),
    "scratch": ({"scratch_bytes": 0}, ValueError, "scratch_bytes=0 must be positive"),
    "packed without starts": ({"queries": torch.zeros(7, 4)}, ValueError, "are packed: give in query_mask"),
    "starts of bool": ({**FLAT, "query_mask": torch.ones(7).bool()}, TypeError, "must be int32 or int64"),
    "starts of two dimensions": ({**FLAT, "query_mask": torch.tensor([[0, 7]])}, ValueError, "one number more than"),
    "starts too short": (
        {**FLAT, "query_mask": torch.tensor([0, 3, 6])},
        ValueError,
        "from 0 to the number of rows, 7",
    ),
    "starts that fall": ({**FLAT, "query_mask": torch.tensor([0, 5, 3, 7])}, ValueError, "must rise from 0"),
    "starts elsewhere": (
        {**FLAT, "query_mask": torch.tensor([0, 7], device="meta")},
        ValueError,
        "query_mask is on meta and documents on cpu",
    ),
    "too long a sequence": (
        {"documents": torch.zeros(40000, 4), "document_mask": torch.tensor([0, 40000])},
        ValueError,
        "document_mask has a sequence of 40000; at most 32767",
    ),
    "other queries": ({"documents": torch.zeros(3, 5, 6, 4)}, ValueError, "there are 2 queries"),
    "mask of other documents": (
        {**OWN, "document_mask": torch.ones(2, 5, 7).bool()},
        ValueError,
        r"document_mask has shape \[2, 5, 7\]",
    ),
    "mask of other queries": (
        {**OWN, "query_mask": torch.ones(3, 3).bool()},
        ValueError,
        r"query_mask has shape \[3, 3\]",
    ),
    "no own documents": ({"documents": torch.zeros(2, 0, 6, 4)}, ValueError, "empty dimension"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_readable_line(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        maxsim(**{**GOOD, **change})
    assert "\n" not in str(caught.value)


def test_other_derivatives_are_refused():
    queries, documents = torch.randn(2, 3, 4, requires_grad=True), torch.randn(3, 5, 4)
    (grad,) = torch.autograd.grad(maxsim(queries, documents).sum(), queries, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    with pytest.raises(RuntimeError, match="maxsim has no derivative in forward mode"):
        torch.func.grad(lambda q: maxsim(q, documents).sum())(queries.detach())


def test_autocast_changes_nothing_but_takes_two_dtypes():
    queries, documents = torch.randn(2, 3, 16), torch.randn(3, 5, 16)
    expected = maxsim(queries, documents)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(maxsim(queries, documents), expected)
        mixed = maxsim(queries, documents.bfloat16())
    assert torch.equal(mixed, maxsim(queries, documents.bfloat16().float()))


def interpreted_checks():
    """With Triton's kernels: all kinds of arguments, several blocks of documents, ties, groups, only one gradient."""
    from ds_cmli.cmli.triton import backward, forward, gradient

    costs = gradient.costs
    for seed, options in product(range(6), ({}, {"recompute": True, "scratch_bytes": 600})):
        # The dense kernel's gradient and the sparse ones'.
        prices = gradient.Costs(*((0.0, 1.0, 1.0) if seed % 2 else (1.0, 0.0, 0.0)))
        gradient.costs = lambda *_, prices=prices: prices
        Case(seed, (torch.float32, torch.float16), (3, 3, 9, 40, 20)).check(backend="triton", **options)
    gradient.costs = costs
    Case(7, (torch.float32,), (3, 3, 20, 300, 20)).check(backend="triton")

    documents, queries, mask = torch.randn(3, 150, 12), torch.randn(4, 18, 12), torch.rand(4, 18) < 0.7
    sides, none = Sides(documents, queries, mask, None, True), torch.empty(0)
    both = forward(sides._replace(one_way=False), 2**25, True)
    one = forward(sides, 2**25, True)
    assert one[0].shape == one[2].shape == (0,) and torch.equal(one[1], both[1]) and torch.equal(one[3], both[3])
    upstream = torch.randn(3, 4)
    whole = backward(sides, (none, upstream), one[2:], Wanted(True, True), 2**25)
    zeros = torch.zeros(3, 4), upstream
    for got, want in zip(
        whole, backward(sides._replace(one_way=False), zeros, both[2:], Wanted(True, True), 2**25), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    part = backward(sides, (none, upstream), one[2:], Wanted(True, False), 2**25)
    assert torch.equal(part[0], whole[0]) and part[1].shape == (0,)


@pytest.mark.slow
def test_triton_s_kernels_interpreted():
    assert json.loads(in_interpreter(__file__).splitlines()[-1]) == "passed"


if __name__ == "__main__":
    from tests.cmli.helpers import interpret_faster

    interpret_faster()
    interpreted_checks()
    print(json.dumps("passed"))
    sys.exit()
