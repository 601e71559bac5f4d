"""Sources at other sizes of pictures and lengths of texts: their positions are resampled as their libraries do it."""

import open_clip
import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from transformers import AutoModel

from ds_cmli.engine.build import starting_line
from ds_cmli.errors import UserError
from ds_cmli.models.dual import stretched
from tests.models.sources import LARGER, export, run_of, start

SIDES = {"convnext": 64, "siglip": 160, "token": 160}  # of their own pictures; of the others 56
PATCHES = {"convnext": 32, "siglip": 16, "token": 16}  # of the others 14
SLOW_KINDS = ("clipa", "coca", "convnext", "token")
TEXTS = ["A Red  apple, isn't it?", "two dogs", "long " * 160]


def resized_by_the_library(folder, image_size: int):
    """A function from normalised pixels to the features of the library's own model at this size."""
    if (folder / "open_clip_config.json").is_file():
        name = f"local-dir:{folder}"
        return open_clip.create_model(name, force_image_size=image_size).eval().encode_image
    model = AutoModel.from_pretrained(folder)
    return lambda pixels: model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output


@torch.no_grad()
@pytest.mark.parametrize("larger", [True, False])
@pytest.mark.parametrize(
    "kind", ["CLIP", "SigLIP", "vit", "siglip", *(pytest.param(x, marks=pytest.mark.slow) for x in SLOW_KINDS)]
)
def test_pictures_of_another_size_have_the_features_of_the_librarys_own_resize(kind, larger, folders):
    patch = PATCHES.get(kind, 14)
    patches = SIDES.get(kind, 56) // patch
    patches += patches // 2 if larger else -1
    side = patches * patch
    student = start(folders(kind), data={"image_size": side})[0].student
    images = torch.randint(0, 256, (3, 3, side, side), dtype=torch.uint8)
    wanted = resized_by_the_library(folders(kind), side)(student.normalize_pixels(images, torch.float32))
    cls, features = student.image_embeddings(images)
    assert_close(cls, F.normalize(wanted), rtol=0, atol=1e-6)
    assert student.grid == (patches, patches) and features.shape[1] == patches**2


@torch.no_grad()
def test_longer_texts_of_open_clip_have_the_features_of_its_own_resize(folders):
    objective, _, words = start(folders("vit"), data={"context_length": 154})
    model = open_clip.create_model(f"local-dir:{folders('vit')}", force_context_length=154).eval()
    ids = torch.zeros(3, 154, dtype=torch.int64)
    for row, text in enumerate(TEXTS):
        tokens = words(text).input_ids
        ids[row, : len(tokens)] = torch.tensor(tokens)
    cls, _ = objective.student.text_embeddings(ids, ids != 0)
    assert_close(cls, F.normalize(model.encode_text(ids)), rtol=0, atol=1e-6)
    assert (ids[2] != 0).all()  # a text of full length


@torch.no_grad()
def test_short_texts_of_clip_keep_their_features_when_its_positions_are_stretched(folders):
    unchanged, _, words = start(folders("CLIP"))
    longer, _, _ = start(folders("CLIP"), data={"context_length": 154})
    ids = torch.tensor([words("a red car and a dog").input_ids])
    features, longer_features = (x.student.text_embeddings(ids, ids >= 0) for x in (unchanged, longer))
    assert_close(longer_features, features, rtol=0, atol=1e-6)


def test_positions_are_stretched_as_long_clip_does_it():
    """77 to 248, position by position: after the first 20, three new ones between each two."""
    table = torch.randn(77, 3)
    result = stretched(table, 248)
    assert torch.equal(result[:20], table[:20])
    for place in range(20, 76):
        for quarter in range(4):
            between = table[place] * (4 - quarter) / 4 + table[place + 1] * quarter / 4
            assert_close(result[20 + 4 * (place - 20) + quarter], between)
    for quarter in range(4):
        assert_close(result[244 + quarter], table[76] + (table[76] - table[75]) * quarter / 4)


# The settings of `data`, and the end of the line that says what a training starts from.
STARTS = {
    "CLIP": (LARGER, "pictures 4 x 4 -> 6 x 6 patches (bicubic), texts 77 -> 154 (the first 20 are kept)"),
    "SigLIP": ({"image_size": 84}, "temperature 0.009; positions: pictures 4 x 4 -> 6 x 6 patches (bicubic)"),
    "vit": (LARGER, "; positions: pictures 4 x 4 -> 6 x 6 patches (bicubic), texts 77 -> 154 (linear)"),
    # The table of its texts has 90 places.
    "roberta": ({"image_size": 28, "context_length": 80}, "; positions: pictures 4 x 4 -> 2 x 2 patches (bicubic)"),
}


@pytest.mark.parametrize("kind", STARTS)
def test_a_start_says_what_it_loads_and_which_positions_are_resampled(kind, folders):
    data, end = STARTS[kind]
    objective, config, _ = start(folders(kind), data=data)
    line = starting_line(config.student, objective, config.data.image_size)
    assert f", 2 + 2 layers, {data['image_size']} px" in line and line.endswith(end)


def test_the_export_of_a_timm_tower_that_open_clip_cannot_build_is_one_line(folders, tmp_path):
    run = run_of(folders("siglip"), tmp_path / "run", data={"image_size": 240})
    with pytest.raises(UserError, match=r"^--as open_clip: 'visual.trunk.pos_embed' is \[1, 226, 96\] [^\n]* 240 px"):
        export(run, tmp_path / "back", "--as", "open_clip")
    assert not (tmp_path / "back").exists()


def test_sizes_that_a_source_cannot_have_are_one_line(folders):
    def refused(line, kind, **data):
        with pytest.raises(UserError, match=f"^{line}[^\n]*$"):
            start(folders(kind), data=data)

    for kind in ("CLIP", "vit"):
        refused("data.image_size is 60: no multiple of the 14 pixels of a patch", kind, image_size=60)
    for kind in ("SigLIP", "siglip"):
        refused("data.context_length is 128: student.source .* has 64: leave it out", kind, context_length=128)
    refused("data.image_size is 0: ", "CLIP", image_size=0)
    refused("data.image_size is '84': ", "CLIP", image_size="84")
    refused("student.source .* data.context_length is 90, and it has only 89", "roberta", context_length=90)
    refused("student.source .*open_clip cannot load it: .*positional_embedding", "resnet", image_size=96)


def test_a_text_tower_of_another_kind_is_one_line(folders, monkeypatch):
    """The tower that open_clip 4 builds for `text_arch` "modern" has no `_embeds` either."""
    monkeypatch.delattr(open_clip.transformer.TextTransformer, "_embeds")
    with pytest.raises(UserError, match=r"^student.source .*its text tower, TextTransformer, gives no features"):
        start(folders("vit"))
