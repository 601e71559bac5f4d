"""`student.source`, of transformers and of open_clip: the first step equals the model; what cannot be is refused."""

import json
import math
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from ds_cmli.config.presets import load_preset
from ds_cmli.config.registry import score_scales
from ds_cmli.config.source import ModelSource, with_source_settings
from ds_cmli.data.images import View
from ds_cmli.data.pairs import Collate, Sample
from ds_cmli.errors import UserError
from ds_cmli.evaluate.__main__ import command as evaluate
from ds_cmli.inference import Model
from ds_cmli.models.student import Student
from tests import make
from tests.models import sources

TEXTS = [
    "A Red  apple, isn't it?",
    "  two dogs\n&  a_cat <b>",
    "1999's caf\u00e9 \u2014 \u4e2d\u6587!",
    "e\u0301clair",
    "long " * 99,
]
LOSS_BY_KIND = {"CLIP": "global", "SigLIP": "global_sigmoid", "vit": "global"}
LARGER_SETTINGS = {f"data.{name}": value for name, value in sources.LARGER.items()}
LORA = {"student.lora": {"image": ["q_proj", "v_proj"], "text": ["q_proj", "fc1"]}}
KINDS = (*sources.TRANSFORMERS_MODELS, *sources.OPEN_CLIP_KINDS)
EXPORTED = [("CLIP", {}), ("SigLIP", {}), ("roberta", {}), ("CLIP", sources.LARGER), ("SigLIP", {"image_size": 84})]
SLOW_EXPORTS = [*((kind, {}) for kind in ("vit", "convnext", "coca", "siglip")), ("vit", sources.LARGER)]


@pytest.fixture(scope="session")
def begun(folders):
    """The objective, the configuration and the tokenizer of a training from a source, made once."""
    return cache(lambda kind: sources.start(folders(kind)))


@pytest.fixture(scope="session")
def pictures():
    noise = np.random.default_rng(0)
    sizes = ((80, 120), (57, 56), (200, 99), (56, 56), (61, 88), (101, 73))
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]


@pytest.fixture(scope="session")
def library(folders, pictures):
    """The features of a source by its own library, computed once."""
    return cache(lambda kind: sources.library_features(folders(kind), pictures, TEXTS))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_equals_the_source(kind, begun, library, pictures):
    objective, config, words = begun(kind)
    expected = library(kind)
    pixels = torch.stack([View.of(config.data)(picture) for picture in pictures])
    std = torch.tensor(expected.std)[:, None, None]
    # In units of a pixel value of 1, this is the rounding of the mean alone.
    assert ((objective.student.normalize_pixels(pixels, torch.float32) - expected.pixels) * std).abs().max() < 1e-5
    batch = Collate(words)([Sample(pixels[0], words(text), 0, 0) for text in TEXTS])
    assert torch.equal(batch.input_ids, expected.ids)
    cls, patches = objective.student.image_embeddings(pixels)
    text_cls, tokens = objective.student.text_embeddings(batch.input_ids, batch.attention_mask)
    assert_close(cls, F.normalize(expected.images), rtol=0, atol=1e-5)
    assert_close(text_cls, F.normalize(expected.texts), rtol=0, atol=1e-5)
    if kind == "CLIP":  # the last token starts as the text
        assert_close(tokens[0, batch.attention_mask[0].sum() - 1], text_cls[0])
    rows, columns = objective.student.grid
    assert patches.shape == (6, rows * columns, cls.shape[1])
    assert tokens.shape == (5, expected.ids.shape[1], cls.shape[1])
    assert score_scales(objective.scales())["global"] == pytest.approx(expected.model.logit_scale.exp().item())
    bias = getattr(expected.model, "logit_bias", None)
    if bias is not None:
        assert objective.losses["global_sigmoid"].temperature.logit_bias.item() == pytest.approx(bias.item())


