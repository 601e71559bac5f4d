"""The queue of earlier pairs: against a loss by hand, and on several ranks."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from ds_cmli import engine
from ds_cmli.cmli import cmli_scores
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.bank import PairQueue, TokenQueue
from ds_cmli.losses.inputs import Features, LossInputs
from ds_cmli.losses.over_pairs import AllPairsCMLI, GlobalContrastive
from tests.batches import rank_batches
from tests.conftest import spawn

F64 = torch.float64
H, PAIRS = 3, 6


def inputs(part, config, seed):
    """A rank's part of six pairs, of which some share a picture or a caption, with those of other seeds too."""
    generator = torch.Generator().manual_seed(seed)
    image, text = torch.randn(2, PAIRS, H, dtype=F64, generator=generator)
    ids = torch.randint(9, (PAIRS, 2), generator=generator)
    given = Features(image[part].requires_grad_(), image[part], text[part].requires_grad_(), text[part])
    batch = SimpleNamespace(pair_id=ids[part].contiguous(), index=ids[part][:, 0])
    return LossInputs(given, batch, None, None, None, None, config)


def built(pairs, duplicates="mask"):
    loss = GlobalContrastive(LossConfig(weights={"global": 1.0}, duplicates=duplicates))
    loss.bank = PairQueue(pairs, H)
    return loss.double()


def steps(loss, part, count=4):
    """Loss and gradients of some micro-batches, and what the queue holds after each."""
    results = []
    for seed in range(count):
        given = inputs(part, loss.config, seed)
        value = loss(given)
        leaves = [given.features.image_cls, given.features.text_cls, loss.logit_scale]
        grads = torch.autograd.grad(value, leaves)
        loss.bank.enter()
        results.append((value.detach(), grads, {k: v.clone() for k, v in loss.bank.named_buffers()}))
    return results


@pytest.mark.parametrize("duplicates", ["mask", "keep"])
@pytest.mark.parametrize("pairs", [1, 7, 100])
def test_against_cross_entropy_by_hand(pairs, duplicates):
    loss = built(pairs, duplicates)
    images, texts, ids = (torch.zeros(0, n, dtype=dtype) for n, dtype in ((H, F64), (H, F64), (2, torch.int64)))
    for seed, (value, grads, _) in enumerate(steps(loss, slice(0, PAIRS))):
        given = inputs(slice(0, PAIRS), loss.config, seed)
        leaves = [given.features.image_cls, given.features.text_cls, loss.logit_scale]
        image, text = (F.normalize(x, dim=1) for x in leaves[:2])
        both = given.batch.pair_id[:, None] == torch.cat([given.batch.pair_id, ids[-pairs:]])
        no_negative = both.any(2) & (torch.arange(both.shape[1]) != torch.arange(PAIRS)[:, None])
        terms = []
        for own, others in ((image, torch.cat([text, texts[-pairs:]])), (text, torch.cat([image, images[-pairs:]]))):
            logits = loss.logit_scale.double().exp() * own @ others.T
            if duplicates == "mask":
                logits = logits.masked_fill(no_negative, -torch.inf)
            terms.append(F.cross_entropy(logits, torch.arange(PAIRS)))
        expected = sum(terms) / 2
        assert_close(value, expected.detach(), rtol=1e-12, atol=0)
        for grad, by_hand in zip(grads, torch.autograd.grad(expected, leaves), strict=True):
            assert_close(grad, by_hand, rtol=1e-9, atol=1e-12)
        images, texts = torch.cat([images, image.detach()]), torch.cat([texts, text.detach()])
        ids = torch.cat([ids, given.batch.pair_id])


def of_rank(rank, world, pairs):
    size = PAIRS // world
    return steps(built(pairs), slice(rank * size, (rank + 1) * size))


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_equal_one(world):
    one, several = steps(built(8), slice(0, PAIRS)), spawn(of_rank, world, 8)
    for step, (value, grads, queue) in enumerate(one):
        parts = [rank[step] for rank in several]
        assert_close(torch.stack([x[0] for x in parts]).mean(), value, rtol=1e-12, atol=1e-12)
        for i, grad in enumerate(grads[:-1]):  # of a mean over ranks
            assert_close(torch.cat([x[1][i] for x in parts]) / world, grad, rtol=1e-10, atol=1e-12)
        assert_close(sum(x[1][-1] for x in parts) / world, grads[-1], rtol=1e-10, atol=1e-12)
        for x in parts:
            assert all(torch.equal(x[2][key], queue[key]) for key in queue)


def test_what_is_not_finite_does_not_stay():
    loss = built(8)
    steps(loss, slice(0, PAIRS), 1)
    given = inputs(slice(0, PAIRS), loss.config, 1)
    given.features.image_cls.data[2] = torch.nan
    given.features.text_cls.data[3, 0] = torch.inf
    assert not loss(given).isfinite()
    loss.bank.enter()
    assert all(x.isfinite().all() for _, grads, _ in steps(loss, slice(0, PAIRS), 2) for x in grads)


def test_in_evaluation_nothing_enters():
    loss = built(8).eval()
    loss(inputs(slice(0, PAIRS), loss.config, 0))
    loss.bank.enter()
    assert loss.bank.entered == 0


N, M, D, LONGEST = 4, 3, 5, 6


