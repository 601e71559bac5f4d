"""Losses of several captions an image, against formulas in fp64 that go through images and texts one by one.

B images with K texts each, N patches, M text positions, H student width, D embedding dimension.
"""

import math
import random
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from ds_cmli.cmli.contrastive import Own, contrastive_loss
from ds_cmli.cmli.cut import Cut
from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.cmli.ring import Scorer
from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.data.batch import ABSENT
from ds_cmli.losses import functions, own_texts
from ds_cmli.losses.cached import PairLosses
from ds_cmli.losses.inputs import Features, LossInputs
from ds_cmli.losses.objective import Objective
from ds_cmli.losses.pair_features import CachedStep, PairFeatures
from ds_cmli.models.student import Student
from tests.conftest import spawn
from tests.stranger.drive import DS_CONFIG, check_memory

CPU, F64, LOSSES = torch.device("cpu"), torch.float64, ("global", "cmli", "global_sigmoid", "cmli_sigmoid")
N, M, D = 5, 8, 16
WIDE = [0, pytest.param(1, marks=pytest.mark.slow)]


RIGHT, OTHER, OUT, NEGATIVE = "own right text", "right of another pair", "not compared", "negative"


def kinds(ids: list[list[int]], J: int, everywhere: bool) -> list[list[str]]:
    """What each text is for each image; ids are a picture and its captions, of which the last J are wrong."""
    W = len(ids[0]) - 1
    K = W - J

    def kind(i: int, j: int, k: int) -> str:
        caption, wrong = ids[j][1 + k], k >= K
        if i == j and not wrong:
            return RIGHT
        if wrong and (caption == ABSENT or (not everywhere and i != j)):
            return OUT
        if caption in ids[i][1 : 1 + K] or (not wrong and ids[i][0] == ids[j][0]):
            return OTHER
        return NEGATIVE

    return [[kind(i, j, k) for j in range(len(ids)) for k in range(W)] for i in range(len(ids))]


def contrast(s_i2t, s_t2i, scale, of, each):
    """Each image's K right texts among the texts (each among the k-th ones), and their image among the images."""
    B, total = len(s_i2t), 0.0
    W, K = len(of[0]) // B, of[0].count(RIGHT)
    for i in range(B):
        for k in range(K):
            own = i * W + k
            texts = [t for t in range(B * W) if of[i][t] in (RIGHT, NEGATIVE) and (not each or t % W == k)]
            images = [j for j in range(B) if of[j][own] != OTHER]
            row = torch.stack([scale * s_i2t[i, t] for t in texts]).logsumexp(0) - scale * s_i2t[i, own]
            column = torch.stack([scale * s_t2i[j, own] for j in images]).logsumexp(0) - scale * s_t2i[i, own]
            total = total + (row + column) / (2 * B * K)
    return total


def sigmoids(scores, scale, bias, of):
    B, total = len(scores), 0.0
    for i in range(B):
        for t, kind in enumerate(of[i]):
            if kind != OUT:
                sign = 1 if kind in (RIGHT, OTHER) else -1
                total = total + torch.log1p(torch.exp(-sign * (scale * scores[i, t] + bias))) / (B * of[0].count(RIGHT))
    return total


def random_ids(draw: random.Random, B: int, K: int, J: int = 0) -> list[list[int]]:
    """Pictures and captions of which some are equal, also among an image's own, and some wrong ones absent."""
    most = draw.choice([3, 10, 1000])
    ids = [[draw.randrange(most), *(draw.randrange(most) for _ in range(K + J))] for _ in range(B)]
    for row in ids:
        for k in range(K + draw.randint(0, J), K + J):
            row[1 + k] = ABSENT
    return ids


