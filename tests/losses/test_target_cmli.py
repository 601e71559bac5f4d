"""The parts of Target-CMLI with weights of their own, and which teacher patches are a token's target."""

import math

import pytest
import torch
from torch.testing import assert_close

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.distillation import TargetText
from ds_cmli.losses.functions import choose_patches, chosen_features, patch_similarities, target_text_loss
from ds_cmli.losses.objective import Objective
from ds_cmli.models.student import Student
from ds_cmli.models.teacher import Targets

LN2 = math.log(2.0)
SIMILARITY = torch.tensor([[[0.0, 2 * LN2, LN2, -torch.inf]]])
TEACHER = torch.tensor([[[8.0, 0.0], [0.0, 8.0], [4.0, 4.0], [torch.nan, torch.nan]]])


def test_the_best_patch_is_the_target_to_the_bit():
    best = choose_patches(SIMILARITY, "best", 4, 1.0)
    assert best.tolist() == [[1]]
    assert torch.equal(chosen_features(TEACHER.bfloat16(), best), TEACHER[:, 1:2].bfloat16())


def test_the_mean_of_the_top_by_hand():
    assert choose_patches(SIMILARITY, "top", 2, 1.0).tolist() == [[[0.0, 0.5, 0.5, 0.0]]]
    # A patch at -inf is none of the four best: there are three.
    assert_close(choose_patches(SIMILARITY, "top", 4, 1.0), torch.tensor([[[1 / 3, 1 / 3, 1 / 3, 0.0]]]))
    assert chosen_features(TEACHER[:, :3], torch.tensor([[[0.0, 0.5, 0.5]]])).tolist() == [[[2.0, 6.0]]]


def test_attention_by_hand():
    # exp of the similarities: 1, 4, 2. At half the temperature 1, 16, 4.
    assert_close(choose_patches(SIMILARITY, "attention", 4, 1.0), torch.tensor([[[1 / 7, 4 / 7, 2 / 7, 0.0]]]))
    assert_close(choose_patches(SIMILARITY, "attention", 4, 0.5), torch.tensor([[[1 / 21, 16 / 21, 4 / 21, 0.0]]]))
    mean = chosen_features(TEACHER[:, :3], torch.tensor([[[1 / 7, 4 / 7, 2 / 7]]]))
    assert_close(mean, torch.tensor([[[16 / 7, 40 / 7]]]))


def test_a_mean_of_16_bits_is_in_fp32():
    torch.manual_seed(0)
    tokens, patches, mask = torch.randn(2, 3, 8), torch.randn(2, 5, 8), torch.ones(2, 3, dtype=torch.bool)
    match = choose_patches(patch_similarities(tokens, patches), "attention", 4, 0.1)
    assert match.dtype == chosen_features(patches.bfloat16(), match).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        outcome = target_text_loss(tokens, patches, match, mask)
    assert_close(outcome, target_text_loss(tokens, patches, match, mask), rtol=0, atol=0)


def objective(student, weights, **settings):
    return Objective(student, LossConfig(weights=weights, **settings), 32)


@pytest.mark.parametrize("match", ["teacher", "student"])
@pytest.mark.parametrize("target", ["best", "top", "attention"])
def test_the_parts_are_those_of_the_whole(match, target):
    """Half of each is the document's (10): losses and gradients to the bit."""
    torch.manual_seed(0)
    config = load_preset("tiny", {})
    image, ids = torch.randint(256, (3, 3, 56, 56), dtype=torch.uint8), torch.randint(99, (3, 7))
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    masks = {"attention_mask": mask, "token_mask": mask, "padded": True}
    batch = type("Batch", (), {"image": image, "input_ids": ids, "grid": None, "wrong": 0, **masks})
    targets = Targets(torch.randn(3, 32), torch.randn(3, 16, 32))
    student = Student(config.student, 56, 99)
    results = []
    for weights in ({"target_cmli": 1.0}, {"target_image": 0.5, "target_text": 0.5}):
        student.zero_grad()
        total, item = objective(student, weights, match=match, target=target).whole(batch, targets)
        total.backward()
        results.append((total.item(), student.text_out.weight.grad.clone(), item))
    assert results[0][0] == results[1][0] == (results[1][2]["target_image"] + results[1][2]["target_text"]).item() / 2
    assert torch.equal(results[0][1], results[1][1]) and results[0][1].abs().sum() > 0


def test_more_patches_than_an_image_has_are_refused():
    loss = TargetText(LossConfig(target="top", target_top=17))
    loss.fit(17, 32)
    with pytest.raises(UserError, match=r"^loss.target_top is 17: an image has 16 patches: give fewer$"):
        loss.fit(16, 32)
    TargetText(LossConfig(target="best", target_top=17)).fit(16, 32)
