"""The loss flair: ranks against one process, caching with what CMLI leaves out, and a training with it."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from ds_cmli.cmli.ring import Scorer
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.inputs import Features, LossInputs
from ds_cmli.losses.objective import Objective
from ds_cmli.losses.over_pairs import Flair
from ds_cmli.losses.pair_features import CachedStep
from ds_cmli.memory.inputs import longest_batch
from ds_cmli.models.student import Student
from tests.conftest import spawn
from tests.stranger.drive import STEPS, drive

B, N, H, D = 3, 5, 6, 8
F64 = torch.float64


def built(seed=0):
    torch.manual_seed(seed)
    loss = Flair(LossConfig(weights={"flair": 1.0}, cmli_scratch_bytes=2**20))
    loss.between(H, D)
    return loss.double()


def losses_of(images, texts, pair_id):
    """The loss and the gradients of the features and of the parameters."""
    loss = built()
    images, texts = images.clone().requires_grad_(), texts.clone().requires_grad_()
    features = Features(texts, images, texts, texts[:, None])
    batch = SimpleNamespace(index=pair_id[:, 0], pair_id=pair_id)
    student = SimpleNamespace(projection=nn.Identity())
    value = loss(LossInputs(features, batch, None, student, None, Scorer(), loss.config))
    return [value.detach(), *torch.autograd.grad(value, (images, texts, *loss.parameters()))]


def batch(ranks, K=1):
    """Images with K texts each, image by image."""
    generator = torch.Generator().manual_seed(1)
    G = B * ranks
    images = torch.randn(G, N, D, generator=generator, dtype=F64)
    ids = torch.arange(G * (1 + K)).view(G, 1 + K)
    ids[-1, 0] = ids[0, 0]  # the last picture is the first again
    return images, torch.randn(K * G, H, generator=generator, dtype=F64), ids


def on_rank(rank, ranks, K):
    images, texts, ids = batch(ranks, K)
    mine = slice(rank * B, (rank + 1) * B)
    return losses_of(images[mine], texts[K * B * rank : K * B * (rank + 1)], ids[mine])


@pytest.mark.parametrize(("ranks", "K"), [(2, 2), pytest.param(3, 1, marks=pytest.mark.slow)])
def test_ranks_equal_one(ranks, K):
    expected, results = losses_of(*batch(ranks, K)), spawn(on_rank, ranks, K)
    assert_close(sum(r[0] for r in results) / ranks, expected[0], rtol=1e-10, atol=0)
    for place in (1, 2):
        of_ranks = torch.cat([r[place] for r in results]) / ranks
        assert_close(of_ranks, expected[place], rtol=1e-9, atol=1e-12)
    for place in range(3, len(expected)):
        assert_close(sum(r[place] for r in results) / ranks, expected[place], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("K", [1, 3])
def test_the_loss_is_the_sigmoid_loss_of_the_pooled_cosines(K):
    images, texts, ids = batch(2, K)
    loss = built()
    scores = loss.pooling(F.normalize(images, dim=2), F.normalize(texts, dim=1))
    signs = (2 * torch.eye(6, dtype=F64) - 1).repeat_interleave(K, 1)
    signs[0, 5 * K :] = signs[5, :K] = 1  # the same picture
    expected = F.softplus(-signs * (scores / 0.07 - 10)).sum() / (6 * K)
    assert_close(losses_of(images, texts, ids)[0], expected, rtol=1e-6, atol=0)  # 0.07 is one in fp32


@pytest.mark.parametrize("settings", [{}, {"cmli_cut": 1e-12}, {"cmli_token_keep": 0.5}], ids=str)
def test_caching_is_the_whole_batch_with_all_patches_also_where_cmli_leaves_out(settings):
    torch.manual_seed(0)
    weights = {"global": 1.0, "cmli": 0.7, "flair": 0.6}
    config = load_preset("tiny", {"loss": {"weights": weights, **settings}})
    student = Student(config.student, config.data.image_size, 300, config.data.context_length)
    objective = Objective(student, config.loss).double()
    pairs = longest_batch(config, 4)
    pairs.image = torch.randint(0, 256, pairs.image.shape, dtype=torch.uint8)
    pairs.input_ids = torch.randint(5, 300, pairs.input_ids.shape)
    pairs.pair_id = torch.arange(4)[:, None].repeat(1, 2)
    total, values = objective.whole(pairs, None)
    names = [name for name, p in objective.named_parameters() if p.requires_grad]
    parameters = [objective.get_parameter(name) for name in names]
    expected = torch.autograd.grad(total, parameters)
    with torch.no_grad():
        cached = objective.embed(pairs)
    gradients = objective.compare(CachedStep([cached], torch.device("cpu")))
    again, losses = objective.replay(pairs, None, cached, gradients, 1.0)
    assert_close(again, total, rtol=1e-9, atol=0)
    assert_close(losses, values, rtol=1e-9, atol=0)
    whole = torch.stack([x.norm() for x in expected]).norm()
    for name, ours, theirs in zip(names, torch.autograd.grad(again, parameters), expected, strict=True):
        assert (ours - theirs).norm() <= 1e-8 * whole, name


@pytest.mark.slow
@pytest.mark.parametrize("losses", ["global_sigmoid,flair", "cmli=0.5,flair"])
def test_a_run_trains_is_evaluated_and_exported(tmp_path, alone, losses):
    content = drive(tmp_path, "--losses", losses)
    assert len(content["logged"]) == STEPS and "refused" not in content
    assert {"loss/flair", "temperature/flair", "added_positives"} <= content["logged"][0].keys()
    assert {"eval/seen/flair/i2t_r1", "eval/seen/combined/t2i_r10"} <= content["evaluated"].keys()
    assert json.loads((tmp_path / "exported" / "config.json").read_text())["losses"][-1][0] == "flair"