@pytest.mark.parametrize("wide", WIDE)
def test_losses_of_scores_equal_the_formulas(wide):
    for case in range(300 if wide else 20):
        draw = random.Random(case)
        torch.manual_seed(case)
        B, K, J, everywhere = draw.randint(1, 5), draw.randint(1, 4), draw.choice([0, 0, 1, 3]), draw.random() < 0.5
        each = not J and draw.random() < 0.5
        listed = random_ids(draw, B, K, J)
        of, own, ids = kinds(listed, J, everywhere), Own(0, K + J, J), torch.tensor(listed)
        texts = own_texts.ids_of_texts(ids, J)
        other, out = (
            functions.duplicates(ids, texts, own),
            own_texts.left_out(texts[:, 1] == ABSENT, own, B, everywhere),
        )
        assert (out | other).tolist() == [[kind in (OTHER, OUT) for kind in row] for row in of]
        scores = torch.randn(2, B, B * (K + J), dtype=F64, requires_grad=True)
        log_scale, bias = torch.randn(1, dtype=F64), torch.randn(1, dtype=F64)
        rows = lambda x: x.logsumexp(1)  # noqa: E731
        if each:
            rows = lambda x, own=own: torch.stack([part.logsumexp(1) for part in own.of_each(x)], 1)  # noqa: E731
        ours = contrastive_loss(*scores, log_scale, own, rows, ignore=other | out)
        same(ours, contrast(*scores, log_scale.exp()[0], of, each), scores)
        ours = functions.sigmoid_loss(scores[0], log_scale, bias, own, other, ignore=out)
        same(ours, sigmoids(scores[0], log_scale.exp()[0], bias[0], of), scores)


def same(ours, expected, leaf):
    assert_close(ours, torch.as_tensor(expected, dtype=F64).reshape(ours.shape), rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad(x, leaf, allow_unused=True)[0] for x in (ours, expected)]
    assert_close(*grads, rtol=1e-8, atol=1e-12)


def test_own_texts_by_hand():
    tile = torch.zeros(2, 5)
    # Row 0's own two texts are columns 1 and 2, row 1's 3 and 4.
    assert [x.tolist() for x in Own(1, 2).pairs(tile)] == [[0, 0, 1, 1], [1, 2, 3, 4]]
    # The tile begins with the second of row 0's three, and ends with the last but one of row 1's.
    assert [x.tolist() for x in Own(-1, 3).pairs(tile)] == [[0, 0, 1, 1, 1], [0, 1, 2, 3, 4]]
    assert [x.tolist() for x in Own(9, 3).pairs(tile)] == [[], []]
    # Of each row's three the last is wrong: the tile begins with it.
    assert [x.tolist() for x in Own(-2, 3, 1).pairs(tile)] == [[1, 1], [1, 2]]
    assert [x.tolist() for x in Own(-2, 3, 1).places(tile)] == [[0, 1, 1, 1, 2], [2, 0, 1, 2, 0]]
    columns = torch.arange(5).expand(2, 5)
    assert [x[0].tolist() for x in Own(-1, 3).of_each(columns)] == [[2], [0, 3], [1, 4]]


def test_several_positives_by_hand():
    """Khosla et al. (2020), equation 2: lse - the mean of the two; 0 everywhere gives ln 4 and ln 2."""
    s = torch.zeros(2, 4)
    outcome = contrastive_loss(s, s, torch.zeros(1), Own(0, 2))
    assert outcome.item() == pytest.approx((math.log(4) + math.log(2)) / 2)


@pytest.fixture(scope="module")
def objective():
    return made("all")


WAYS = {  # of `random_step`s without wrong captions, and with them
    "all": {"loss": {}},
    "each": {"loss": {"captions": "each"}},
    "NegCLIP": {"loss": {}, "data": {"negatives": "swap"}},
    "own": {"loss": {"negatives": "own"}, "data": {"negatives": "swap"}},
}


def made(way: str) -> Objective:
    torch.manual_seed(0)
    weights, sections = dict(zip(LOSSES, (1.0, 0.7, 0.2, 0.4), strict=True)), WAYS[way]
    sections = {"data": {"captions": 2, **sections.get("data", {})}, "loss": {"weights": weights, **sections["loss"]}}
    config = load_preset("tiny", sections)
    student = Student(config.student, config.data.image_size, 300, config.data.context_length)
    return Objective(student, config.loss, None).double()


