"""What decays, of encoders of every kind; schedulers that keep no rates apart."""

import pytest

from ds_cmli import engine
from ds_cmli.common import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.engine.parameter_groups import parameter_groups
from ds_cmli.memory.inputs import without_weights
from tests.conftest import ZERO1

RATES = {"optim": {"lr": 1e-3, "layer_decay": 0.5, "lr_factors": {"text": 0.1}}}


def test_a_scheduler_with_one_rate_for_all_is_refused():
    content = {**ZERO1, "scheduler": {"type": "WarmupLR", "params": {}}}
    with pytest.raises(UserError, match=r"scheduler\.type is 'WarmupLR', which sets one rate"):
        engine.filled(load_preset("tiny", RATES), DeepSpeedConfig.of(content), 1, 10)


VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}
SWIN = {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]}
DEBERTA = {**load_preset("tiny", {}).student.text_overrides, "relative_attention": True}
CASES = [
    ("image", "vit_betwixt_patch16_reg4_gap_256", VIT),
    ("image", "beit_base_patch16_224", VIT),
    ("image", "swin_tiny_patch4_window7_224", SWIN),
    ("image", "convnext_atto", {"depths": [1, 1, 1, 1], "dims": [16, 16, 16, 32]}),
    ("image", "resnet18", {"layers": [1, 1, 1, 1], "channels": [16, 16, 16, 32]}),
    ("text", "t5", {"d_model": 32, "num_layers": 2, "num_heads": 2, "d_ff": 64, "d_kv": 16}),
    ("text", "deberta-v2", DEBERTA),
    ("text", "gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
]


@pytest.mark.parametrize(("kind", "model", "overrides"), CASES, ids=[model for _, model, _ in CASES])
def test_matrices_alone_decay(kind, model, overrides):
    student = {f"{kind}_model": model, f"{kind}_overrides": overrides}
    if kind == "image":
        student["image_weights"] = "random"
    loss = {"weights": {"global": 1.0, "cmli": 1.0}}
    size = {"image_size": 64 if kind == "image" else 56}
    config, vocab_size = without_weights(load_preset("tiny", {"student": student, "data": size, "loss": loss}))
    objective = engine.build_models(config, vocab_size)[0]
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    groups = parameter_groups(objective, 0.1, config.optim, 1e-3)
    decay, plain = ({names[id(p)] for p in group["params"]} for group in groups)
    assert decay | plain == set(names.values()) and not decay & plain
    # Every layer that multiplies by a matrix or convolves, by the kinds of modules.
    multiplying = ("Linear", "Conv2d", "Conv1D", "Conv2dSame", "StdConv2d", "NonDynamicallyQuantizableLinear")
    modules = objective.named_modules()
    assert decay == {f"{name}.weight" for name, module in modules if type(module).__name__ in multiplying}
