"""Exchange across real gloo processes, against one process on the whole batch."""

import copy
import itertools
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from ds_cmli.cmli import collectives
from ds_cmli.cmli.loss import CMLILoss, score_global_batch
from ds_cmli.cmli.ring import Scorer
from ds_cmli.distributed import process_group as distributed
from ds_cmli.losses.functions import duplicates
from tests.conftest import spawn

B, N, D = 3, 5, 4


def batch(world_size: int):
    generator = torch.Generator().manual_seed(7)
    G, M = B * world_size, 6
    image = torch.randn(G, N, D, generator=generator, dtype=torch.float64)
    text = torch.randn(G, M, D, generator=generator, dtype=torch.float64)
    lengths = torch.randint(1, M + 1, (G,), generator=generator)
    return image, text, torch.arange(M) < lengths[:, None]


def loss_and_gradients(image, text, mask, dtype, ids=None, **options):
    image, text = (x.to(dtype).requires_grad_() for x in (image, text))
    module = CMLILoss(0.1, **options).to(dtype)
    ignore = None
    if ids is not None:
        ignore = duplicates(ids, collectives.gather(ids), distributed.rank() * len(ids))
    loss = module(image, text, mask, ignore=ignore)
    grads = torch.autograd.grad(loss, (image, text, module.logit_scale))
    return [loss.detach(), *grads]


def on_rank(rank, world_size):
    image, text, mask = batch(world_size)
    mine = slice(rank * B, (rank + 1) * B)
    # Each rank pads to its own longest caption.
    longest = int(mask[mine].sum(1).max())
    own = image[mine], text[mine, :longest], mask[mine, :longest]
    # Other captions of a picture: none, all different, on the same rank and on others, and of nothing else at all.
    return {
        (dtype, name, *exchange): loss_and_gradients(
            *own, dtype, None if ids is None else ids[mine], exchange=exchange[0], backend=exchange[1]
        )
        for name, ids in same_pictures(world_size).items()
        for dtype in TOLERANCES
        for exchange in EXCHANGES
    }


def same_pictures(world_size):
    G = B * world_size
    some = torch.arange(G)
    some[[1, G - 1]] = 0
    pictures = {"different": torch.arange(G) - 5, "some": some, "one": torch.zeros(G, dtype=torch.int64)}
    captions = torch.arange(G)
    return {"none": None} | {name: torch.stack([ids, captions], 1) for name, ids in pictures.items()}


TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5}
EXCHANGES = [("gather", "chunked"), ("ring", "chunked"), ("ring", "reference")]


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_cmli_loss_of_many_ranks_equals_one(world_size):
    results = spawn(on_rank, world_size)
    for name, dtype, exchange in itertools.product(same_pictures(world_size), TOLERANCES, EXCHANGES):
        tolerance = TOLERANCES[dtype]
        expected = loss_and_gradients(*batch(world_size), dtype, same_pictures(world_size)[name])
        ranks = [result[(dtype, name, *exchange)] for result in results]
        assert_close(torch.stack([r[0] for r in ranks]).mean(), expected[0], rtol=tolerance, atol=tolerance)
        # Averaged over ranks, as an engine does with parameters: hence the division by P.
        image = torch.cat([r[1] for r in ranks]) / world_size
        assert_close(image, expected[1], rtol=tolerance, atol=tolerance)
        text = torch.zeros_like(expected[2])
        for rank, (_, _, grad, _) in enumerate(ranks):
            text[rank * B : (rank + 1) * B, : grad.shape[1]] = grad / world_size
        assert_close(text, expected[2], rtol=tolerance, atol=tolerance)
        assert_close(sum(r[3] for r in ranks) / world_size, expected[3], rtol=tolerance, atol=tolerance)
        if name == "different":  # nothing to ignore: the same bits as without
            for result, rank in zip(results, ranks, strict=True):
                assert all(torch.equal(a, b) for a, b in zip(rank, result[(dtype, "none", *exchange)], strict=True))
        if name == "one":  # no negatives: nothing to learn
            assert expected[0] == 0 and all(not rank[1].any() and not rank[2].any() for rank in ranks)


def uneven_batch(rank, world_size):
    with pytest.raises(ValueError, match="drop the last incomplete batch"):
        collectives.pad_text(torch.zeros(2 + rank, 3, 4), torch.ones(2 + rank, 3, dtype=torch.bool))
    return "refused"


def test_unequal_batches_are_refused_on_every_rank():
    assert spawn(uneven_batch, 2) == ["refused", "refused"]


