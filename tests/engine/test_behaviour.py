"""What an optimizer step of the engine changes, and what it must not: caching, frozen weights, rates, decay."""

import copy

import pytest
import torch
import torch.nn.functional as F

from tests import make

LOSSES = {"global": 1.0, "cmli": 1.0, "target_cmli": 1.0}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    return make.pairs(tmp_path_factory.mktemp("data") / "pairs", 20)


def engine(device, source, micro_batch=8, accumulation=1, ds_config=None, **sections):
    sections = {"loss": {"weights": LOSSES}, "data": {"source": source}, **sections}
    sections["optim"] = {"micro_batch": micro_batch, **sections.get("optim", {})}
    content = {"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": accumulation, **(ds_config or {})}
    return make.train_engine(device, content, **sections)


def batches(source, size, number):
    return make.batches(make.data_of(make.config(data={"source": source})), size, number)


def values(trained) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trained.objective.named_parameters()}


def same(ours, expected, limit=2e-5) -> None:
    """Gradients, relative to each one's length; below 1e-6 of the whole there is nothing to be relative to."""
    whole = torch.stack([g.norm() for g in expected.values()]).norm()
    for name, gradient in expected.items():
        error = (ours[name] - gradient).norm() / max(gradient.norm(), 1e-6 * whole)
        assert error < limit, (name, error.item())


# Gradient caching.


def test_cached_micro_batches_have_the_losses_and_gradients_of_one(device, source):
    whole = make.gradients(engine(device, source), batches(source, 8, 1))
    cached = make.gradients(engine(device, source, 2, 4), batches(source, 2, 4))
    assert cached[0] == pytest.approx(whole[0], rel=1e-5)
    same(cached[1], whole[1])


def test_cached_micro_batches_draw_the_same_dropout_again(device, source):
    """Against features of all micro-batches with their graphs kept, drawn in the same order."""
    sections = {"loss": {"weights": {"global": 1.0}}, "student": {"dropout": 0.4}}
    trained, parts = engine(device, source, 4, 2, **sections), batches(source, 4, 2)
    student = copy.deepcopy(trained.objective.student).train()
    torch.manual_seed(3)
    x, y = zip(*(student(of.image, of.input_ids, of.attention_mask)[::2] for of in parts), strict=True)
    logits = F.normalize(torch.cat(x), dim=-1) @ F.normalize(torch.cat(y), dim=-1).t() / 0.07
    own = torch.arange(8)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t(), own)) / 2
    expected.backward()
    torch.manual_seed(3)
    losses, gradients = make.gradients(trained, parts)
    assert losses["global"] == pytest.approx(expected.item(), rel=1e-4)
    of_student = {f"student.{name}": p.grad for name, p in student.named_parameters() if p.grad is not None}
    same({name: gradients[name] for name in of_student}, of_student, 1e-3)


def test_cached_micro_batches_in_fp16_have_the_gradients_of_fp32(device, source, fp16_device):
    full = make.gradients(engine(device, source, 4, 2), batches(source, 4, 2))[1]
    fp16 = {"fp16": {"enabled": True, "initial_scale_power": 8}}
    half = make.gradients(engine(device, source, 4, 2, fp16), batches(source, 4, 2))[1]
    for name in ("student.projection.weight", *(n for n in full if n.endswith("logit_scale"))):
        assert (half[name] / 2.0**8 - full[name]).norm() < 0.05 * full[name].norm(), name


# Weights.


def moved(trained, micro_batches) -> dict[str, float]:
    """The largest change of each parameter in a step."""
    before = values(trained)
    trained.step(micro_batches)
    return {name: (p - before[name]).abs().max().item() for name, p in values(trained).items()}


@pytest.mark.parametrize("stage", [2, 3])
def test_frozen_layers_keep_every_bit_and_the_others_move(device, source, stage):
    student = {"layers": 2, "freeze_image": 1, "freeze_text": 2}
    # At a decay that is not 0, so that a frozen weight would move without a gradient, too.
    json = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "weight_decay": 0.5}}}
    json["zero_optimization"] = {"stage": stage}
    if stage == 3:
        json["zero_optimization"]["stage3_param_persistence_threshold"] = 10**6
    trained = engine(device, source, ds_config=json, student=student)
    frozen = {name for name, p in trained.objective.named_parameters() if not p.requires_grad}
    if stage == 2:
        changes = moved(trained, batches(source, 8, 1))
        still = {name for name, change in changes.items() if not change}
        # A shared block starts as the identity: in its first step only its last matrices have a gradient.
        assert frozen <= still and not {name for name in still - frozen if "shared" not in name}
    assert not any(".blocks.1." in name for name in frozen if "student.image" in name)
    of_image = {name for name, _ in trained.objective.named_parameters() if name.startswith("student.image.")}
    assert {name for name in of_image if ".blocks.0." in name or "patch_embed" in name} <= frozen & of_image != of_image
    assert {name for name, _ in trained.objective.named_parameters() if "student.text." in name} <= frozen
    assert not any(name.startswith(("student.shared", "student.projection", "losses")) for name in frozen)


def test_a_layer_below_has_a_lower_rate(device, source):
    """Adam's first update is the rate, whatever the gradient."""
    optim = {"layer_decay": 0.5, "lr_factors": {"text": 0.1}, "lr": 1e-3, "warmup_share": 0.0}
    trained = engine(device, source, student={"layers": 2}, optim=optim)
    changes = moved(trained, batches(source, 8, 1))
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
        trained.step(batches(source, 8, 1))
        found.append(values(trained))
    decayed = {name for name, p in found[0].items() if not torch.equal(p, found[1][name])}
    assert "student.projection.weight" in decayed and any("shared" in name for name in decayed)
    for name, p in start.items():
        if not p.any():
            continue  # of zeros nothing decays
        table = any(part in name for part in ("bias", "pos_embed", "cls_token", "logit_scale", "embeddings"))
        assert (name in decayed) == (p.squeeze().dim() > 1 and not table), name


def test_a_loss_that_is_not_finite_changes_nothing(device, source):
    trained, (first, second) = engine(device, source), batches(source, 8, 2)
    trained.step([first])
    before, scale = values(trained), trained.objective.student.image_out
    handle = scale.register_forward_hook(lambda module, inputs, output: output * torch.inf)
    trained.step([second])
    handle.remove()
    assert all(map(torch.equal, before.values(), values(trained).values()))
    trained.step([second])
    assert not any(p.isnan().any() for p in values(trained).values())
    assert not torch.equal(before["student.projection.weight"], values(trained)["student.projection.weight"])


def test_each_rate_of_the_warm_up_is_that_of_its_update(device, source):
    """Half of the updates warm up: the first by its share of the rate, and not by 0."""
    trained = engine(device, source, optim={"lr": 1e-3, "warmup_share": 0.5})  # of 6 updates
    changes = [moved(trained, batches(source, 8, 1))["student.projection.weight"] for _ in range(2)]
    assert changes[0] == pytest.approx(1e-3 / 3, rel=0.05) and trained.lr == pytest.approx(2e-3 / 3)
