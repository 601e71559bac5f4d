"""A quick part of `profiling/memory/backbones.py`: kinds of encoders over ZeRO stages, precisions and checkpointing."""

import pytest

CASES = [
    ("image", "resnet18", 3, True, "fp32"),
    ("text", "t5", 2, True, "bf16"),
    ("text", "clip", 0, False, "fp32"),
]
SOAK = [
    ("text", "t5", 3, True, "bf16"),
    ("image", "vit_base_patch16_siglip_224", 2, True, "fp32"),
    ("image", "swin_tiny_patch4_window7_224", 1, False, "bf16"),
    ("image", "swinv2_tiny_window8_256", 3, False, "bf16"),
    ("image", "vit_relpos_small_patch16_224", 2, True, "bf16"),
    ("text", "albert", 2, True, "fp32"),
]


@pytest.fixture(scope="module")
def backbones():
    from profiling.memory import backbones

    return backbones


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "model", "stage", "checkpointing", "precision"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.soak) for case in SOAK)],
)
def test_trains_evaluates_and_is_predicted(backbones, kind, model, stage, checkpointing, precision):
    case = next(case for case in (*backbones.IMAGES, *backbones.TEXTS) if case.model == model)
    row = backbones.tried(kind, case, backbones.deepspeed_json(stage, checkpointing, precision))
    assert not row.refused
    assert row.good, row