# The map of patches is the model's pooling over one patch.
POOLING = {
    "CLIP": lambda model, x: model.visual_projection(x),
    "SigLIP": lambda model, x: model.vision_model.head(x[:, None]),
    "vit": lambda model, x: x @ model.visual.proj,
    "clipa": lambda model, x: model.visual.ln_post(x) @ model.visual.proj,
    "coca": lambda model, x: model.visual.ln_post(model.visual.attn_pool(x[:, None]))[:, 0] @ model.visual.proj,
    "convnext": lambda model, x: model.visual.head(model.visual.trunk.forward_head(x[:, :, None, None])),
    "siglip": lambda model, x: model.visual.head(model.visual.trunk.attn_pool(x[:, None])),
    "token": lambda model, x: model.visual.trunk.head(x),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", POOLING)
def test_a_patch_starts_where_a_picture_of_it_alone_would(kind, begun, library):
    tower = begun(kind)[0].student.image
    model: Any = library(kind).model
    width = model.visual.trunk.num_features if hasattr(getattr(model, "visual", None), "trunk") else 32
    x = torch.randn(5, width)
    assert_close(tower.token_head(x), POOLING[kind](model, x), rtol=0, atol=1e-5)
    names = [name for name, _ in tower.named_parameters(remove_duplicate=False)]
    assert len(names) == len({*tower.parameters()})  # the map has parameters of its own


def test_shared_blocks_start_as_the_identity_where_widths_agree(folders, tmp_path):
    folder = sources.clip(tmp_path / "even", text_width=32)
    image = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    plain, blocks = (sources.start(folder, shared_blocks=n)[0].student for n in (0, 2))
    assert len(blocks.shared) == 2
    assert_close(blocks.image_embeddings(image), plain.image_embeddings(image), rtol=0, atol=0)
    with pytest.raises(UserError, match="32 and 48 wide: give 0"):
        sources.start(folders("CLIP"), shared_blocks=1)


@pytest.mark.parametrize("kind, loss", [("CLIP", "global"), ("SigLIP", "global_sigmoid"), ("siglip", "global_sigmoid")])
def test_the_preset_trains_the_loss_whose_temperature_the_source_has(kind, loss, folders):
    student = {"source": str(folders(kind))}
    assert load_preset("finetune", {"student": student}).loss.weights == {loss: 1.0, "cmli": 1.0}
    chosen = {"student": student, "loss": {"weights": {"global": 2.0}}}
    assert load_preset("finetune", chosen).loss.weights == {"global": 2.0}


def moved_weights(source: Path, export: Path) -> set[str]:
    trained = sources.library_weights(export)
    return {name for name, value in sources.library_weights(source).items() if not torch.equal(value, trained[name])}


@pytest.mark.slow
def test_it_is_evaluated_first_and_the_same_at_zero_3_and_back_in_its_library(folders, source, tmp_path):
    """By the preset `finetune`, as docs/finetune.md has it; then it goes on in another run."""

    def train(origin: Path, name: str, stage: int, steps: int) -> Path:
        ds_config = {"zero_optimization": {"stage": stage, "reduce_bucket_size": 100_000}}
        settings = {"optim.lr": 1e-3, "student.freeze_image": 2, "student.freeze_text": 1}
        return sources.train_from(origin, source, tmp_path / name, steps, settings, ds_config)

    def evaluations(run: Path) -> list[tuple[int, float]]:
        return [(line["step"], line["eval/val/global/mean_recall"]) for line in make.lines(run, "eval/val/pairs")]

    evaluated = CliRunner().invoke(evaluate, [str(folders("CLIP")), *source]).output
    assert "global" in evaluated and "combined" not in evaluated  # its patches and words are not trained
    two = train(folders("CLIP"), "two", 2, 4)
    assert [step for step, _ in evaluations(two)] == [0, 4]
    three = train(folders("CLIP"), "three", 3, 4)
    for name, value in make.weights(three).items():
        assert_close(value, make.weights(two)[name], rtol=1e-4, atol=1e-5)
    _, last_recall = evaluations(two)[-1]
    assert evaluations(train(two, "next", 2, 1))[0] == (0, last_recall)
    moved = moved_weights(folders("CLIP"), sources.export(two, tmp_path / "back", "--as", "clip"))
    assert not [name for name in moved if "vision_model.e" in name or "text_model.encoder.layers.0" in name]
    assert [name for name in moved if "text_model.encoder.layers.1" in name], moved


@pytest.mark.parametrize("kind, sizes", [*EXPORTED, *(pytest.param(*x, marks=pytest.mark.slow) for x in SLOW_EXPORTS)])
def test_trained_and_exported_the_library_computes_its_features(kind, sizes, folders, pictures, tmp_path):
    run = sources.run_of(folders(kind), tmp_path / "run", data=sizes)
    back = sources.export(run, tmp_path / "back", "--as", sources.library_of(kind))
    model = Model.load(run, "cpu")
    expected = sources.library_features(back, pictures, TEXTS)
    assert_close(model.embed_images(pictures).cls, F.normalize(expected.images), rtol=0, atol=1e-5)
    assert_close(model.embed_texts(TEXTS).cls, F.normalize(expected.texts), rtol=0, atol=1e-5)
    assert model.evaluator.scales["global"] == pytest.approx(expected.model.logit_scale.exp().item())
    source_weights = sources.library_weights(folders(kind))
    trained = sources.library_weights(back)
    assert not torch.equal(source_weights["logit_scale"], trained["logit_scale"])
    assert trained.keys() == {key for key in source_weights if not key.startswith("text_decoder.")}  # of a CoCa


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, more", [("CLIP", {}), ("SigLIP", {}), ("SigLIP", LORA), ("vit", {}), ("CLIP", LARGER_SETTINGS)]
)
def test_the_preset_trains_a_source_in_bf16_at_zero_2(kind, more, folders, source, tmp_path):
    ds_config = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    run = sources.train_from(folders(kind), source, tmp_path / "run", 3, {"optim.lr": 2e-3, **more}, ds_config)
    lines = make.lines(run)
    assert {f"loss/{LOSS_BY_KIND[kind]}", "loss/cmli"} <= lines[0].keys()
    assert len(lines) == 3 and all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    back = sources.export(run, tmp_path / "back", "--as", sources.library_of(kind))
    moved = moved_weights(folders(kind), back)
    assert sources.library_weights(back).keys() == sources.library_weights(folders(kind)).keys()
    assert "logit_scale" in moved
    if more is LORA:  # the rest of an encoder with adapters is frozen
        adapted = ("q_proj.weight", "v_proj.weight", "fc1.weight")
        assert [name for name in moved if ".layers." in name and not name.endswith(adapted)] == []
        assert any("vision_model" in name for name in moved) and any("fc1" in name for name in moved), moved


