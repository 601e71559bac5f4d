"""Frozen weights, rates and decay: an optimizer step of the engine changes what it must, and nothing else."""

import copy

import pytest

from ds_cmli.config.presets import load_preset
from ds_cmli.engine import build_models
from ds_cmli.engine.parameter_groups import counts_line, group_parameters
from ds_cmli.errors import UserError
from ds_cmli.memory.inputs import without_weights
from tests import make

LOSSES = {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}


def engine(device, ds_config=None, **sections):
    sections = {"loss": {"weights": LOSSES}, **sections}
    sections["optim"] = {"micro_batch": 8, **sections.get("optim", {})}
    return make.train_engine(device, {"zero_optimization": {"stage": 2}, **(ds_config or {})}, **sections)


def moved(trained, micro_batches) -> dict[str, float]:
    """Return the largest change of each parameter in a step."""
    parameters = dict(trained.objective.named_parameters())
    before = copy.deepcopy(parameters)
    trained.step(micro_batches)
    return {name: (p - before[name]).abs().max().item() for name, p in parameters.items()}


def test_frozen_layers_keep_every_bit_and_the_others_move(device, data):
    # At a decay that is not 0, so that a frozen weight would move without a gradient, too.
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.5}}
    student = {"layers": 2, "freeze_image": 1, "freeze_text": 2}
    trained = engine(device, ds_config={"optimizer": optimizer}, student=student)
    # The first layers with the embeddings below, or the whole encoder.
    first = ("cls_token", "pos_embed", "patch_embed.", "blocks.0.")
    below = ("student.text.", *(f"student.image.model.{start}" for start in first))
    frozen = {name for name, p in trained.objective.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in trained.objective.named_parameters() if name.startswith(below)}
    changes = moved(trained, make.batches(data, 8, 1))
    still = {name for name, change in changes.items() if not change}
    # A shared block starts as the identity: in its first step only its last matrices have a gradient.
    assert frozen <= still and not {name for name in still - frozen if "shared" not in name}
    # The JSON's decay, of matrices alone.
    assert {group["weight_decay"] for group in trained.engine.optimizer.param_groups} == {0.0, 0.5}
    line = counts_line(trained.objective, None)
    assert "M trained: image " in line and "(0.00M trained)" in line and "M trained), text" in line
    with pytest.raises(UserError, match=r"student\.freeze_text is 3: the text encoder has 2 layers"):
        make.models(student={"layers": 2, "freeze_text": 3})


def test_a_layer_below_has_a_lower_rate(device, data):
    """Adam's first update is the rate, whatever the gradient."""
    optim = {"layer_decay": 0.5, "lr_factors": {"text": 0.1}, "lr": 1e-3, "warmup_share": 0.0}
    trained = engine(device, student={"layers": 2}, optim=optim)
    changes = moved(trained, make.batches(data, 8, 1))
    for name, change in changes.items():
        if name.endswith("mlp.fc1.weight") and "image" in name:
            assert change == pytest.approx(1e-3 * (0.5 if ".1." in name else 0.25), rel=0.05), name
        if "text" in name and name.endswith("intermediate.dense.weight"):
            assert change == pytest.approx(1e-4 * (0.5 if ".1." in name else 0.25), rel=0.05), name
        if name.endswith("patch_embed.proj.weight"):
            assert change == pytest.approx(1e-3 * 0.125, rel=0.05), "what is below the layers is one step lower"
    assert changes["student.projection.weight"] == pytest.approx(1e-3, rel=0.05)


DEBERTA = {**load_preset("tiny", {}).student.text_overrides, "relative_attention": True}
CASES = [
    ("image", "vit_betwixt_patch16_reg4_gap_256", make.VIT),
    ("image", "beit_base_patch16_224", make.VIT),
    *(("image", model, overrides) for model, overrides in make.FEATURE_MAPS.items()),
    ("text", "t5", make.T5),
    ("text", "deberta-v2", DEBERTA),
    ("text", "gpt2", make.GPT2),
]


@pytest.mark.parametrize(("kind", "model", "overrides"), CASES, ids=[model for _, model, _ in CASES])
def test_matrices_alone_decay(kind, model, overrides):
    student = {f"{kind}_model": model, f"{kind}_overrides": overrides}
    if kind == "image":
        student["image_weights"] = "random"
    loss = {"weights": {"global": 1.0, "cmli": 1.0}}
    size = {"image_size": 64 if kind == "image" else 56}
    config, vocab_size = without_weights(load_preset("tiny", {"student": student, "data": size, "loss": loss}))
    objective = build_models(config, vocab_size)[0]
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    groups = group_parameters(objective, 0.1, config.optim, 1e-3)
    decay, plain = ({names[id(p)] for p in group["params"]} for group in groups)
    assert decay | plain == set(names.values()) and not decay & plain
    # Every layer that multiplies by a matrix or convolves, by the kinds of modules.
    multiplying = ("Linear", "Conv2d", "Conv1D", "Conv2dSame", "StdConv2d", "NonDynamicallyQuantizableLinear")
    modules = objective.named_modules()
    assert decay == {f"{name}.weight" for name, module in modules if type(module).__name__ in multiplying}