def random_step(seed: int, width: int, way: str, A: int = 0) -> tuple[list[PairFeatures], int]:
    """The features of A micro-batches, 0: of one to three, and K."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    A, B, K = A or draw.randint(1, 3), draw.randint(1, 4), draw.randint(1, 4)
    J = draw.randint(1, 3) if "data" in WAYS[way] else 0
    ids, out, C = random_ids(draw, A * B, K, J), [], B * (K + J)
    randn = partial(torch.randn, dtype=F64)
    for a in range(A):
        mask = torch.arange(M) < torch.randint(1, M + 1, (C, 1))
        x = {"image_cls": randn(B, width), "text_cls": randn(C, width)}
        x |= {"patches": randn(B, N, D), "tokens": randn(C, M, D)}
        out.append(PairFeatures(x, mask, torch.tensor(ids[a * B : (a + 1) * B]), wrong=J))
    return out, K


def expected(step: list[PairFeatures], objective: Objective):
    """The weighted loss of a step by the formulas, and the gradients of its features."""
    leaves = [{name: x.clone().requires_grad_() for name, x in f.features.items()} for f in step]
    image, text, patches, tokens = (torch.cat([f[name] for f in leaves]) for name in step[0].features)
    unit = torch.nn.functional.normalize
    mask, ids = torch.cat([f.token_mask for f in step]), torch.cat([f.pair_id for f in step]).tolist()
    cosines = unit(image, dim=-1) @ unit(text, dim=-1).t()
    both = cmli_scores_reference(unit(patches, dim=-1), unit(tokens, dim=-1), mask)
    of = kinds(ids, step[0].wrong, objective.config.negatives == "all")
    each, total = objective.config.captions == "each", 0.0
    for name, weight in objective.config.weights.items():
        loss, scores = objective.losses[name], both if name.startswith("cmli") else (cosines, cosines)
        scale = loss.logit_scale.exp().clamp(max=loss.max_scale)[0]
        if name.endswith("sigmoid"):
            parts = [sigmoids(s, scale, loss.logit_bias[0], of) for s in scores]
            total = total + weight * (parts[0] + parts[1]) / 2
        else:
            total = total + weight * contrast(*scores, scale, of, each)
    grads = torch.autograd.grad(total, [x for f in leaves for x in f.values()])
    return total.detach(), list(grads)


@pytest.mark.parametrize("wide", WIDE)
def test_gradient_caching_equals_the_formulas(wide, objective):
    objectives = {way: made(way) for way in WAYS}
    for case in range(300 if wide else 8):
        way = [*WAYS][case % 4]
        chosen = objectives[way]
        step, _ = random_step(case, chosen.student.width, way)
        total, grads = expected(step, chosen)
        budget = random.Random(case).choice([1, 40, 300, 1 << 30])
        losses = {name: chosen.losses[name] for name in LOSSES}
        cached = CachedStep(step, CPU)
        outcome = PairLosses(
            cached, losses, chosen.config.weights, Scorer("chunked"), budget, chosen.config
        ).gradients()
        assert_close(outcome.total.reshape(()), total.reshape(()), rtol=1e-9, atol=1e-12)
        for ours, theirs in zip([x for f in step for x in f.tensors()], grads, strict=True):
            assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


def on_rank(rank: int, world: int, way: str, seed: int) -> dict:
    """The loss and the gradients of features and temperatures of this rank's micro-batches, in one piece and cached."""
    objective, of_each_way = made(way), {}
    weights = objective.config.weights
    for exchange, delta, cached in product(("gather", "ring"), (0.0, 0.3), (False, True)):
        step, _ = random_step(seed, objective.student.width, way, 4)
        step = step[rank * 4 // world : (rank + 1) * 4 // world]
        score, cut = Scorer("chunked", exchange=exchange), Cut(delta, weight=1.1) if delta else None
        if cached:
            losses = {name: objective.losses[name] for name in LOSSES}
            outcome = PairLosses(CachedStep(step, CPU), losses, weights, score, 300, objective.config, cut).gradients()
            total, grads, of_parameters = outcome.total, [x for f in step for x in f.tensors()], outcome.parameters
            sizes = len(step), len(step[0].features)
            grads = [torch.cat(grads[k :: sizes[1]]) for k in range(sizes[1])]
        else:
            leaves = [torch.cat([f.features[name] for f in step]).requires_grad_() for name in step[0].features]
            image, text, patches, tokens = leaves
            mask, ids = torch.cat([f.token_mask for f in step]), torch.cat([f.pair_id for f in step])
            batch = SimpleNamespace(index=torch.arange(len(ids)), pair_id=ids, token_mask=mask)
            student = SimpleNamespace(projection=torch.nn.Identity())
            features = Features(image, patches, text, tokens)
            inputs = LossInputs(features, batch, None, student, None, score, objective.config, cut, wrong=step[0].wrong)
            total = sum(weight * objective.losses[name](inputs) for name, weight in weights.items())
            both = torch.autograd.grad(total, [*leaves, *objective.losses.parameters()])
            grads, of_parameters = list(both[:4]), list(both[4:])
        found = [] if cut is None else [cut.found]
        of_each_way[exchange, delta, cached] = [total.detach().reshape(()), *of_parameters, *found], grads
    return of_each_way


@pytest.mark.parametrize(
    "way, seed", [("own", 5), *(pytest.param(way, 8, marks=pytest.mark.slow) for way in ("all", "each", "NegCLIP"))]
)
def test_ranks_rings_cuts_and_caching_equal_one_piece(way, seed, objective):
    """Of two ranks, with the texts gathered and in a ring."""
    step, K = random_step(seed, objective.student.width, way, 4)
    assert K > 1
    total, grads = expected(step, made(way))
    alone, ranks = on_rank(0, 1, way, seed), spawn(on_rank, 2, way, seed)
    for how, (values, of_features) in alone.items():
        whole, whole_grads = alone["gather", how[1], False]
        for ours, theirs in zip(values, whole, strict=True):
            assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
        assert_close(values[0], total.reshape(()), rtol=1e-9, atol=1e-12)
        for n, (ours, theirs) in enumerate(zip(of_features, whole_grads, strict=True)):
            assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
            if not how[1]:
                assert_close(ours, torch.cat(grads[n::4]), rtol=1e-6, atol=1e-9)
            assert_close(torch.cat([rank[how][1][n] for rank in ranks]) / 2, theirs, rtol=1e-6, atol=1e-9)
        for n, theirs in enumerate(whole):
            assert_close(sum(rank[how][0][n] for rank in ranks) / 2, theirs, rtol=1e-6, atol=1e-9)
    assert (alone["gather", 0.3, True][0][-1] > 0).all()  # pairs were left out, with a bound on the error
    assert alone["gather", 0.3, True][0][-1][0] < 1


def test_a_loss_that_knows_one_caption_is_refused(objective):
    step, K = random_step(5, objective.student.width, "all")
    inputs = PairLosses(CachedStep(step, CPU), {}, {}, Scorer("chunked"), 300)
    tile = inputs._tile(next(iter(inputs.step.image_blocks()))[1], inputs.texts, {})
    assert K > 1 and tile.own == Own(0, K)
    with pytest.raises(UserError, match=f"data.captions is {K}: a loss here knows one caption of an image"):
        tile.first  # noqa: B018


@pytest.mark.slow
@pytest.mark.parametrize("captions, accumulation", product(("all", "each"), (1, 2)))
def test_predicted_memory_is_what_is_measured(captions, accumulation):
    weights = {"global": 1.0, "cmli": 1.0, "global_sigmoid": 0.2, "target_cmli": 1.0}
    settings = {"loss": {"captions": captions, "weights": weights}, "data": {"captions": 3}}
    small = {"student": {"layers": 1}, "teacher": {"block": 0}, "optim": {"micro_batch": 6}}
    check_memory(load_preset("tiny", settings | small), {**DS_CONFIG, "gradient_accumulation_steps": accumulation}, 1)


def test_losses_of_single_pairs_are_those_of_each_text_with_its_image():
    """Equal to one caption an image, with images repeated."""
    torch.manual_seed(0)
    B, K, N, M, H = 3, 4, 5, 6, 7
    patches, tokens, mask = torch.randn(B, N, H), torch.randn(B * K, M, H), torch.rand(B * K, M) < 0.7
    images = patches.repeat_interleave(K, 0)
    assert_close(functions.patch_similarities(tokens, patches), functions.patch_similarities(tokens, images))
    match = functions.match_patches(tokens, patches)
    ours = functions.target_text_loss(tokens, patches, match, mask)
    assert_close(ours, functions.target_text_loss(tokens, images, match, mask))
    ours = functions.cls_distillation_loss(patches[:, 0], tokens[:, 0], patches[:, 1])
    expected = [(patches[:, 0] - patches[:, 1]), tokens[:, 0] - images[:, 1]]
    assert_close(ours, (expected[0].square().mean() + expected[1].square().mean()) / 2)
