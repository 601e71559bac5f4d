"""The blocks under activation checkpointing and compiled: results as without, memory, what is refused."""

import dataclasses
from collections import Counter
from itertools import count
from unittest import mock

import pytest
import torch
from torch.testing import assert_close

from ds_cmli.config.presets import load_preset
from ds_cmli.models.blocks import checkpoint_blocks
from ds_cmli.models.student import Student
from tests import make
from tests.checkpoint.runs import json_file
from tests.drive_train import drive
from tests.metrics_file import metrics

CONFIG = load_preset("tiny", {})
VOCAB = 99
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SMALL = CONFIG.student.text_overrides
IMAGE = {
    "beit_base_patch16_224": VIT,  # relative positions
    "vit_small_patch16_dinov3": VIT,  # rotary positions
    "swin_tiny_patch4_window7_224": {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "resnet18": {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 32]},
}
RELATIVE = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "norm_rel_ebd": "layer_norm"}
TEXT = {
    "bert": SMALL,
    "albert": {**SMALL, "embedding_size": 16},  # its layers share their weights
    "deberta-v2": {**SMALL, **RELATIVE, "position_biased_input": False},
    "t5": {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "d_kv": 16},
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
    checkpoint_blocks(student.blocks)
    arrived: Counter[str] = Counter()
    for name, parameter in student.named_parameters():
        parameter.register_hook(lambda gradient, name=name: arrived.update([name]))
    result = gradients()
    assert_close(result, expected)
    assert set(arrived.values()) == {1}


def losses(device, compile_, stage, checkpointing):
    """Of three steps in fp32 with dropout, which is to draw what it draws without the compiler."""
    json = {"train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage}}
    json |= {"activation_checkpointing": {}} if checkpointing else {}
    chosen = {"student": {"dropout": 0.2}, "loss": {"weights": {"global": 1.0}}, "run": {"compile": compile_}}
    trained, results = make.train_engine(device, json, **chosen), []
    for number, batch in enumerate(make.batches(make.data_of(make.config()), 4, 3)):
        torch.manual_seed(number)
        results.append(make.step(trained, [batch])["total"])
    trained.engine.destroy()
    return results


# The blocks: of the image encoder, of the text encoder, and the one that both share.
@pytest.mark.slow
@pytest.mark.parametrize(("stage", "checkpointing", "numbers"), [(3, False, (0, 1)), (1, True, (1,))])
def test_the_losses_of_traced_blocks(device, monkeypatch, stage, checkpointing, numbers):
    """Some blocks as torch.compile traces them, forward and backward, whose operators run as they are: Inductor takes
    20 s of each block, and the tracing of each some seconds."""
    number, compile_ = count(), torch.compile

    def traced_or_not(function, **options):
        return compile_(function, backend="aot_eager", **options) if next(number) in numbers else function

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = losses(device, "off", stage, checkpointing)  # which imports what compiles functions of its own
    monkeypatch.setattr(torch, "compile", traced_or_not)
    traced = losses(device, "blocks", stage, checkpointing)
    assert traced == pytest.approx(plain, rel=1e-4)
    assert next(number) == 3 - (stage == 3)  # without the shared one, which is called twice
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= len(numbers)


def test_divided_leaf_modules_are_evaluated_also_where_the_first_layers_are_frozen(tmp_path, alone):
    """Blocks that are compiled under ZeRO-3 are its leaf modules; evaluation uses other methods than forward."""
    zero = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    given = ["--preset", "tiny", "--losses", "global,cmli", "--steps", "2", "--set", "run.match_maps=0"]
    given += ["--data", make.pairs(tmp_path / "pairs", count=40), "--set", "student.freeze_image=1"]
    losses = []
    for kind in ("off", "blocks"):
        more = [*json_file(tmp_path / "ds.json", zero), "--set", f"run.compile={kind}", "--eval-every", "1"]
        with mock.patch("torch.compile", lambda function, **_: function):  # which takes minutes
            assert drive([*given, *more, "--output-dir", str(tmp_path / kind)]) == 0
        assert [line["step"] for line in metrics(tmp_path / kind) if "eval/val/pairs" in line] == [1, 2]
        losses.append([line["loss"] for line in metrics(tmp_path / kind) if "loss" in line])
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=1e-6)
