"""The losses against literals that can be checked by hand, and against fp64 autograd."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from ds_cmli.cmli.contrastive import contrastive_loss
from ds_cmli.losses import functions as losses
from ds_cmli.losses.inputs import Features, LossInputs

F64 = torch.float64


def test_other_pairs_of_the_same_picture_or_caption_are_no_negatives():
    pairs = torch.tensor([[7, 1], [9, 2], [7, 3], [3, 2]])
    ignore = losses.duplicates(pairs[:2], pairs)
    assert ignore.tolist() == [[False, False, True, False], [False, False, False, True]]
    # The second rank's rows: its own texts stand in columns 2 and 3.
    ignore = losses.duplicates(pairs[2:], pairs, 2)
    assert ignore.tolist() == [[True, False, False, False], [False, True, False, False]]


def test_contrastive_loss_ignores_by_hand():
    s = torch.tensor([[1.0, 9.0, 0.0], [8.0, 1.0, 0.0], [0.0, 0.0, 1.0]], requires_grad=True)
    pairs = torch.tensor([[4, 1], [4, 2], [5, 3]])
    ignore = losses.duplicates(pairs, pairs)
    outcome = contrastive_loss(s, s, torch.zeros(1), ignore=ignore)
    # Rows and columns 0 and 1 are (1, 0) without what is ignored, row and column 2 is (1, 0, 0).
    expected = (2 * math.log(1 + math.exp(-1)) + math.log(1 + 2 * math.exp(-1))) / 3
    assert outcome.item() == pytest.approx(expected)
    outcome.backward()
    assert s.grad[0, 1] == s.grad[1, 0] == 0 and (s.grad[2, :2] > 0).all()


def test_a_batch_has_as_many_texts_as_images():
    """A tile of one may have any shape, where it says by `first` that it is one."""
    scores, scale = torch.rand(16, 8), torch.zeros(1)
    for loss in (
        lambda **tile: contrastive_loss(scores, scores, scale, **tile),
        lambda **tile: losses.sigmoid_loss(scores, scale, scale, **tile),
    ):
        assert loss(first=0).isfinite()
        with pytest.raises(ValueError, match=r"(scores|s_i2t) has shape \[16, 8\], \[B, B\]: B is 8, but 16"):
            loss()
    with pytest.raises(ValueError, match=r"s_t2i has shape \[8, 16\], \[R, T\]: R is 8, but 16 in s_i2t"):
        contrastive_loss(scores, scores.t(), scale, 0)
    with pytest.raises(ValueError, match=r"ignore has shape \[1, 8\]"):
        contrastive_loss(scores, scores, scale, 0, ignore=torch.zeros(1, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"positives must have shape \[R, T\], not \[8\]"):
        losses.sigmoid_loss(scores, scale, scale, 0, torch.zeros(8, dtype=torch.bool))


def target_cmli_loss(patches, tokens, teacher, match, mask, reduction="mean"):
    """(10), as `losses.distillation.TargetCMLI` has it of the student's and teacher's features."""
    image = losses.target_image_loss(patches, teacher, reduction)
    return (image + losses.target_text_loss(tokens, teacher, match, mask, reduction)) / 2


@pytest.mark.parametrize("texts", [1, 8])
def test_target_losses_of_unequal_batches_are_refused(texts):
    """Each of these gave a number by broadcasting or by `gather`."""
    images, tokens = torch.rand(16, 5, 4), torch.rand(texts, 6, 4)
    match, mask = torch.zeros(texts, 6, dtype=torch.int64), torch.ones(texts, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=f"{texts} texts are no multiple of 16 images"):
        target_cmli_loss(images, tokens, images, match, mask)
    with pytest.raises(ValueError, match=f"teacher_patches .*B is {texts}, but 16 in student_patches"):
        target_cmli_loss(images, torch.rand(16, 6, 4), tokens[:, :5], match, mask)
    with pytest.raises(ValueError, match=f"{texts} texts are no multiple of 16 images"):
        losses.match_patches(tokens, images)
    with pytest.raises(ValueError, match=f"{texts} texts are no multiple of 16 images"):
        losses.cls_distillation_loss(images[:, 0], tokens[:, 0], images[:, 0])


def test_matching_is_not_narrowed_by_autocast():
    tokens, patches = torch.rand(3, 6, 4), torch.rand(3, 50, 4)
    patches[:, 1::2] = patches[:, ::2] * (1 + 1e-4 * torch.rand(3, 25, 4))  # no two alike, but in 16 bits
    expected = losses.match_patches(tokens, patches)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(losses.match_patches(tokens, patches), expected)


# One text of two tokens (the third is padding) and one image of two patches, H = 2.
PATCHES = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
TOKENS = torch.tensor([[[0.0, 2.0], [3.0, 0.0], [9.0, 9.0]]])
MASK = torch.tensor([[True, True, False]])
TEACHER = torch.tensor([[[1.0, 1.0], [0.0, 2.0]]])


def test_match_patches_by_hand():
    # (0, 2) points along patch 1, (3, 0) along patch 0; (9, 9) ties and takes the lowest.
    assert losses.match_patches(TOKENS, PATCHES).tolist() == [[1, 0, 0]]


def test_target_cmli_by_hand():
    match = losses.match_patches(TOKENS, PATCHES)
    # (7): patches against the teacher at equal places: |(0, -1)|^2 = 1 and |(0, -1)|^2 = 1, mean 1.
    # (9): token 0 against teacher patch 1: (0, 0); token 1 against teacher patch 0: |(2, -1)|^2 = 5; mean over the two
    # valid tokens 2.5; the padding token counts nowhere.
    total = target_cmli_loss(PATCHES, TOKENS, TEACHER, match, MASK, "sum")
    assert total.item() == pytest.approx((1 + 2.5) / 2)
    mean = target_cmli_loss(PATCHES, TOKENS, TEACHER, match, MASK, "mean")
    assert mean.item() == pytest.approx((1 + 2.5) / 2 / 2)  # H = 2


def test_target_cmli_is_the_mean_over_tokens_and_then_over_texts():
    # One text of one token at distance 4, one of three tokens at distance 0: (4 + 0) / 2, not 4 / 4.
    patches = torch.zeros(2, 1, 1)
    tokens = torch.tensor([[[2.0], [5.0], [5.0]], [[0.0], [0.0], [0.0]]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    match = torch.zeros(2, 3, dtype=torch.long)
    outcome = target_cmli_loss(patches, tokens, patches, match, mask, "sum")
    assert outcome.item() == pytest.approx((0 + 2.0) / 2)


def test_target_cmli_gradient_against_fp64():
    torch.manual_seed(0)
    patches, tokens = torch.randn(3, 5, 4, dtype=F64), torch.randn(3, 6, 4, dtype=F64)
    teacher, match = torch.randn(3, 5, 4, dtype=F64), torch.randint(5, (3, 6))
    mask = torch.rand(3, 6) < 0.6
    mask[1] = False  # a text without tokens counts zero and gets no gradient

    def oracle(p, t):
        image = sum(((p[b, n] - teacher[b, n]) ** 2).sum() for b in range(3) for n in range(5)) / 15
        text = 0
        for b in range(3):
            item = [((t[b, m] - teacher[b, match[b, m]]) ** 2).sum() for m in range(6) if mask[b, m]]
            text = text + (sum(item) / len(item) if item else 0)
        return (image + text / 3) / 2

    def ours(p, t):
        return target_cmli_loss(p, t, teacher, match, mask, "sum")

    expected, results = [], []
    for function, grads in ((oracle, expected), (ours, results)):
        p, t = patches.clone().requires_grad_(), tokens.clone().requires_grad_()
        value = function(p, t)
        grads.extend([value.detach(), *torch.autograd.grad(value, (p, t))])
    assert_close(results, expected, rtol=1e-12, atol=1e-12)
    assert results[2][1].abs().max() == 0
    half = target_cmli_loss(patches.half(), tokens.half(), teacher.half(), match, mask, "sum")
    assert half.dtype == torch.float32


def test_cls_distillation_by_hand():
    image, text, teacher = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]), torch.tensor([[0.0, 0.0]])
    assert losses.cls_distillation_loss(image, text, teacher, "sum").item() == pytest.approx((1 + 9) / 2)
    assert losses.cls_distillation_loss(image, text, teacher).item() == pytest.approx((1 + 9) / 4)


def test_masked_mean_ignores_padding_and_empty_rows():
    values = torch.tensor([[1.0, 100.0], [7.0, 7.0]])
    mask = torch.tensor([[True, False], [False, False]])
    assert losses.masked_mean(values, mask).item() == pytest.approx(0.5)


def test_global_scores_are_not_narrowed_by_autocast():
    cls = torch.rand(2, 3, 8)
    features = Features(cls[0], cls[0][:, None], cls[1], cls[1][:, None])
    expected = F.normalize(cls[0], dim=-1) @ F.normalize(cls[1], dim=-1).t()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(LossInputs(features, *[None] * 5).global_scores, expected)