def mistaken(rank, world_size):
    """The error of each batch on this rank: rank 0's is wrong in its own way, then the ranks' do not fit together."""
    image, text, mask = torch.rand(2, 3, 4), torch.rand(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    first = rank == 0
    batches = {
        "pairs": (image, text[:1], mask[:1]) if first else (image, text, mask),
        "dimensions": (image, text[0], mask) if first else (image, text, mask),
        "mask": (image, text, 2 * mask) if first else (image, text, mask),
        "ignore": (image, text, mask, None, 2 * mask) if first else (image, text, mask),
        "no tensor": (None, text, mask) if first else (image, text, mask),
        "dtype": (image.half(), text.half(), mask) if first else (image, text, mask),
        "batch": (image[:1], text[:1], mask[:1]) if first else (image, text, mask),
    }
    by_name = {}
    for name, batch in batches.items():
        with pytest.raises((ValueError, TypeError)) as caught:
            CMLILoss()(*batch)
        by_name[name] = str(caught.value)
    loss = CMLILoss(0.02 + 0.01 * rank)
    with pytest.warns(UserWarning, match="logit_scale differs between ranks: wrap the loss in Distributed"):
        loss(image, text, mask)
    return by_name


def test_a_mistake_of_one_rank_ends_all():
    """None waits in a collective for the rank that has raised."""
    own, other = spawn(mistaken, 2)
    for name in ("pairs", "dimensions", "mask", "ignore", "no tensor"):
        assert other[name] == f"rank 0: {own[name]}"
    for name in ("dtype", "batch"):
        assert other[name] == own[name] and "the ranks' " in own[name]


def outside_of_its_group(rank, world_size):
    group = torch.distributed.new_group([0])
    loss, inputs = CMLILoss(group=group), (*torch.rand(2, 2, 3, 4), torch.ones(2, 3, dtype=torch.bool))
    if rank == 0:
        return copy.deepcopy(loss)(*inputs).isfinite().item()
    with pytest.raises(ValueError, match="this process is not in the process group"):
        loss(*inputs)
    return True


def test_a_group_is_shared_by_copies_and_others_are_refused():
    assert spawn(outside_of_its_group, 2) == [True, True]


def strided_gradient(rank, world_size):
    x = torch.full((2, 3), float(rank), requires_grad=True)
    y = collectives.gather_with_gradient(x)  # [4, 3]
    weights = torch.arange(12.0).view(3, 4) * (rank + 1)
    (y.t() * weights).sum().backward()  # the gradient of y arrives transposed in memory
    return y.detach(), x.grad


def test_gradients_are_summed_for_their_owner_whatever_their_strides():
    weights = torch.arange(12.0).view(3, 4).t() * 3  # (1 + 2) times: both ranks' contributions
    for rank, (y, grad) in enumerate(spawn(strided_gradient, 2)):
        assert y[:, 0].tolist() == [0, 0, 1, 1]
        assert_close(grad, weights[2 * rank : 2 * rank + 2])


def gathered_bits(rank, world_size):
    x = torch.tensor([[1.0 + rank / 128]], dtype=torch.bfloat16)
    text, mask = collectives.gather_text(x[:, :, None].expand(1, 1, 2), torch.tensor([[rank == 0]]))
    return text, mask


def test_gather_text_keeps_bf16_bits_and_masks():
    for text, mask in spawn(gathered_bits, 2):
        assert text[:, 0, 0].tolist() == [1.0, 1.0 + 1 / 128]
        assert mask.tolist() == [[True], [False]]


def in_bf16(rank, world_size):
    image, text, mask = batch(world_size)
    mine = slice(rank * B, (rank + 1) * B)
    image, text = (x[mine].bfloat16().requires_grad_() for x in (image, text))
    by_name = {}
    for exchange in ("gather", "ring", "auto"):
        # Texts of 2 x 3 x 6 x 4 features, in bf16 with a gradient in fp32.
        score = Scorer(exchange=exchange, gather_bytes=2 * 3 * 6 * 4 * (2 + 4))
        scores = score_global_batch(image, text, mask[mine], score=score)
        by_name[exchange] = (
            *(x.detach() for x in scores),
            *torch.autograd.grad(scores[0].sum() + scores[1].sum(), (image, text)),
        )
        assert score.goes_round(text) == (exchange == "ring")
        assert exchange != "auto" or replace(score, gather_bytes=score.gather_bytes - 1).goes_round(text)
    return by_name


def test_a_ring_in_bf16_and_when_it_is_taken_by_itself():
    for entry in spawn(in_bf16, 2):
        for ours, expected in zip(entry["ring"], entry["gather"], strict=True):
            assert ours.dtype == expected.dtype
            assert (ours - expected).norm() < 2**-7 * expected.norm()


def column(rank, world_size):
    logits = torch.tensor([[[0.0, 50.0]], [[1.0, -50.0]]], dtype=torch.float64)[rank].requires_grad_()
    lse = collectives.column_logsumexp(logits)
    (lse * torch.tensor([1.0, 2.0], dtype=torch.float64)).sum().backward()
    return lse.detach(), logits.grad


def test_column_logsumexp_and_its_gradient():
    whole = torch.tensor([[0.0, 50.0], [1.0, -50.0]], dtype=torch.float64)
    for rank, (lse, grad) in enumerate(spawn(column, 2)):
        assert_close(lse, whole.logsumexp(0))
        # Both ranks' losses use both columns: their gradients add up.
        assert_close(grad, 2 * whole.softmax(0)[rank : rank + 1] * torch.tensor([1.0, 2.0]).double())
