"""The two parts of Target-CMLI and their weights."""

import pytest
import torch

from ds_cmli.config.presets import load_preset
from ds_cmli.config.schema import LossConfig
from ds_cmli.losses.objective import Objective
from ds_cmli.models.student import Student
from ds_cmli.models.teacher import Targets


def test_the_parts_are_those_of_the_whole():
    """Half of each is the document's (10): losses and gradients to the bit."""
    torch.manual_seed(0)
    config = load_preset("tiny", {})
    image, ids = torch.randint(256, (3, 3, 56, 56), dtype=torch.uint8), torch.randint(99, (3, 7))
    mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    masks = {"attention_mask": mask, "token_mask": mask, "padded": True}
    batch = type("Batch", (), {"image": image, "input_ids": ids, "grid": None, "wrong": 0, **masks})
    targets = Targets(torch.randn(3, 32), torch.randn(3, 16, 32))
    student = Student(config.student, 56, 99)
    values, gradients = {}, {}
    for weights in ((1.0, 1.0), (2.0, 0.0), (0.0, 2.0), (0.5, 3.0)):
        student.zero_grad()
        parts = dict(zip(("target_image_weight", "target_text_weight"), weights, strict=True))
        total, _ = Objective(student, LossConfig(weights={"target_cmli": 1.0}, **parts), 32).whole(batch, targets)
        total.backward()
        values[weights] = total.item()
        gradients[weights] = [side.weight.grad for side in (student.image_out, student.text_out)]
    image, text = values[2.0, 0.0], values[0.0, 2.0]
    assert values[1.0, 1.0] == pytest.approx((image + text) / 2, rel=1e-7)
    assert values[0.5, 3.0] == pytest.approx((0.5 * image + 3 * text) / 2)
    # Each side has its own output layer, which one part alone trains.
    assert gradients[2.0, 0.0][1] is None and gradients[0.0, 2.0][0] is None
    for both, alone in zip(gradients[1.0, 1.0], (gradients[2.0, 0.0][0], gradients[0.0, 2.0][1]), strict=True):
        assert torch.equal(2 * both, alone) and both.abs().sum() > 0
