"""Which parameters of which encoders decay: matrices and convolutions, and nothing else."""

import dataclasses

import pytest

from ds_cmli.config.presets import load_preset
from ds_cmli.engine import parameter_groups
from ds_cmli.models.student import Student

CONFIG = load_preset("tiny", {}).student
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
CASES = [
    ("image", "vit_betwixt_patch16_reg4_gap_256", VIT),
    ("image", "vit_base_patch16_siglip_224", VIT),
    ("image", "beit_base_patch16_224", VIT),
    ("image", "swin_tiny_patch4_window7_224", SWIN),
    ("image", "convnext_atto", {"depths": [1, 1, 1, 1], "dims": [16, 16, 16, 32]}),
    ("image", "resnet18", {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 32]}),
    ("text", "t5", {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "d_kv": 16}),
    ("text", "deberta-v2", {**CONFIG.text_overrides, "relative_attention": True}),
    ("text", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
]


@pytest.mark.parametrize(("kind", "model", "overrides"), CASES, ids=[model for _, model, _ in CASES])
def test_matrices_alone_decay(kind, model, overrides):
    settings = {f"{kind}_model": model, f"{kind}_overrides": overrides}
    student = Student(dataclasses.replace(CONFIG, **settings), 64 if kind == "image" else 56, 99)
    names = {id(parameter): name for name, parameter in student.named_parameters()}
    decay, plain = ({names[id(p)] for p in group["params"]} for group in parameter_groups(student, 0.1))
    assert decay | plain == set(names.values()) and not decay & plain
    # Every layer that multiplies by a matrix or convolves, by the kinds of modules.
    multiplying = ("Linear", "Conv2d", "Conv1D", "Conv2dSame", "StdConv2d", "NonDynamicallyQuantizableLinear")
    matrices = {
        f"{name}.weight".removeprefix(".") for name, m in student.named_modules() if type(m).__name__ in multiplying
    }
    assert decay == matrices
