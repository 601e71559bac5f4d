"""LoRA: what is trained, merged and refused."""

from importlib.util import find_spec

import pytest
import torch
from torch.testing import assert_close

from ds_cmli.common import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.engine import build_models
from ds_cmli.models.blocks import merged

pytestmark = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed: pip install 'ds-cmli[test]'")
LORA = {"image": ["qkv", "mlp.fc1"], "text": ["query"]}


def built(lora, **more):
    config = load_preset("tiny", {"student": {"lora": lora, "lora_rank": 4, **more}})
    return build_models(config, 99)[0]


def filled(objective):
    """With numbers in B, which starts as zero."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in objective.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    return objective.eval()


def encoded(objective):
    generator = torch.Generator().manual_seed(1)
    image = torch.randint(256, (2, 3, 56, 56), dtype=torch.uint8, generator=generator)
    ids = torch.randint(3, 99, (2, 7), generator=generator)
    return objective.student(image, ids, torch.arange(7) < torch.tensor([[7], [4]]))


def test_only_adapters_of_these_encoders_are_trained():
    trained = {name for name, p in built({"image": ["qkv"]}).named_parameters() if p.requires_grad}
    of_image = {name for name in trained if name.startswith("student.image.")}
    blocks = {f"student.image.model.blocks.{k}.attn.qkv.lora_{side}.default.weight" for k in (0, 1) for side in "AB"}
    assert of_image == blocks
    assert "student.projection.weight" in trained and any(name.startswith("student.text.") for name in trained)
    frozen = built({"image": ["qkv"]}, freeze_image=1)
    assert sum("lora_" in name for name, p in frozen.named_parameters() if p.requires_grad) == 2


def test_merged_weights_give_the_same_without_adapters():
    plain, adapted = built({}), filled(built(LORA))
    before = encoded(plain.eval())
    assert adapted.student.lora_scale == 4.0  # 16 / 4
    weights = merged(adapted.state_dict(), adapted.student.lora_scale)
    plain.load_state_dict(weights)  # every name, and no other
    for entry, expected, other in zip(encoded(plain), encoded(adapted), before, strict=True):
        assert_close(entry, expected, rtol=1e-4, atol=1e-4)
        assert (entry - other).abs().max() > 1e-3


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
        built(lora, freeze_image=2 if lora is LORA else 0)