def with_tokens(part, config, seed):
    """A rank's part of six pairs, of which some patches and tokens are not valid; and the ids of all."""
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(PAIRS, N, D, dtype=F64, generator=generator)[part].requires_grad_()
    tokens = torch.randn(PAIRS, M, D, dtype=F64, generator=generator)[part].requires_grad_()
    ids = torch.randint(9, (PAIRS, 2), generator=generator)
    mask = torch.arange(M) < torch.tensor([3, 1, 2, 3, 1, 2])[part, None]
    patch_mask = torch.arange(N) < torch.tensor([4, 3, 4, 1, 2, 4])[part, None]
    given = Features(patches[:, 0], patches, tokens[:, 0], tokens, patch_mask=patch_mask)
    batch = SimpleNamespace(pair_id=ids[part].contiguous(), index=ids[part][:, 0], token_mask=mask)
    student = SimpleNamespace(projection=nn.Identity())
    return LossInputs(given, batch, None, student, None, cmli_scores, config)


def token_steps(part, pairs, duplicates="mask", count=4):
    config = LossConfig(weights={"cmli": 1.0}, duplicates=duplicates)
    loss = AllPairsCMLI(config)
    loss.bank = TokenQueue(pairs, N, LONGEST, D)
    loss = loss.double()
    results = []
    for seed in range(count):
        given = with_tokens(part, config, seed)
        value = loss(given)
        grads = torch.autograd.grad(value, [*given.projected, loss.logit_scale])
        loss.bank.enter()
        results.append((value.detach(), grads, {k: v.clone() for k, v in loss.bank.named_buffers()}))
    return results


@pytest.mark.parametrize("duplicates", ["mask", "keep"])
@pytest.mark.parametrize("pairs", [1, 7, 100])
def test_tokens_against_cross_entropy_by_hand(pairs, duplicates):
    config = LossConfig(duplicates=duplicates)
    earlier: list[tuple] = []
    log_scale = torch.tensor(1 / config.cmli_init_temperature, dtype=torch.float32).log().double().requires_grad_()
    for seed, (value, grads, _) in enumerate(token_steps(slice(0, PAIRS), pairs, duplicates)):
        given = with_tokens(slice(0, PAIRS), config, seed)
        patches, tokens = (F.normalize(x, dim=-1) for x in given.projected)
        patch_mask, mask, ids = given.features.patch_mask, given.batch.token_mask, given.batch.pair_id
        images = [(patches[i, patch_mask[i]], ids[i]) for i in range(PAIRS)]
        texts = [(tokens[i, mask[i]], ids[i]) for i in range(PAIRS)]
        before = earlier[-pairs:]
        terms = []
        for own, others in (
            (images, texts + [text for _, text in before]),
            (texts, images + [image for image, _ in before]),
        ):
            for i, (features, own_id) in enumerate(own):
                logits = []
                for j, (candidate, other) in enumerate(others):
                    logits.append(log_scale.exp() * (features @ candidate.T).max(1).values.mean())
                    if duplicates == "mask" and j != i and (own_id == other).any():
                        logits[-1] = torch.full_like(logits[-1], -torch.inf)
                terms.append(torch.stack(logits).logsumexp(0) - logits[i])
        expected = torch.stack(terms).sum() / (2 * PAIRS)
        assert_close(value, expected.detach(), rtol=1e-10, atol=0)
        by_hand = torch.autograd.grad(expected, [*given.projected, log_scale])
        for grad, exact in zip(grads, by_hand, strict=True):
            assert_close(grad.squeeze(), exact.squeeze(), rtol=1e-8, atol=1e-10)
        for image, text in zip(images, texts, strict=True):
            earlier.append(((image[0].detach(), image[1]), (text[0].detach(), text[1])))


def tokens_of_rank(rank, world, pairs):
    size = PAIRS // world
    return token_steps(slice(rank * size, (rank + 1) * size), pairs)


def test_ranks_equal_one_with_tokens():
    one, several = token_steps(slice(0, PAIRS), 8), spawn(tokens_of_rank, 2, 8)
    for step, (value, grads, queue) in enumerate(one):
        parts = [rank[step] for rank in several]
        assert_close(torch.stack([x[0] for x in parts]).mean(), value, rtol=1e-12, atol=1e-12)
        for i, grad in enumerate(grads[:-1]):  # of a mean over ranks
            assert_close(torch.cat([x[1][i] for x in parts]) / 2, grad, rtol=1e-10, atol=1e-12)
        assert_close(sum(x[1][-1] for x in parts) / 2, grads[-1], rtol=1e-10, atol=1e-12)
        assert all(torch.equal(x[2][key], queue[key]) for x in parts for key in queue)


QUEUE = {"optim": {"negatives": "queue:20", "micro_batch": 4}, "loss": {"weights": {"global": 1.0, "cmli": 1.0}}}


@pytest.mark.parametrize("stage", [0, 3])
def test_each_micro_batch_is_compared_with_those_before_it(stage, device, data):
    """Also with those of its own step, whose features are as old as its weights: none."""
    loader = iter(rank_batches(data.train, data, 4))
    batches = [next(loader) for _ in range(2)]
    content = {"gradient_accumulation_steps": 2, "zero_optimization": {"stage": stage}}
    by_name = {}
    for negatives in ("queue:20", "micro_batch"):
        config = load_preset("tiny", {**QUEUE, "optim": {"negatives": negatives, "micro_batch": 4}})
        ds_config = engine.filled(config, engine.on_this_device(DeepSpeedConfig.of(content)), 1, 2)
        train_engine = engine.build(config, ds_config, data.vocab_size, 2, device)
        assert not train_engine.caching
        by_name[negatives] = [losses.each for losses in train_engine.step(batches)]
        entered = [bank.entered.item() for bank in train_engine.objective.banks().values()]
        assert entered == ([8] if negatives == "queue:20" else [])
    first, other = by_name.values()
    assert first[0] == other[0]  # the queue is empty
    assert first[1]["global"] > other[1]["global"] and first[1]["cmli"] == other[1]["cmli"]
