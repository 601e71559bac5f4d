"""Gradients of kept pairs alone: equal to those of all pairs, within their memory, and where they are chosen.

I images, J texts, N patches, M text positions, D features.
"""

import pytest
import torch
from torch.testing import assert_close

from ds_cmli.cmli import chunked, cmli_scores
from ds_cmli.cmli.chunked.forward import ArgmaxIndices
from ds_cmli.cmli.chunked.kept import KeptGradient, few_pairs
from ds_cmli.cmli.chunked.packed import ChunkShape, make_chunks, pack_both
from ds_cmli.cmli.inputs import Sides
from ds_cmli.cmli.peak_memory import cmli_peak_bytes
from tests.cmli.helpers import allocator_peak, random_case, upstream_for, with_gradients

MANY = (100, 1000, 10**6)


def kept_gradients(case, upstream, limits=MANY, save_argmax=False, images=100):
    """The gradients of both sides, with so many images a chunk."""
    sides, (I, N, _), (J, M, _) = Sides(*case), case[0].shape, case[1].shape  # noqa: E741
    packed, saved = pack_both(sides), None
    if save_argmax:
        arg_i2t, arg_t2i = chunked.forward(sides, 2**20, True)[2:]
        saved = ArgmaxIndices(arg_i2t.view(J, I * N), arg_t2i.view(J * M, I))
    gradients = [torch.zeros_like(side.features) for side in packed]
    chunks = make_chunks(packed[0].lengths, ChunkShape(10**6, images, 0))
    KeptGradient(packed[1], packed[0], upstream, saved, limits).add_up(chunks, *gradients)
    return [gradient.view(x.shape) for gradient, x in zip(gradients, case, strict=False)]


def few(shape, share, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("save_argmax", [False, True])
@pytest.mark.parametrize("limits", [MANY, (1, 1, 1), (2, 20, 50)])
def test_equal_to_the_reference_within_any_limits(limits, save_argmax, dtype):
    """Padded and empty texts, masked and empty images, equal similarities; twice the same bits."""
    for seed in range(8):
        case = random_case(11, 13, 7, 8, 5, seed, dtype, masked=seed % 2 == 0)
        if seed % 4 > 1:
            case = (*(x.round() for x in case[:2]), *case[2:])
        wanted = few((11, 13), (0.0, 0.1, 0.5, 1.0)[seed // 2], seed)
        upstream = tuple(g.to(dtype) * wanted for g in upstream_for(case, seed))
        exact = with_gradients(case, upstream, backend="reference")[2:]
        found, again = (kept_gradients(case, upstream, limits, save_argmax, images=4) for _ in range(2))
        assert all(map(torch.equal, found, again))
        for ours, expected in zip(found, exact, strict=True):
            tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}[dtype]
            assert_close(ours, expected, rtol=tolerance, atol=tolerance)


def test_one_gradient_alone():
    case = random_case(3, 4, 5, 6, 7)
    upstream = tuple(g * few((3, 4), 0.3) for g in upstream_for(case))
    both = with_gradients(case, upstream, backend="chunked", recompute=True)[2:]
    for side in (0, 1):
        features = [case[0].clone(), case[1].clone()]
        features[side].requires_grad_()
        scores = cmli_scores(*features, *case[2:], recompute=True)
        (alone,) = torch.autograd.grad(scores, features[side], upstream)
        assert torch.equal(alone, both[side])


def test_a_row_of_nan_stays_within_range():
    case = random_case(2, 3, 4, 5, 6, dtype=torch.float32, text_lengths=[5, 5, 5])
    case[0][0, 1] = torch.nan
    found = kept_gradients(case, tuple(torch.ones(2, 3) for _ in range(2)))
    assert found[1].isnan().any() and not found[0][1].isnan().any()


@pytest.mark.parametrize("lengths", ["full", "one long"])
@pytest.mark.parametrize("share", [0.02, 0.3])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fewer_pairs_take_no_more_memory_than_all(share, recompute, lengths, dtype, monkeypatch):
    text_lengths = [16] * 200 if lengths == "full" else [16] + [2] * 199
    case = random_case(48, 200, 20, 16, 64, 0, dtype, text_lengths)
    upstream = [g.to(dtype) * few((48, 200), share) for g in upstream_for(case)]
    image, text = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
    scores, used = cmli_scores(image, text, case[2], recompute=recompute), []
    add_up = KeptGradient.add_up
    monkeypatch.setattr(KeptGradient, "add_up", lambda *args: used.append(1) or add_up(*args))
    held = allocator_peak(lambda: torch.autograd.grad(scores, (image, text), upstream, retain_graph=True))
    peak = cmli_peak_bytes(48, 200, 20, 16, 64, dtype, recompute=recompute, text_lengths=text_lengths)
    assert used and held <= peak.backward


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_where_kept_pairs_are_computed_alone(threads):
    """As estimated for 36 patches and 8 tokens: up to 0.46 or so of the pairs, with two threads up to 0.37;
    never in 16 bits."""
    case = random_case(40, 50, 36, 8, 4, dtype=torch.float32, text_lengths=[8] * 50)
    texts, images = reversed(pack_both(Sides(*case)))

    def chosen(share, saved):
        grads = torch.zeros(2, 2000)
        grads[:, : int(share * 2000)] = 1
        return few_pairs(texts, images, (grads[0], grads[1]), saved)

    threads(1)
    assert chosen(0.45, True) and not chosen(0.48, True)
    assert chosen(0.46, False) and not chosen(0.50, False)
    threads(2)
    assert chosen(0.35, True) and not chosen(0.38, True)
    texts.features = texts.features.bfloat16()
    assert not chosen(0.01, False)
