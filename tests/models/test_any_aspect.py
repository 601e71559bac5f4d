"""Pictures of any aspect: the encoder, the losses, training on one and two ranks, evaluation, memory, refusals."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.naflexvit import batch_patchify, checkpoint_filter_fn
from torch.testing import assert_close

from ds_cmli import engine, models
from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.presets import load_preset
from ds_cmli.config.registry import IMAGE
from ds_cmli.data.aspect import laid_out, patch_mask
from ds_cmli.data.load import build_data
from ds_cmli.distributed import process_group as distributed
from ds_cmli.inference import Model
from ds_cmli.memory.inputs import longest_batch
from ds_cmli.models.backbone import ImageRequest
from tests.conftest import spawn
from tests.drive_train import drive as train
from tests.models.aspects import NAFLEX, SETTINGS, SIZES, of_many_aspects

pytestmark = pytest.mark.usefixtures("alone")
GRIDS = [(3, 3), (1, 9), (4, 2), (2, 3)]
WEIGHTS = dict.fromkeys(("global", "cmli", "target_cmli"), 1.0)


def encoder(model="vit_tiny_patch16_224", **overrides):
    torch.manual_seed(0)
    request = ImageRequest("student.image_", model, "random", SIZES | overrides, 42, True)
    return models.build(IMAGE, "auto", request).eval()


def pictures(grids=GRIDS):
    """uint8 [B, 3, 42, 42] and int64 [B, 2] of random pictures."""
    generator = torch.Generator().manual_seed(1)
    images = []
    for h, w in grids:
        image = torch.randint(256, (3, 14 * h, 14 * w), dtype=torch.uint8, generator=generator)
        images.append(laid_out(image, 14, 42)[0])
    return torch.stack(images), torch.tensor(grids)


@torch.no_grad()
def test_a_square_picture_is_encoded_as_by_the_vit():
    vit, naflex = encoder(), encoder(**NAFLEX)
    assert type(vit).__name__ == "TimmTokens" and type(naflex).__name__ == "TimmNaFlex"
    state = copy.deepcopy(vit.model.state_dict())
    naflex.model.load_state_dict(checkpoint_filter_fn(state, naflex.model))
    pixels = torch.randn(2, 3, 42, 42)
    assert_close(naflex(pixels), vit(pixels), rtol=1e-5, atol=1e-5)
    square = torch.tensor([[3, 3], [3, 3]])
    assert_close(naflex(pixels, square), vit(pixels), rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("model, more", [("vit_tiny_patch16_224", NAFLEX), ("naflexvit_base_patch16_gap", {})])
def test_each_picture_is_encoded_as_alone_and_as_by_timm(model, more):
    """timm's own positions, by grid_sample, with the patches that a picture has alone."""
    naflex = encoder(model, **more)
    naflex.model.embeds.pos_embed.normal_()
    naflex.model.embeds.pos_embed_use_grid_sample = True
    naflex.model.embeds.pos_embed_interp_mode = "bilinear"
    image, grid = pictures()
    noise = image.float() + 300 * torch.rand(image.shape)  # in the cells that no patch has, too
    mask = patch_mask(grid, 9).view(4, 1, 3, 1, 3, 1)
    there = mask.expand(4, 3, 3, 14, 3, 14).reshape(image.shape)
    pixels = torch.where(there, image.float(), noise) / 255
    result = naflex(pixels, grid)
    prefix = naflex.prefix - (not naflex.has_class_token)
    for row, (h, w) in enumerate(GRIDS):
        patches, _ = batch_patchify(pixels[row : row + 1], (14, 14), channels_last=naflex.model.embeds.channels_last)
        number = torch.arange(h * w)
        coordinates = torch.stack([number // w, number % w], 1)[None]
        alone = naflex.model.forward_features(patches[:, : h * w], coordinates)["patches"][0]
        assert_close(result[row, naflex.prefix : naflex.prefix + h * w], alone[prefix:], rtol=1e-4, atol=1e-5)
        first = alone[0] if naflex.has_class_token else alone[prefix:].mean(0)
        assert_close(result[row, 0], first, rtol=1e-4, atol=1e-5)


def built(**more):
    config = load_preset("tiny", SETTINGS | {"loss": {"weights": WEIGHTS}, **more})
    objective, teacher = engine.build_models(config, 999)
    batch = longest_batch(config, 4)
    batch.image, batch.grid = pictures()
    batch.input_ids = torch.arange(4 * 32).view(4, 32) + 5
    return objective, teacher, batch


def test_losses_are_those_of_the_patches_that_there_are():
    objective, teacher, batch = built(loss={"weights": WEIGHTS})
    targets = teacher(batch.image, batch.grid)
    _, item = objective(batch, targets)
    features = objective._features(batch)
    project, counts = objective.student.projection, [h * w for h, w in GRIDS]
    tokens = F.normalize(project(features.tokens), dim=-1)
    rows, of_images, of_texts = [], [], []
    for i, n in enumerate(counts):
        patches = features.patches[i, :n]
        unit = F.normalize(project(patches), dim=-1)
        rows.append(cmli_scores_reference(unit[None], tokens, batch.token_mask))
        of_images.append((patches - targets.patches[i, :n]).square().mean())
        matched = F.normalize(project(targets.patches[i, :n]), dim=-1)
        best = (tokens[i] @ matched.T).argmax(1)
        distance = (features.tokens[i] - targets.patches[i, best]).square().mean(1)
        of_texts.append(distance[batch.token_mask[i]].mean())
    s_i2t, s_t2i = (torch.cat(side) for side in zip(*rows, strict=True))
    scale, own = objective.losses["cmli"].temperature.logit_scale.exp(), torch.arange(4)
    expected = (F.cross_entropy(scale * s_i2t, own) + F.cross_entropy(scale * s_t2i.T, own)) / 2
    assert_close(item["cmli"], expected.detach(), rtol=1e-5, atol=1e-6)
    expected = (torch.stack(of_images).mean() + torch.stack(of_texts).mean()) / 2
    assert_close(item["target_cmli"], expected.detach(), rtol=1e-5, atol=1e-6)


def test_no_gradient_depends_on_the_other_cells():
    objective, teacher, batch = built()
    results = []
    for fill in (0, 255):
        cells = batch.image.view(4, 3, 3, 14, 3, 14)
        there = patch_mask(batch.grid, 9).view(4, 1, 3, 1, 3, 1)
        batch.image = torch.where(there, cells, torch.full_like(cells, fill)).reshape(4, 3, 42, 42)
        objective.zero_grad()
        objective(batch, teacher(batch.image, batch.grid))[0].backward()
        results.append({name: p.grad for name, p in objective.named_parameters()})
    for name, grad in results[0].items():
        assert_close(grad, results[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> list[str]:
    return of_many_aspects(tmp_path_factory.mktemp("data") / "pairs")


def arguments_of(settings=SETTINGS, steps=6):
    out = ["--preset", "tiny", "--steps", str(steps), "--eval-every", "4", "--set", "run.match_maps=2"]
    for section, values in settings.items():
        for name, value in values.items():
            out += ["--set", f"{section}.{name}={json.dumps(value)}"]
    return out


def test_a_run_is_used(source, tmp_path):
    given = [*arguments_of(steps=1), *source, "--set", f"loss.weights={json.dumps(WEIGHTS)}"]
    assert train([*given, "--output-dir", str(tmp_path / "run")]) == 0
    model = Model.load(tmp_path / "run")
    wide, square = Image.new("RGB", (90, 30), "red"), Image.new("RGB", (30, 30), "red")
    both = model.embed_images([wide, square])
    assert both.grid.tolist() == [[2, 4], [3, 3]] and model.read(wide).shape == (3, 28, 56)
    assert model.match(wide, "picture of red").similarity.shape[1] == 8
    texts = model.embed_texts(["picture of red", "blue"])
    scores, alone = model.scores(both, texts), model.scores(model.embed_images([wide]), texts)
    assert_close(scores["cmli"].i2t[0], alone["cmli"].i2t[0], rtol=1e-3, atol=1e-3)


def engine_of_rank(rank, world, source, stage, accumulation):
    more = {
        "optim": {"micro_batch": 8 // world // accumulation},
        "loss": {"weights": WEIGHTS},
    }
    data = SETTINGS["data"] | {"source": source}
    config = load_preset("tiny", {**SETTINGS, **more, "data": data})
    pairs = build_data(config.data, 0)
    content = {"zero_optimization": {"stage": stage}, "gradient_accumulation_steps": accumulation}
    ds_config = DeepSpeedConfig.of(content).filled(config.optim, world, 3)
    train_engine = engine.build(config, ds_config, pairs.vocab_size, 3, torch.device("cpu"))
    losses = []
    for step in range(3):
        batches = []
        for part in range(accumulation):
            first = 8 * step + (rank * accumulation + part) * 8 // world // accumulation
            batches.append(pairs.collate([pairs.train[first + n] for n in range(8 // world // accumulation)]))
        result = train_engine.step(batches)
        mean = torch.stack([micro.stacked() for micro in result]).mean(0)
        losses.append(distributed.mean_over_ranks(mean))
    return torch.stack(losses)


LAYOUTS = [(2, 1), (1, 1), (3, 2), (1, 2)]  # ZeRO stage, accumulation


def engines_of_rank(rank, world, source, layouts):
    return [engine_of_rank(rank, world, source, *layout) for layout in layouts]


@pytest.fixture(scope="module")
def trained(source):
    """The losses of one rank, and those of each layout by each of two ranks."""
    [[one]] = spawn(engines_of_rank, 1, source[1], [(1, 1)])
    of_ranks = spawn(engines_of_rank, 2, source[1], LAYOUTS)
    return one, dict(zip(LAYOUTS, zip(*of_ranks, strict=True), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_two_ranks_and_micro_batches_train_as_one(layout, trained):
    one, of_layouts = trained
    for losses in of_layouts[layout]:
        assert_close(losses, one, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize(
    "settings, line",
    [
        (
            {"data": {"aspect_patch": 14, "image_size": 40}},
            "data.aspect_patch is 14: data.image_size is 40, which must",
        ),
        (
            {"student": {"image_overrides": SIZES}},
            "student.image_model takes square pictures alone: give 0, or a model",
        ),
        ({"teacher": {"overrides": SIZES}}, "teacher.model takes square pictures alone: give 0, or a model with"),
        ({"data": {"aspect_patch": 21, "image_size": 42}}, "student.image_model has patches of 14 pixels"),
        (
            {"data": {"aspect_patch": 14, "image_size": 56, "source": "demo"}},
            "the demo's scenes are square: give 0, or --data",
        ),
    ],
)
def test_what_cannot_be_is_one_line(settings, line, source, tmp_path, capfd):
    merged = {section: {**SETTINGS.get(section, {}), **values} for section, values in (SETTINGS | settings).items()}
    given = [] if "source" in merged["data"] else source
    assert train([*arguments_of(merged), *given, "--output-dir", str(tmp_path / "run")], mistakes=True) == 2
    printed = capfd.readouterr().out
    assert line in printed and printed.count("error:") == 1


def test_rotary_positions_are_refused():
    request = ImageRequest("teacher.", "eva02_tiny_patch14_224", "random", NAFLEX, 42, True, block=-1)
    with pytest.raises(UserError, match="rotary positions"):
        models.build({"timm_naflex": IMAGE["timm_naflex"]}, "auto", request)
