import zlib

import pytest
import torch

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.images import View
from ds_cmli.data.sampler import Draw
from ds_cmli.data.scenes import NO_PICTURE, DemoPictures, Scenes
from ds_cmli.data.tokens import tokenizer_of
from ds_cmli.errors import UserError

pytestmark = pytest.mark.usefixtures("demo")
PLAIN = View(56)


@pytest.fixture(scope="module")
def pictures():
    return DemoPictures(56)


@pytest.fixture(scope="module")
def scenes(pictures):
    """A function that makes scenes of the pictures."""
    tokenizer = tokenizer_of(DataConfig(tokenizer="builtin", context_length=64))

    def make_scenes(split="train", seed=0, length=200, captions="names", view=PLAIN):
        return Scenes(split, seed, length, pictures, tokenizer, captions, view)

    return make_scenes


def test_a_scene_is_a_function_of_split_seed_and_index(scenes):
    scene = scenes()[5]
    again = scenes(length=6)[5]
    assert torch.equal(scene.image, again.image) and scene.tokens == again.tokens
    assert scene.tokens.text != scenes(seed=1)[5].tokens.text
    # Never others: results are compared by them.
    assert zlib.crc32(" ".join(scenes().caption(i)[0] for i in range(50)).encode()) == 1515582667


def test_each_quarter_shows_what_its_tokens_name(scenes, pictures):
    data = scenes()
    cell = pictures.cell
    for index in range(30):
        image = data[index].image
        tokens = data[index].tokens
        concepts = [concept for concept, _ in data.layout(index)]
        token_picture, cell_picture = data.places(index)
        for place, number in enumerate(cell_picture):
            top = place // 2 * cell
            left = place % 2 * cell
            quarter = image[:, top : top + cell, left : left + cell]
            shown = 255 if number == NO_PICTURE else torch.from_numpy(pictures.images[concepts[number]])
            assert (quarter == shown).all()
        assert len(token_picture) == len(tokens.spans)
        _, names = data.caption(index)
        for (_, end), number in zip(tokens.spans, token_picture, strict=True):
            first, stop = names[number]
            assert first < end <= stop
            assert tokens.text[first:stop] == pictures.names[concepts[number]]


def test_splits_have_no_scene_in_common(scenes, pictures):
    train, seen, unseen = (scenes(split, length=300) for split in ("train", "seen", "unseen"))
    held_out = set(pictures.held_out)
    train_layouts, seen_layouts = ({frozenset(data.layout(i)) for i in range(300)} for data in (train, seen))
    assert not train_layouts & seen_layouts
    for data, expected in ((train, False), (seen, False), (unseen, True)):
        assert all((concept in held_out) == expected for i in range(300) for concept, _ in data.layout(i))
    for data in (seen, unseen):
        assert len({frozenset(concept for concept, _ in data.layout(i)) for i in range(300)}) == 300


def test_sentences_have_words_without_a_place(scenes):
    data = scenes(captions="sentences")
    token_picture, _ = data.places(0)
    assert NO_PICTURE in token_picture and set(token_picture) != {NO_PICTURE}
    assert {len(data.layout(i)) for i in range(50)} == {3, 4}


def test_training_scenes_are_augmented(scenes):
    view = View.of(DataConfig(image_size=56, augmentation={"horizontal_flip": 1.0}), 0)
    plain = scenes()[3]
    flipped = scenes(view=view)[Draw(3, 2)]
    assert torch.equal(flipped.image, plain.image.flip(-1))


def test_crops_and_too_small_scenes_are_refused(scenes):
    view = View.of(DataConfig(augmentation={"random_resized_crop": 0.5}), 0)
    with pytest.raises(UserError, match="random_resized_crop"):
        scenes(view=view)
    with pytest.raises(UserError, match="image_size is 15"):
        DemoPictures(15)
