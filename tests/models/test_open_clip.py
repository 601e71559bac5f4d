"""`student.source` in open_clip's format: the first step equals the model, and what cannot be is refused."""

import json
import shutil
import sys
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ds_cmli.common import UserError
from ds_cmli.config.source import Source
from ds_cmli.data.images import View
from ds_cmli.data.pairs import Collate, Sample
from tests.models.dual_models import settings, start

open_clip = pytest.importorskip("open_clip", reason="pip install 'ds-cmli[test]'")
from tests.models.open_clip_models import MODELS, losses, saved  # noqa: E402

TEXTS = ["a red car", "Zebra! & <b>", "two dogs sitting under a tree " * 20]
KINDS = (*MODELS, "roberta")  # with a text encoder of transformers
ALIKE = ("quick", "clipa", "token")  # as others are, in most


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("open_clip")
    return {name: saved(root / name, name) for name in KINDS}


@pytest.fixture(scope="session")
def begun(folders):
    """The objective, the configuration and the tokenizer of a training from a source, made once."""
    return cache(lambda name: start(folders[name], losses(folders[name])))


@pytest.fixture(scope="session")
def pictures():
    noise = np.random.default_rng(0)
    sizes = ((80, 120), (57, 56), (200, 99), (56, 56), (61, 88), (101, 73))
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in KINDS])
def test_the_first_step_equals_the_source(name, folders, begun, pictures):
    folder = folders[name]
    objective, config, words = begun(name)
    theirs, transform = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
    wanted, std = torch.stack(list(map(transform, pictures))), torch.tensor(theirs.visual.image_std)
    pixels = torch.stack([View.of(config.data)(picture) for picture in pictures])
    given = objective.student.pixels(pixels, torch.float32)
    assert ((given - wanted) * std[:, None, None]).abs().max() < 1e-5  # of 1: rounding of the mean alone
    full = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    batch = Collate(words)([Sample(pixels[0], words(text), 0, 0) for text in TEXTS])
    assert torch.equal(batch.input_ids, full)
    with torch.no_grad():
        images, texts = F.normalize(theirs.eval().encode_image(wanted)), F.normalize(theirs.encode_text(full))
        cls, patches = objective.student.image_embeddings(pixels)
        text_cls, tokens = objective.student.text_embeddings(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(cls, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(text_cls, texts, rtol=0, atol=1e-5)
    rows, columns = objective.student.grid
    assert patches.shape == (6, rows * columns, cls.shape[1])
    assert tokens.shape == (3, full.shape[1], cls.shape[1])
    assert objective.score_scales()["global"] == pytest.approx(theirs.logit_scale.exp().item())
    if theirs.logit_bias is not None:
        assert objective.losses["global_sigmoid"].temperature.logit_bias.item() == pytest.approx(-11.5)


@pytest.mark.parametrize("name", ["vit", "clipa", "coca", "convnext", "siglip", "token"])
def test_a_patch_starts_where_a_picture_of_it_alone_would(name, begun):
    """The map of patches is the model's pooling over one patch."""
    tower = begun(name)[0].student.image
    model: Any = tower.model
    pooling = {
        "vit": lambda x: x @ model.proj,
        "clipa": lambda x: model.ln_post(x) @ model.proj,
        "coca": lambda x: model.ln_post(model.attn_pool(x[:, None]))[:, 0] @ model.proj,
        "convnext": lambda x: model.head(model.trunk.forward_head(x[:, :, None, None])),
        "siglip": lambda x: model.head(model.trunk.attn_pool(x[:, None])),
        "token": lambda x: model.trunk.head(x),
    }
    x = torch.randn(5, model.trunk.num_features if hasattr(model, "trunk") else 32)
    torch.testing.assert_close(tower.token_head(x), pooling[name](x), rtol=0, atol=1e-5)
    own = {id(parameter) for parameter in tower.token_head.parameters()}
    assert own.isdisjoint(id(parameter) for parameter in model.parameters())


def test_weights_by_a_name_and_a_file_and_of_its_own_training(begun, tmp_path, monkeypatch):
    folder = saved(tmp_path / "vit", "vit", "epoch_1.pt")
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", {"ViT-small": MODELS["vit"]})
    image = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    wanted = begun("vit")[0].student.image_embeddings(image)[0]
    name = f"open_clip:ViT-small@{folder}/epoch_1.pt"
    objective, config, _ = start(name, losses(folder))
    assert torch.equal(objective.student.image_embeddings(image)[0], wanted)
    assert config.data.tokenizer == "open_clip" and config.student.source == str(name)


def test_a_name_of_the_hub_is_read_from_its_cache(begun, folders, tmp_path, monkeypatch):
    from huggingface_hub import constants

    repository = tmp_path / "models--owner--vit"
    shutil.copytree(folders["vit"], repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    image = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    objective, config, _ = start("owner/vit", losses("owner/vit"))
    assert config.data.tokenizer == "open_clip"
    wanted = begun("vit")[0].student.image_embeddings(image)[0]
    assert torch.equal(objective.student.image_embeddings(image)[0], wanted)
    assert Source("hf-hub:owner/vit").config["model_type"] == "open_clip"
    with pytest.raises(UserError, match=r"^student.source is 'owner/none': no folder, and the hub does not give it: "):
        start("owner/none", {"global": 1.0})


def test_folders_that_both_libraries_load_are_transformers(folders, tmp_path):
    from tests.models.dual_models import clip

    folder = clip(tmp_path / "both")
    shutil.copy(folders["vit"] / "open_clip_config.json", folder)
    assert settings(folder, losses(folder)).student.source_config["model_type"] == "clip"
    assert Source(f"local-dir:{folder}").config["model_type"] == "open_clip"


LOADS = "open_clip cannot load it"
REFUSED = [
    ({"hf_model_name": "./none"}, "text_cfg", "the sizes of its text encoder cannot be read"),
    ({"tokenizer_mode": "clips"}, "text_cfg", "its tokenizer_mode is 'clips'"),
    ({"proj_type": "none"}, "text_cfg", "its proj_type is 'none'"),
    ({"vocab_size": 100}, "text_cfg", f"{LOADS}: .*size mismatch for text.token_embedding"),
    ({"attentional_pool": "cascade"}, "vision_cfg", "its attentional_pool is 'cascade'"),
    ({"timm_pool": "rot_attn"}, "vision_cfg", "its timm_pool is 'rot_attn'"),
    ({"width": 33}, "vision_cfg", f"{LOADS}: AssertionError: embed_dim must be divisible by num_heads"),
    ({"colour": 1}, "vision_cfg", "cannot be used: .*unexpected keyword argument 'colour'"),
    ({"timm_model_name": "vit_none"}, "vision_cfg", f"{LOADS}: RuntimeError: Unknown model"),
    ({"layers": 3}, "vision_cfg", rf"{LOADS}: .*Missing key.*visual.transformer.resblocks.2"),
    ({"layers": 1}, "vision_cfg", rf"{LOADS}: .*Unexpected key.*visual.transformer.resblocks.1"),
    ({"resize_mode": "longest"}, "preprocess_cfg", "its resize_mode is 'longest'"),
]


@pytest.mark.parametrize("values, section, problem", REFUSED)
def test_a_model_that_cannot_be_used_is_one_line(values, section, problem, folders, tmp_path):
    folder = shutil.copytree(folders["vit"], tmp_path / "copy")
    path = folder / "open_clip_config.json"
    content = json.loads(path.read_text())
    part = content if section == "preprocess_cfg" else content["model_cfg"]
    part[section] |= values
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"^student.source is '[^\n]*{problem}[^\n]*$"):
        start(folder, {"global": 1.0, "cmli": 1.0})


def test_adapters_in_a_fused_projection_are_refused(folders):
    with pytest.raises(UserError, match=r"^student.lora.text has 'in_proj', which no layer's name ends with: "):
        start(folders["vit"], {"global": 1.0}, lora={"text": ["in_proj"]})
    with pytest.raises(UserError, match=r"^student.lora.text has 'out_proj': \S+ is no nn.Linear but Non"):
        start(folders["vit"], {"global": 1.0}, lora={"text": ["out_proj"]})
    start(folders["vit"], {"global": 1.0}, lora={"text": ["c_fc", "c_proj"], "image": ["c_fc"]})


def test_a_name_that_cannot_be_used_is_one_line(folders, tmp_path, monkeypatch):
    def refused(problem, name):
        with pytest.raises(UserError, match=rf"^student.source is '[^\n]*{problem}[^\n]*$"):
            start(name, {"global": 1.0})

    refused("did you mean 'ViT-B-32'", "open_clip:ViTB-32@x.pt")
    refused("is no file of weights: give open_clip:ViT-B-32@FILE", "open_clip:ViT-B-32")
    refused("'x.pt' is no file of weights", "open_clip:ViT-B-32@x.pt")
    refused("give open_clip:ViT-B-32-quickgelu@openai", "open_clip:ViT-B-32@openai")
    refused("no open_clip_config.json there", "local-dir:nowhere")
    (tmp_path / "empty").mkdir()
    refused("no open_clip_config.json there", f"local-dir:{tmp_path}/empty")
    folder = shutil.copytree(folders["vit"], tmp_path / "copy")
    (folder / "open_clip_model.safetensors").write_bytes(b"damaged")
    refused(f"{LOADS}: ", folder)
    (folder / "open_clip_model.safetensors").unlink()
    refused(f"{LOADS}: RuntimeError: Required pretrained weights", folder)
    (folder / "open_clip_config.json").write_text("{")
    refused("cannot be read", folder)
    monkeypatch.setitem(sys.modules, "open_clip", None)
    refused(r"a model of open_clip: pip install 'ds-cmli\[open_clip\]'", folders["vit"])
