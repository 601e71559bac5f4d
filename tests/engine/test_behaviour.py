"""What an optimizer step of the engine changes, and what it must not: frozen weights, rates, decay."""

import pytest
import torch

from ds_cmli.config.presets import load_preset
from ds_cmli.engine import build_models
from ds_cmli.engine.parameter_groups import counts_line, group_parameters
from ds_cmli.errors import UserError
from ds_cmli.memory.inputs import without_weights
from tests import make

LOSSES = {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return make.pairs(tmp_path_factory.mktemp("data") / "pairs", 20)


def engine(device, source, ds_config=None, **sections):
    sections = {"loss": {"weights": LOSSES}, "data": {"source": source}, **sections}
    sections["optim"] = {"micro_batch": 8, **sections.get("optim", {})}
    return make.train_engine(device, {"zero_optimization": {"stage": 2}, **(ds_config or {})}, **sections)


def batch_of(source):
    return make.batches(make.data_of(make.config(data={"source": source})), 8, 1)


def values(trained) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained.objective.named_parameters()}


def moved(trained, micro_batches) -> dict[str, float]:
    """The largest change of each parameter in a step."""
    before = values(trained)
    trained.step(micro_batches)
    return {name: (p - before[name]).abs().max().item() for name, p in values(trained).items()}


def test_frozen_layers_keep_every_bit_and_the_others_move(device, source):
    # At a decay that is not 0, so that a frozen weight would move without a gradient, too.
    optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.5}}
    student = {"layers": 2, "freeze_image": 1, "freeze_text": 2}
    trained = engine(device, source, ds_config={"optimizer": optimizer}, student=student)
    # The first layers with the embeddings below, or the whole encoder.
    first = ("cls_token", "pos_embed", "patch_embed.", "blocks.0.")
    below = ("student.text.", *(f"student.image.model.{start}" for start in first))
    frozen = {name for name, p in trained.objective.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in trained.objective.named_parameters() if name.startswith(below)}
    changes = moved(trained, batch_of(source))
    still = {name for name, change in changes.items() if not change}
    # A shared block starts as the identity: in its first step only its last matrices have a gradient.
    assert frozen <= still and not {name for name in still - frozen if "shared" not in name}
    line = counts_line(trained.objective, None)
    assert "M trained: image " in line and "(0.00M trained)" in line and "M trained), text" in line
    with pytest.raises(UserError, match=r"student\.freeze_text is 3: the text encoder has 2 layers"):
        make.models(student={"layers": 2, "freeze_text": 3})


def test_a_layer_below_has_a_lower_rate(device, source):
    """Adam's first update is the rate, whatever the gradient."""
    optim = {"layer_decay": 0.5, "lr_factors": {"text": 0.1}, "lr": 1e-3, "warmup_share": 0.0}
    trained = engine(device, source, student={"layers": 2}, optim=optim)
    changes = moved(trained, batch_of(source))
    for name, change in changes.items():
        if name.endswith("mlp.fc1.weight") and "image" in name:
            assert change == pytest.approx(1e-3 * (0.5 if ".1." in name else 0.25), rel=0.05), name
        if "text" in name and name.endswith("intermediate.dense.weight"):
            assert change == pytest.approx(1e-4 * (0.5 if ".1." in name else 0.25), rel=0.05), name
    assert changes["student.projection.weight"] == pytest.approx(1e-3, rel=0.05)


def test_matrices_decay_and_vectors_tables_and_temperatures_do_not(device, source):
    found = []
    for decay in (0.0, 0.5):
        optimizer = {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": decay}}
        trained = engine(device, source, ds_config={"optimizer": optimizer}, optim={"warmup_share": 0.0})
        start = values(trained)
        trained.step(batch_of(source))
        found.append(values(trained))
    decayed = {name for name, p in found[0].items() if not torch.equal(p, found[1][name])}
    assert "student.projection.weight" in decayed and any("shared" in name for name in decayed)
    for name, p in start.items():
        if not p.any():
            continue  # of zeros nothing decays
        table = any(part in name for part in ("bias", "pos_embed", "cls_token", "logit_scale", "embeddings"))
        assert (name in decayed) == (p.squeeze().dim() > 1 and not table), name


def test_each_rate_of_the_warm_up_is_that_of_its_update(device, source):
    """Half of the updates warm up: the first by its share of the rate, and not by 0."""
    trained = engine(device, source, optim={"lr": 1e-3, "warmup_share": 0.5})  # of 6 updates
    changes = [moved(trained, batch_of(source))["student.projection.weight"] for _ in range(2)]
    assert changes[0] == pytest.approx(1e-3 / 3, rel=0.05) and trained.lr == pytest.approx(2e-3 / 3)


def test_a_scheduler_with_one_rate_for_all_is_refused(device, source):
    json = {"scheduler": {"type": "WarmupLR", "params": {}}}
    with pytest.raises(UserError, match=r"scheduler\.type is 'WarmupLR', which sets one rate"):
        engine(device, source, ds_config=json, optim={"layer_decay": 0.5})


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
    objective = build_models(config, vocab_size)[0]
    names = {id(parameter): name for name, parameter in objective.named_parameters()}
    groups = group_parameters(objective, 0.1, config.optim, 1e-3)
    decay, plain = ({names[id(p)] for p in group["params"]} for group in groups)
    assert decay | plain == set(names.values()) and not decay & plain
    # Every layer that multiplies by a matrix or convolves, by the kinds of modules.
    multiplying = ("Linear", "Conv2d", "Conv1D", "Conv2dSame", "StdConv2d", "NonDynamicallyQuantizableLinear")
    modules = objective.named_modules()
    assert decay == {f"{name}.weight" for name, module in modules if type(module).__name__ in multiplying}
