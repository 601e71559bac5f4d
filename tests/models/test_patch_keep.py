"""Patch dropout: which patches, what the encoder makes of them, training on one and two ranks, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file

from ds_cmli import engine
from ds_cmli.cmli.token_keep import PatchKeep
from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.memory.inputs import longest_batch, without_weights
from tests.checkpoint.runs import ranks
from tests.export.conftest import export, make_run
from tests.make import pairs
from tests.stranger.drive import ONE_BLOCK

pytestmark = pytest.mark.usefixtures("alone")
LOSSES = dict.fromkeys(("global", "cmli", "target_cmli"), 1.0)
STEPS, BATCH = 3, 8


def test_the_choice_is_of_sample_and_step_alone():
    keep, index = PatchKeep(0.4, 36, seed=5), torch.arange(4000) * 7
    places = keep.places(index, step=3)
    assert places.shape == (4000, 15) and (places.diff(dim=1) > 0).all()
    assert torch.equal(keep.places(index[1000:1001], 3), places[1000:1001])
    chosen = torch.zeros(4000, 36).scatter_(1, places, 1.0)
    assert (chosen.mean(0) - 15 / 36).abs().max() < 0.04  # five standard deviations
    assert (torch.corrcoef(chosen.t()) - torch.eye(36)).abs().max() < 0.11  # -1/35 is expected of two patches
    for other in (keep.places(index, 4), PatchKeep(0.4, 36, seed=6).places(index, 3)):
        both = chosen.gather(1, other).sum(1)
        assert abs(both.mean() - 15 * 15 / 36) < 0.2  # as many as two independent choices share


def build(share: float, side: int = 56, **settings):
    given = {
        "student": {"patch_keep": share, **settings},
        "loss": {"weights": LOSSES},
        "data": {"image_size": side},
    }
    config = load_preset("tiny", given)
    return config, *engine.build_models(*without_weights(config))


@torch.no_grad()
def test_the_encoder_sees_the_kept_patches_alone_and_all_in_evaluation():
    config, objective, teacher = build(0.5)
    student, batch = objective.student, longest_batch(config, 3)
    batch.image.random_(0, 255)
    batch.index = torch.tensor([4, 9, 2])
    objective.step = 7
    features = objective._features(batch)
    places = PatchKeep(0.5, 16, config.run.seed).places(batch.index, 7)
    assert torch.equal(features.places, places)
    model = student.image.model
    x = model._pos_embed(model.patch_embed(student.pixels(batch.image, torch.float32)))  # class token and patches
    x = torch.stack([torch.cat([row[:1], row[1 + kept]]) for row, kept in zip(x, places, strict=True)])
    for block in (*model.blocks, student.image_in, *(shared.block for shared in student.shared), student.image_out):
        x = block(x)
    torch.testing.assert_close(features.image_cls, x[:, 0])
    torch.testing.assert_close(features.patches, x[:, 1:])
    targets = teacher(batch.image)
    inputs = objective._inputs(features, batch, targets)
    expected = torch.stack([row[kept] for row, kept in zip(targets.patches, places, strict=True)])
    assert torch.equal(inputs.teacher.patches, expected) and torch.equal(inputs.teacher.cls, targets.cls)
    assert objective.embed(batch).features["patches"].shape[1] == 8
    objective.eval()
    assert objective._features(batch).patches.shape[1] == student.encode_image(batch.image)[1].shape[1] == 16


@pytest.mark.parametrize(
    "share, settings, line",
    [
        (0.0, {}, "student.patch_keep is 0.0: "),
        (1.5, {}, "student.patch_keep is 1.5: "),
        (0.5, {"image_model": "resnet10t", "image_overrides": {}, "side": 64}, "student.patch_keep is 0.5: "),
        (0.5, {"image_model": "beit_base_patch16_224", "image_overrides": {"embed_dim": 32, "depth": 2, "num_heads": 2,
         "patch_size": 7}}, "student.patch_keep is 0.5: student.image_model 'beit_base_patch16_224' needs all patches"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_line(share, settings, line):
    with pytest.raises(UserError, match=f"^{line}") as error:
        build(share, **settings)
    assert "\n" not in str(error.value)


def test_an_export_has_all_patches(tmp_path):
    """It is compared with the student's own features where it is written."""
    folder = export(make_run(tmp_path / "run", {"patch_keep": 0.5}), tmp_path / "model")
    assert json.loads((folder / "config.json").read_text())["settings"]["student"]["patch_keep"] == 1


CELLS = {1: [(3, 1, "gather")], 2: [(2, 2, "ring")]}  # ranks: (stage, accumulation, exchange)


@pytest.mark.slow
def test_the_same_at_another_stage_and_on_two_ranks(tmp_path):
    data = pairs(tmp_path / "pairs", count=63)
    named = {}
    for world_size, some in CELLS.items():
        tasks = []
        for stage, accumulation, exchange in some:
            name = f"{world_size}-{stage}-{accumulation}-{exchange}"
            file, out = tmp_path / f"{name}.json", tmp_path / name
            settings = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": accumulation}
            file.write_text(json.dumps({**settings, "activation_checkpointing": {}}))
            given = ["--preset", "tiny", "--steps", str(STEPS), "--log-every", "1", "--data", data]
            given += ["--deepspeed_config", str(file), "--micro-batch", str(BATCH // world_size // accumulation)]
            given += ["--set", "student.patch_keep=0.5", "--set", "student.dropout=0", "--losses", "global,cmli"]
            given += ["--set", f"loss.cmli_exchange={exchange}", "--set", "run.match_maps=0", *ONE_BLOCK]
            tasks.append({"arguments": [*given, "--output-dir", str(out)]})
            named[name] = out
        codes, _ = ranks(tmp_path, world_size, tasks, timeout=3000)
        assert codes == [0] * len(some)
    whole = load_file(next(iter(named.values())) / "student.safetensors")
    for name, out in named.items():
        weights = load_file(out / "student.safetensors")
        far = max(((weights[key] - x).norm() / x.norm()).item() for key, x in whole.items() if x.dim() == 2)
        print(f"{name}: largest relative difference of a matrix {far:.1e}")
        assert far < 1e-3, name
