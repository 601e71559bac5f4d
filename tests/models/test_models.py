import dataclasses

import pytest
import torch
from torch.testing import assert_close

from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.objective import Objective
from ds_cmli.models.encoders import PixelNorm
from ds_cmli.models.student import Student
from ds_cmli.models.teacher import Targets, Teacher

CONFIG = load_preset("tiny", {})
S, VOCAB = CONFIG.data.image_size, 99


@pytest.fixture(scope="module")
def student():
    torch.manual_seed(0)
    return Student(CONFIG.student, S, VOCAB)


def inputs(batch=3, length=7):
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(256, (batch, 3, S, S), generator=generator, dtype=torch.uint8)
    ids = torch.randint(VOCAB, (batch, length), generator=generator)
    mask = torch.arange(length) < torch.tensor([[7], [3], [5]])[:batch]
    return image, ids, mask


def test_encoding_one_modality_gives_the_same(student):
    image, ids, mask = inputs()
    image_cls, patches, text_cls, tokens = student(image, ids, mask)
    assert_close(student.encode_image(image), (image_cls, patches))
    assert_close(student.encode_text(ids, mask), (text_cls, tokens))


def test_pixels_are_normalised_alike_in_16_bit(student):
    image = inputs()[0]
    exact = PixelNorm(student.image.mean, student.image.std)(image, torch.float32)
    mean, std = (torch.tensor(student.image.model.pretrained_cfg[k])[:, None, None] for k in ("mean", "std"))
    assert_close(exact, (image / 255 - mean) / std, rtol=1e-4, atol=1e-4)
    assert torch.equal(PixelNorm(student.image.mean, student.image.std).half()(image, torch.float32), exact)


def test_teacher_features_are_layer_normalised_and_of_the_chosen_block():
    torch.manual_seed(0)
    teacher = Teacher(dataclasses.replace(CONFIG.teacher, block=0), S, (4, 4))
    assert len(teacher.image.model.blocks) == 1  # later blocks are not held
    image = inputs()[0]
    targets = teacher(image)
    x = teacher.image.model.patch_embed(teacher.pixels(image, torch.float32))
    x = teacher.image.model.blocks[0](teacher.image.model._pos_embed(x))
    assert_close(targets.cls, torch.nn.functional.layer_norm(x[:, 0], (32,)))
    assert_close(targets.patches, torch.nn.functional.layer_norm(x[:, 1:], (32,)))
    assert not targets.patches.requires_grad


def test_other_teacher_width_goes_through_one_linear_head(student):
    config = LossConfig(weights={"target_cmli": 1.0, "cls_kd": 1.0})
    objective = Objective(student, config, teacher_width=48)
    assert objective.width_head.weight.shape == (48, 32)
    x = torch.randn(5, 32)
    assert_close(objective.width_head(objective.width_head(x), back=True), x)  # orthonormal: back is its inverse
    targets = Targets(torch.randn(3, 48), torch.randn(3, 16, 48))
    image, ids, mask = inputs()
    masks = {"attention_mask": mask, "token_mask": mask, "padded": bool(mask.logical_not().any())}
    batch = type("Batch", (), {"image": image, "input_ids": ids, "grid": None, "pair_id": None, **masks})
    total, item = objective(batch, targets)
    total.backward()
    assert objective.width_head.weight.grad.abs().sum() > 0
    assert set(item) == {"target_cmli", "cls_kd"}
    assert Objective(student, config, teacher_width=32).width_head is None


def test_target_cmli_alone_never_trains_g(student):
    objective = Objective(student, LossConfig(weights={"target_cmli": 1.0}), 32)
    student.zero_grad()
    image, ids, mask = inputs()
    masks = {"attention_mask": mask, "token_mask": mask, "padded": bool(mask.logical_not().any())}
    batch = type("Batch", (), {"image": image, "input_ids": ids, "grid": None, "pair_id": None, **masks})
    total, _ = objective(batch, Targets(torch.randn(3, 32), torch.randn(3, 16, 32)))
    total.backward()
    assert student.projection.weight.grad is None
    assert student.image_out.weight.grad.abs().sum() > 0
