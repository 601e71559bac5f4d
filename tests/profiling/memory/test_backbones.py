"""A quick part of `profiling/memory/backbones.py`: kinds of encoders over ZeRO stages, precisions and checkpointing."""

import pytest

CASES = [
    ("image", "resnet18", 3, True, "fp32"),
    ("text", "t5", 2, True, "bf16"),
    ("text", "clip", 0, False, "fp32"),
]


@pytest.fixture(scope="module")
def backbones():
    from profiling.memory import backbones

    return backbones


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "model", "stage", "checkpointing", "precision"),
    CASES,
)
def test_trains_evaluates_and_is_predicted(backbones, kind, model, stage, checkpointing, precision):
    case = next(case for case in (*backbones.IMAGES, *backbones.TEXTS) if case.model == model)
    row = backbones.tried(kind, case, backbones.deepspeed_json(stage, checkpointing, precision))
    assert not row.refused
    assert row.good, row