def test_other_names_of_a_model_of_open_clip(begun, folders, tmp_path, monkeypatch):
    """An architecture and a file of open_clip's own training; a name of the hub, from its cache."""
    trained = sources.write_open_clip(tmp_path / "vit", "vit", "epoch_1.pt")
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"ViT-small": sources.MODELS["vit"]})
    repository = tmp_path / "models--owner--vit"
    shutil.copytree(folders("vit"), repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    image = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    wanted = begun("vit")[0].student.image_embeddings(image)[0]
    for name in (f"open_clip:ViT-small@{trained}/epoch_1.pt", "owner/vit"):
        objective, config, _ = sources.start(name)
        assert config.data.tokenizer == "open_clip" and config.student.source == name
        assert torch.equal(objective.student.image_embeddings(image)[0], wanted)
    assert ModelSource("hf-hub:owner/vit").config["model_type"] == "open_clip"
    with pytest.raises(UserError, match=r"^student.source is 'owner/none': no such file or folder, nor on the hub: "):
        sources.start("owner/none")


def test_folders_that_both_libraries_load_are_transformers(folders, tmp_path):
    folder = sources.clip(tmp_path / "both")
    shutil.copy(folders("vit") / "open_clip_config.json", folder)
    assert sources.settings(folder).student.source_config["model_type"] == "clip"
    assert ModelSource(f"local-dir:{folder}").config["model_type"] == "open_clip"


def test_settings_of_a_training_are_free_and_those_that_contradict_the_source_are_one_line(folders):
    chosen = {"student": {"source": str(folders("CLIP")), "freeze_image": 2}, "data": {"context_length": 16}}
    out = with_source_settings(chosen)
    assert out["data"]["context_length"] == 16 and out["student"]["freeze_image"] == 2
    assert out["student"]["freeze_text"] == 0 and out["student"]["shared_blocks"] == 0  # whatever a preset has
    contradicting = (("student", "layers", 1), ("data", "padding", "full"), ("loss", "init_temperature", 2))
    for section, key, value in contradicting:
        line = rf"^{section}.{key} is {value!r}: [^\n]*student.source [^\n]*: leave it out$"
        with pytest.raises(UserError, match=line):
            with_source_settings({**chosen, section: {**chosen.get(section, {}), key: value}})
    with pytest.raises(UserError, match=r"^data.context_length is 16"):  # SigLIP attends to its padding
        with_source_settings({**chosen, "student": {"source": str(folders("SigLIP"))}})
    with pytest.raises(UserError, match="source_config is filled"):
        with_source_settings({"student": {"source_config": {}}})


def test_a_tokenizer_of_more_tokens_than_the_text_tower_has_is_one_line(folders):
    chosen = sources.settings(folders("SigLIP")).student
    with pytest.raises(UserError, match=r"its tokenizer has 10000 tokens, and its text encoder only \d+"):
        Student(chosen, 56, 10_000, 64, pretrained=False)


def refused(problem, source):
    with pytest.raises(UserError, match=rf"^student.source is '[^\n]*{problem}[^\n]*$"):
        sources.start(source)


CHANGES = [  # kind of source, its file, that without or with other content, and the problem
    ("CLIP", "config.json", None, "no config.json or"),
    ("CLIP", "config.json", b"{", "config.json cannot be read"),
    ("CLIP", "config.json", {"model_type": "bert"}, "its type is 'bert'"),
    ("CLIP", "preprocessor_config.json", None, "Can't load image processor"),
    ("CLIP", "preprocessor_config.json", {"do_normalize": False}, "not resized to 56 x 56 and normalised"),
    ("vit", "text_cfg", {"hf_model_name": "./none"}, "its text encoder: OSError"),
    ("vit", "vision_cfg", {"attentional_pool": "x"}, "pooled or projected otherwise"),
    ("vit", "vision_cfg", {"colour": 1}, "cannot train it: .*unexpected keyword .*'colour'"),
    ("vit", "vision_cfg", {"layers": 3}, "open_clip cannot load it: .*Missing key.*resblocks.2"),
    ("vit", "open_clip_model.safetensors", None, "open_clip cannot load it: RuntimeError: Required pretrained weights"),
]


@pytest.mark.parametrize("kind, part, change, problem", CHANGES)
def test_a_model_that_cannot_be_used_is_one_line(kind, part, change, problem, folders, tmp_path):
    folder = shutil.copytree(folders(kind), tmp_path / "copy")
    file = folder / ("open_clip_config.json" if part.endswith("_cfg") else part)
    if change is None:
        file.unlink()
    elif isinstance(change, bytes):
        file.write_bytes(change)
    else:
        content = json.loads(file.read_text())
        (content["model_cfg"][part] if part.endswith("_cfg") else content).update(change)
        file.write_text(json.dumps(content))
    refused(problem, folder)


def test_a_weight_that_is_missing_is_one_line(folders, tmp_path):
    folder = shutil.copytree(folders("CLIP"), tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused("cannot be loaded: ValueError: 1 are missing, such as visual_projection.weight", folder)


def test_a_name_that_cannot_be_used_is_one_line(folders, tmp_path, monkeypatch):
    refused("no such file or folder", tmp_path / "nowhere")
    refused("no such file or folder, nor on the hub", "~nouser/clip")
    refused("no config.json or open_clip_config.json there", folders("CLIP") / "config.json")
    refused("did you mean 'ViT-B-32'", "open_clip:ViTB-32@x.pt")
    refused("known, of 1[0-9]{2}, for instance: .{50,150}", "open_clip:unlike@x.pt")
    refused("file or tag is 'x.pt': known: .*laion2b_e16", "open_clip:ViT-B-32@x.pt")
    refused("give open_clip:ViT-B-32-quickgelu@openai", "open_clip:ViT-B-32@openai")
    refused("open_clip_config.json there", "local-dir:nowhere")
    monkeypatch.setitem(sys.modules, "open_clip", None)
    refused(r"a model of open_clip: pip install 'ds-cmli\[open_clip\]'", folders("vit"))
