"""`student.source`: the first step equals the source model, and what contradicts it is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from ds_cmli.common import UserError
from ds_cmli.config.source import applied
from ds_cmli.data.images import View
from ds_cmli.data.pairs import Collate, Sample
from ds_cmli.models.student import Student
from tests.models.dual_models import clip, settings, siglip, start

TEXTS = ["a red car", "zebra", "two dogs sitting under a tree " * 20]
PAIRS = {"clip": {"global": 1.0, "cmli": 1.0}, "siglip": {"global_sigmoid": 1.0, "cmli": 1.0}}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("dual")
    made = {"clip": clip(root / "clip"), "gelu": clip(root / "gelu", act="gelu"), "siglip": siglip(root / "siglip")}
    made["bilinear"] = siglip(root / "bilinear", resample=2)
    made["squashed"] = clip(root / "squashed", size={"height": 56, "width": 56}, do_center_crop=False)
    return made


@pytest.fixture(scope="session")
def pictures():
    noise = np.random.default_rng(0)
    sizes = ((80, 120), (57, 56), (200, 99), (56, 56), (31, 77))
    return [Image.fromarray(noise.integers(0, 256, (*size, 3), np.uint8)) for size in sizes]


@pytest.mark.parametrize("name", ["clip", "gelu", "siglip", "bilinear", "squashed"])
def test_the_first_step_equals_the_source(name, folders, pictures):
    kind = "siglip" if name in ("siglip", "bilinear") else "clip"
    objective, config, words = start(folders[name], PAIRS[kind])
    processor, theirs = AutoImageProcessor.from_pretrained(folders[name]), AutoModel.from_pretrained(folders[name])
    wanted = processor(images=pictures, return_tensors="pt")["pixel_values"]
    pixels = torch.stack([View.of(config.data)(picture) for picture in pictures])
    torch.testing.assert_close(objective.student.pixels(pixels, torch.float32), wanted, rtol=0, atol=1e-4)
    length = {"padding": "max_length", "truncation": True, "max_length": config.data.context_length}
    full = AutoTokenizer.from_pretrained(folders[name])(TEXTS, return_tensors="pt", **length)
    batch = Collate(words)([Sample(pixels[0], words(text), 0, 0) for text in TEXTS])
    assert torch.equal(batch.input_ids, full["input_ids"])
    attended = {"attention_mask": full["attention_mask"]} if kind == "clip" else {}
    with torch.no_grad():
        images = F.normalize(theirs.get_image_features(pixel_values=wanted).pooler_output)
        texts = F.normalize(theirs.get_text_features(input_ids=full["input_ids"], **attended).pooler_output)
        cls, patches = objective.student.image_embeddings(pixels)
        text_cls, tokens = objective.student.text_embeddings(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(cls, images, rtol=0, atol=1e-5)
    torch.testing.assert_close(text_cls, texts, rtol=0, atol=1e-5)
    assert patches.shape == (5, 16, cls.shape[1]) and tokens.shape[2] == cls.shape[1]
    [loss] = [loss for name, loss in objective.losses.items() if name.startswith("global")]
    assert objective.score_scales()["global"] == pytest.approx(theirs.logit_scale.exp().item())
    if kind == "siglip":
        assert objective.score_scales()["global"] > 100 and loss.temperature.logit_bias.item() == pytest.approx(-12.9)


def test_patches_and_tokens_start_in_the_joint_space(folders):
    """Through maps of their own: a text's last token is the text, a patch is a picture of it alone."""
    objective, _, words = start(folders["clip"], PAIRS["clip"])
    batch = Collate(words)([Sample(torch.zeros(3, 56, 56, dtype=torch.uint8), words(TEXTS[0]), 0, 0)])
    cls, tokens = objective.student.text_embeddings(batch.input_ids, batch.attention_mask)
    torch.testing.assert_close(tokens[0, batch.attention_mask.sum() - 1], cls[0])
    own = objective.student.image
    assert own.token_head.weight is not own.class_head.weight
    assert torch.equal(own.token_head.weight, own.class_head.weight)
    pooling = AutoModel.from_pretrained(folders["siglip"]).vision_model.head
    patches = torch.randn(3, 5, 32)
    alone = torch.stack([pooling(patches[:, n : n + 1]) for n in range(5)], 1)
    path = start(folders["siglip"], PAIRS["siglip"])[0].student.image.token_head
    torch.testing.assert_close(path(patches), alone)


