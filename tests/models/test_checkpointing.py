"""Activation checkpointing of every kind of block: the same gradients, and each parameter's once."""

import dataclasses
from collections import Counter
from functools import partial

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from ds_cmli.config.presets import load_preset
from ds_cmli.models.checkpointing import checkpoint_blocks
from ds_cmli.models.student import Student

CONFIG = load_preset("tiny", {})
VOCAB = 99
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = CONFIG.student.text_overrides
IMAGE = {
    "vit_tiny_patch16_224": VIT,
    "beit_base_patch16_224": VIT,  # relative positions
    "vit_small_patch16_dinov3": VIT,  # rotary positions
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "convnext_atto": {"depths": [1, 1, 1, 1], "dims": [16, 16, 16, 32]},
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 32]},
}
RELATIVE = {
    "relative_attention": True,
    "position_biased_input": False,
    "pos_att_type": ["p2c", "c2p"],
    "norm_rel_ebd": "layer_norm",
}
TEXT = {
    "bert": SMALL,
    "albert": {**SMALL, "embedding_size": 16},  # its layers share their weights
    "deberta-v2": {**SMALL, **RELATIVE},
    "modernbert": SMALL,
    "t5": {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "d_kv": 16},
    "clip": SMALL,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},  # keeps keys and values unless told otherwise
}


@pytest.mark.parametrize(("kind", "model"), [*(("image", m) for m in IMAGE), *(("text", m) for m in TEXT)])
def test_gradients_are_the_same_and_come_once(kind, model):
    settings = {f"{kind}_model": model, f"{kind}_overrides": (IMAGE if kind == "image" else TEXT)[model]}
    torch.manual_seed(0)
    size = 64 if kind == "image" else 56  # of the picture, in pixels
    student = Student(dataclasses.replace(CONFIG.student, **settings), size, VOCAB)
    image = torch.randint(256, (2, 3, size, size), dtype=torch.uint8)
    ids = torch.randint(3, VOCAB, (2, 7))
    mask = torch.arange(7) < torch.tensor([[7], [4]])

    def gradients():
        student.zero_grad()
        torch.manual_seed(1)  # of what drops out
        sum(x.square().mean() for x in student(image, ids, mask)).backward()
        return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    expected = gradients()
    assert len(student.blocks) >= 4 - (model == "albert")
    checkpoint_blocks(student.blocks, partial(checkpoint, use_reentrant=True))
    arrived: Counter[str] = Counter()
    for name, parameter in student.named_parameters():
        parameter.register_hook(lambda gradient, name=name: arrived.update([name]))
    found = gradients()
    assert_close(found, expected)
    assert set(arrived.values()) == {1}
