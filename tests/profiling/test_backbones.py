"""A quick part of `profiling/backbones.py`: kinds of encoders over ZeRO stages, with and without checkpointing."""

import importlib.util
import sys

import pytest

from tests.conftest import ROOT

CASES = [
    ("image", "vit_base_patch16_siglip_224", 2, True),
    ("image", "swin_tiny_patch4_window7_224", 1, False),
    ("image", "resnet18", 3, True),
    ("text", "t5", 3, True),
    ("text", "albert", 2, True),
    ("text", "clip", 0, False),
]


@pytest.fixture(scope="module")
def backbones():
    spec = importlib.util.spec_from_file_location("backbones", ROOT / "profiling" / "backbones.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["backbones"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("kind", "model", "stage", "checkpointing"), CASES)
def test_trains_evaluates_and_is_predicted(backbones, kind, model, stage, checkpointing):
    case = next(case for case in (*backbones.IMAGES, *backbones.TEXTS) if case.model == model)
    row = backbones.tried(kind, case, backbones.deepspeed_json(stage, checkpointing, "fp32"))
    assert not row.refused
    assert row.good, row
