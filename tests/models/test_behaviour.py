import pytest
import torch
from torch.testing import assert_close

from ds_cmli.config.schema import TeacherConfig
from ds_cmli.errors import UserError
from ds_cmli.models.adapters import merge_adapters
from ds_cmli.models.student import Teacher
from tests import make

LORA = {"image": ["qkv", "mlp.fc1"], "text": ["query"]}


@pytest.fixture(scope="module")
def objective():
    return make.models()[0].eval()


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 3, 56, 56), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


def texts(length: int, attended: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randint(5, 90, (3, length), generator=g), torch.arange(length).expand(3, -1) < attended


@torch.no_grad()
def test_padding_changes_no_text(objective, images):
    """Neither its tokens nor its length count, also in the blocks that image and text share."""
    student = objective.student
    for block in student.shared.parameters():
        block.add_(torch.randn(block.shape, generator=torch.Generator().manual_seed(2)) * 0.1)
    ids, mask = texts(12, 5)
    *_, cls, tokens = student(images, ids, mask)
    refilled = ids.clone()
    refilled[:, 5:] = 7
    for padded_ids, padded_mask in ((refilled, mask), (ids[:, :8], mask[:, :8]), (ids[:, :5], mask[:, :5])):
        *_, padded_cls, padded_tokens = student(images, padded_ids, padded_mask)
        assert_close(padded_cls, cls, rtol=1e-4, atol=1e-5)
        assert_close(padded_tokens[:, :5], tokens[:, :5], rtol=1e-4, atol=1e-5)
    *_, changed_cls, _ = student(images, ids.index_fill(1, torch.tensor([4]), 7), mask)
    assert (changed_cls - cls).abs().max() > 1e-3


def test_the_teacher_gives_normalised_features_of_frozen_weights(images):
    _, teacher = make.models()
    targets = teacher(images)
    assert targets.patches.shape == (3, 16, 32) and not targets.patches.requires_grad
    for x in (targets.cls, targets.patches):
        assert x.mean(-1).abs().max() < 1e-3 and (x.var(-1, correction=0) - 1).abs().max() < 0.05
    assert not any(p.requires_grad for p in teacher.parameters())


def test_a_teacher_of_convolutions_gives_a_picture_the_same_features_in_each_batch(images):
    """BatchNorm would otherwise compare the pictures of a batch, and change its statistics."""
    overrides = make.FEATURE_MAPS["resnet18"]
    teacher = Teacher(TeacherConfig(model="resnet18", weights="random", block=-1, overrides=overrides), 64, (2, 2))
    larger = torch.nn.functional.pad(images, (0, 8, 0, 8))
    together = teacher.train()(larger).patches
    assert_close(teacher(larger[:1]).patches, together[:1], rtol=1e-4, atol=1e-4)
    assert torch.equal(teacher(larger).patches, together)


@torch.no_grad()
def test_the_teachers_patches_are_resampled_to_the_students_grid():
    """A teacher of 7 x 7 patches: what is at one side of its picture is at that side of the student's grid."""
    overrides = {"embed_dim": 32, "depth": 1, "num_heads": 2, "patch_size": 8}
    _, teacher = make.models(teacher={"overrides": overrides})
    assert teacher.image.grid == (7, 7)
    for name, parameter in teacher.image.named_parameters():
        if name.endswith(("attn.proj.weight", "attn.proj.bias", "fc2.weight", "fc2.bias", "pos_embed")):
            parameter.zero_()
    left = torch.zeros(1, 3, 56, 56, dtype=torch.uint8)
    left[..., :14] = 255
    x = teacher(left).patches.view(4, 4, 32)
    assert_close(x, x[:1].expand(4, 4, 32), rtol=1e-3, atol=1e-3)
    assert (x[:, 0] - x[:, 3]).norm() > 1 and (x[:, 2] - x[:, 3]).norm() < 1e-2


def test_one_projection_starts_orthonormal_and_serves_both_sides(objective):
    weight = objective.student.projection.weight
    assert_close(weight @ weight.t(), torch.eye(16), rtol=1e-4, atol=1e-5)
    assert sum("projection.weight" in name for name, _ in objective.named_parameters()) == 1


def adapted(lora: dict[str, list[str]], **student):
    pytest.importorskip("peft", reason="pip install 'ds-cmli[test]'")
    return make.models(student={"layers": 2, "lora": lora, "lora_rank": 4, **student})[0].eval()


def test_only_adapters_of_these_encoders_are_trained():
    trained = {name for name, p in adapted({"image": ["qkv"]}).named_parameters() if p.requires_grad}
    adapters = {f"student.image.model.blocks.{k}.attn.qkv.lora_{side}.default.weight" for k in (0, 1) for side in "AB"}
    assert {name for name in trained if name.startswith("student.image.")} == adapters
    assert "student.projection.weight" in trained and any(name.startswith("student.text.") for name in trained)
    frozen = adapted({"image": ["qkv"]}, freeze_image=1)
    assert sum("lora_" in name for name, p in frozen.named_parameters() if p.requires_grad) == 2


@torch.no_grad()
def test_merged_weights_give_the_same_without_adapters(images):
    plain = adapted({})
    objective = adapted(LORA)
    inputs = (images, *texts(7, 4))
    for name, parameter in objective.named_parameters():
        if "lora_B" in name:  # which starts as zero
            torch.nn.init.normal_(parameter)
    unadapted = plain.student(*inputs)
    assert objective.student.lora_scale == 4.0  # 16 / 4
    merged = merge_adapters(objective.state_dict(), objective.student.lora_scale)
    plain.load_state_dict(merged)  # every name, and no other
    features = plain.student(*inputs), objective.student(*inputs), unadapted
    for merged_feature, adapted_feature, plain_feature in zip(*features, strict=True):
        assert_close(merged_feature, adapted_feature, rtol=1e-4, atol=1e-4)
        assert (merged_feature - plain_feature).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("lora", "line"),
    [
        ({"image": ["qvk"]}, r"student\.lora\.image has 'qvk', which no layer's name ends with: did you mean 'qkv'"),
        ({"text": ["query", "embeddings"]}, r"student\.lora\.text has 'embeddings': \S+ is no nn\.Linear but Bert"),
        (LORA, r"student\.freeze_image is 2, all layers of the image encoder, and student\.lora"),
    ],
)
def test_adapters_that_cannot_be_are_one_line(lora, line):
    with pytest.raises(UserError, match=line):
        adapted(lora, freeze_image=2 if lora is LORA else 0)