@pytest.mark.parametrize(
    "section, key, value",
    [
        ("student", "layers", 1),
        ("student", "embed_dim", 16),
        ("student", "image_model", "vit_tiny_patch16_224"),
        ("student", "text_overrides", {"hidden_size": 8}),
        ("data", "image_size", 28),
        ("data", "interpolation", "bilinear"),
        ("data", "tokenizer", "demo"),
        ("data", "context_length", 78),
        ("loss", "init_temperature", 0.1),
    ],
)
def test_a_setting_that_contradicts_the_source_is_one_line(section, key, value, folders):
    given = {"student": {"source": str(folders["clip"])}}
    given.setdefault(section, {})[key] = value
    with pytest.raises(UserError, match=rf"^{section}\.{key} is [^\n]*student.source [^\n]*: leave it out$"):
        applied(given)


def test_shorter_texts_and_what_is_of_a_training_are_free(folders):
    given = {"student": {"source": str(folders["clip"]), "freeze_image": 2}, "data": {"context_length": 16}}
    out = applied(given)
    assert out["data"]["context_length"] == 16 and out["student"]["freeze_image"] == 2
    assert out["student"]["freeze_text"] == 0 and out["student"]["shared_blocks"] == 0  # whatever a preset has
    with pytest.raises(UserError, match=r"^data.context_length is 16"):  # SigLIP attends to its padding
        applied({**given, "student": {"source": str(folders["siglip"])}})
    with pytest.raises(UserError, match="source_config is filled"):
        applied({"student": {"source_config": {}}})


def test_shared_blocks_start_as_the_identity_where_widths_agree(folders, tmp_path):
    with pytest.raises(UserError, match="32 and 48 wide: give 0"):
        start(folders["clip"], PAIRS["clip"], shared_blocks=1)
    folder = clip(tmp_path / "even", text_width=32)
    image = torch.randint(0, 256, (2, 3, 56, 56), dtype=torch.uint8)
    plain, blocks = (start(folder, PAIRS["clip"], shared_blocks=n)[0].student for n in (0, 2))
    assert len(blocks.shared) == 2
    for x, y in zip(plain.image_embeddings(image), blocks.image_embeddings(image), strict=True):
        assert torch.equal(x, y)


def test_a_source_that_cannot_be_used_is_one_line(folders, tmp_path):
    def refused(problem, folder):
        with pytest.raises(UserError, match=rf"^student.source is '[^\n]*{problem}[^\n]*$"):
            start(folder, PAIRS["clip"])

    def copy(file="config.json", **values):
        shutil.rmtree(tmp_path / "copy", ignore_errors=True)
        path = shutil.copytree(folders["clip"], tmp_path / "copy") / file
        if values:
            path.write_text(json.dumps(json.loads(path.read_text()) | values))
        return path.parent

    processor = "preprocessor_config.json"
    refused("no such file or folder", tmp_path / "nowhere")
    refused("no config.json there", folders["clip"] / "config.json")
    refused("of the type 'bert'", copy(model_type="bert"))
    refused("its size is .*, which this package does not do", copy(processor, size={"shortest_edge": 64}))
    refused("its resample is 0", copy(processor, resample=0))
    refused("its do_normalize is False", copy(processor, do_normalize=False))
    (copy() / processor).unlink()
    refused("no preprocessor_config.json", tmp_path / "copy")
    (copy() / "config.json").write_text("{")
    refused("config.json cannot be read", tmp_path / "copy")
    (tmp_path / "copy" / "config.json").unlink()
    refused("no config.json", tmp_path / "copy")
    weights = load_file((folder := copy()) / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    refused("cannot be loaded: ValueError: 1 are missing, such as visual_projection.weight", folder)


def test_a_start_says_what_it_loads(folders, capsys):
    start(folders["siglip"], {"global_sigmoid": 1.0})
    assert f"starts from {folders['siglip']}: siglip, 2 + 2 layers, 56 px, temperature 0.0" in capsys.readouterr().out
    start(folders["clip"], PAIRS["clip"])
    assert f"starts from {folders['clip']}: clip, 2 + 2 layers, " in capsys.readouterr().out


def test_the_configuration_rebuilds_the_student_without_the_source(folders, tmp_path):
    folder = shutil.copytree(folders["siglip"], tmp_path / "gone")
    config = settings(folder, PAIRS["siglip"])
    shutil.rmtree(folder)
    again = type(config).from_dict(json.loads(json.dumps(config.to_dict())))
    student = Student(again.student, 56, 400, 64, pretrained=False)
    assert again == config and student.width == 32 and student.start is None
    with pytest.raises(UserError, match=r"its tokenizer has 10000 tokens, and its text encoder only \d+"):
        Student(again.student, 56, 10_000, 64, pretrained=False)
