"""Embeddings and scores are those of the student itself, whatever the pictures come as."""

import pytest
import torch
from PIL import Image

from ds_cmli.cmli.normalize import l2_normalize
from ds_cmli.inference import Model
from tests import make
from tests.make import refused, write_run
from tests.models.sources import clip

TEXTS = ["a red car", "two dogs under a tree", "x"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Model.load(write_run(tmp_path_factory.mktemp("run")), "cpu", batch_size=5)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make.pictures(tmp_path_factory.mktemp("pictures"), *(f"{i % 2}/{i:02}.png" for i in range(12)), side=80)


def test_embeddings_are_the_students_features(model, pictures):
    images = model.embed_images(pictures)
    assert len(images.names) == 12
    assert images.names[0].endswith("0/00.png") and images.names[6].endswith("1/01.png")
    file = sorted(pictures.rglob("*.png"))[7]
    with torch.no_grad():
        cls, patches = model.evaluator.student.encode_image(model.read(file)[None])
        patches = model.evaluator.student.projection(patches)
    torch.testing.assert_close(images.cls[7], l2_normalize(cls)[0])
    torch.testing.assert_close(images.patches[7], l2_normalize(patches)[0])
    assert images.patches.shape == (12, model.grid[0] * model.grid[1], 16)


def test_scores_are_the_definitions(model, pictures, monkeypatch):
    monkeypatch.setattr("ds_cmli.inference.MAX_SCORED", 5)  # so that there are three parts
    images = model.embed_images(pictures)
    texts = model.embed_texts(TEXTS)
    scores = model.scores(images, texts)
    for i in (0, 11):
        for j in range(3):
            similarity = images.patches[i] @ texts.tokens[j][texts.token_mask[j]].t()  # [N, M]
            for side, expected in enumerate((similarity.amax(1).mean(), similarity.amax(0).mean())):
                result = scores["cmli"][side][i, j]
                torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)
                cosine = scores["global"][side][i, j]
                torch.testing.assert_close(cosine, images.cls[i] @ texts.cls[j])


def test_it_scores_on_its_device(model, pictures, monkeypatch):
    images = model.embed_images(pictures)
    texts = model.embed_texts(TEXTS)
    monkeypatch.setattr(model.evaluator, "device", torch.device("meta"))
    with pytest.raises(NotImplementedError, match="meta"):  # from which nothing comes back
        model.scores(images, texts)


def test_a_plain_clip_and_a_distillation_combine_no_scores(pictures, tmp_path):
    model = Model.load(clip(tmp_path / "clip"), "cpu")
    scores = model.scores(model.embed_images(pictures), model.embed_texts(TEXTS))
    assert list(scores) == ["global", "cmli"] and scores["cmli"].i2t.shape == (12, 3)
    assert len(model.match(sorted(pictures.rglob("*.png"))[0], "a red car").words) == 3
    model = Model.load(write_run(tmp_path / "run", ("cls_kd",)), "cpu")
    assert list(model.scores(model.embed_images(pictures), model.embed_texts(TEXTS))) == ["global"]


def test_pictures_may_come_as_files_and_in_memory(model, pictures):
    file = sorted(pictures.rglob("*.png"))[0]
    result = model.embed_images([file, str(file), Image.open(file), model.read(file)])
    for patches in result.patches[1:]:
        torch.testing.assert_close(patches, result.patches[0])
    assert result.names == [str(file), str(file), "2", "3"]


def test_a_match_names_the_words_and_where_they_stand(model, pictures):
    text = "two  dogs, sitting"
    match = model.match(sorted(pictures.rglob("*.png"))[0], text)
    assert "".join(match.words) == "twodogs,sitting"  # words that the vocabulary lacks fall into characters
    assert [text[start:end] for start, end in match.spans] == match.words
    assert match.similarity.shape == (len(match.words), match.grid[0] * match.grid[1])


def test_loading_prints_nothing_and_a_model_prints_as_one_line(model, tmp_path, capfd):
    loaded = Model.load(clip(tmp_path / "clip"), "cpu")
    assert capfd.readouterr().out == ""
    assert repr(loaded) == "Model(clip_vision_model and clip_text_model, 4 x 4 patches of 56 px, on cpu)"
    assert "\n" not in repr(model) and len(repr(model)) < 120


def test_mistakes_are_one_line(model, tmp_path):
    assert refused(model.embed_texts, []) == "no text is given: give at least one"
    assert refused(model.embed_images, "nothere") == "the pictures 'nothere': no such file or folder"
    missing = refused(model.embed_images, ["no/such.png"])
    assert "the picture no/such.png cannot be read: no such file" in missing
    assert "no picture is given" in refused(model.embed_images, tmp_path)
    assert "no Unicode" in refused(model.embed_texts, ["\udc00"])
