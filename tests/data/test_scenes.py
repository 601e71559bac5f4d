import hashlib
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tokenizers import normalizers, pre_tokenizers

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.demo_pictures import DemoPictures
from ds_cmli.data.load import build_data
from ds_cmli.data.loaders import train_loader
from ds_cmli.data.sampler import GlobalBatchSampler
from ds_cmli.data.scenes import EVAL_SCENES, TRAIN_SCENES
from ds_cmli.data.tokens import WORDS

pytestmark = pytest.mark.usefixtures("demo")
CONFIG = DataConfig(image_size=56, tokenizer="builtin", context_length=32)


@pytest.fixture(scope="module")
def data(demo):
    return build_data(CONFIG, seed=0)


def fingerprint(dataset, indices):
    digest = hashlib.sha256()
    for index in indices:
        sample = dataset[index]
        digest.update(sample.image.numpy().tobytes())
        digest.update(repr((sample.tokens, sample.token_picture, sample.cell_picture)).encode())
    return digest.hexdigest()


def test_sizes(data):
    pictures = data.train.pictures
    assert len(pictures.names) == len(set(pictures.names)) == 1873
    assert len(pictures.training) == 1593
    assert len(pictures.held_out) == 280
    assert not set(pictures.training) & set(pictures.held_out)
    assert len(data.train) == TRAIN_SCENES == 20_000
    assert {name: len(d) for name, d in data.evals.items()} == {"seen": EVAL_SCENES, "unseen": EVAL_SCENES}


def test_skin_tones_and_equal_drawings_are_left_out(data):
    names = data.train.pictures.names
    assert {"grinning face", "chequered flag", "flag: Brazil"} <= set(names)
    assert not [name for name in names if "skin tone" in name]
    images = {image.tobytes() for image in data.train.pictures.images}
    assert len(images) == len(names)


def test_builtin_words_are_those_of_the_names(data):
    normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    names = " ".join(data.train.pictures.names)
    words = {word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(names))}
    listed = WORDS.read_text(encoding="utf-8").split()
    assert listed == sorted(word for word in words if not (len(word) == 1 and word.isascii()))


def test_a_scene_is_a_pure_function_of_seed_and_index(data):
    script = f"""
import sys; sys.path.insert(0, {str(__import__("pathlib").Path(__file__).parent)!r})
from test_scenes import CONFIG, build_data, fingerprint
data = build_data(CONFIG, seed=0)
print(fingerprint(data.train, [5, 3, 19999]), fingerprint(data.evals["seen"], [7, 299]))
"""
    data.train[1]  # what was asked for before must not matter
    own = [fingerprint(data.train, [5, 3, 19999]), fingerprint(data.evals["seen"], [7, 299])]
    other = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert other.stdout.split()[-2:] == own


def test_the_seed_changes_training_scenes_and_not_validation_scenes(data):
    other = build_data(CONFIG, seed=1)
    assert fingerprint(other.train, range(20)) != fingerprint(data.train, range(20))
    for split in ("seen", "unseen"):
        assert fingerprint(other.evals[split], range(20)) == fingerprint(data.evals[split], range(20))


def test_validation_scenes_are_new_and_differ_from_each_other(data):
    trained = {frozenset(data.train.layout(i)) for i in range(TRAIN_SCENES)}
    training, held_out = set(data.train.concepts), set(data.train.pictures.held_out)
    for split, allowed in (("seen", training), ("unseen", held_out)):
        layouts = [data.evals[split].layout(i) for i in range(EVAL_SCENES)]
        assert not [layout for layout in layouts if frozenset(layout) in trained]
        concepts = [frozenset(concept for concept, _ in layout) for layout in layouts]
        assert len(set(concepts)) == EVAL_SCENES
        assert set().union(*concepts) <= allowed
    assert {len(data.train.layout(i)) for i in range(100)} == {1, 2, 3, 4}


def test_each_token_belongs_to_the_picture_that_it_names(data):
    squeeze = re.compile(r"\s")
    for index in range(300):
        sample, layout = data.train[index], data.train.layout(index)
        assert sample.token_picture[0] == sample.token_picture[-1] == -1
        for picture, (concept, _) in enumerate(layout):
            mine = [
                token
                for token, owner in zip(sample.tokens.input_ids, sample.token_picture, strict=True)
                if owner == picture
            ]
            name = normalizers.BertNormalizer(lowercase=True).normalize_str(data.train.pictures.names[concept])
            assert squeeze.sub("", data.tokenizer.decode(mine)) == squeeze.sub("", name)
        owners = [o for o, valid in zip(sample.token_picture, sample.tokens.valid, strict=True) if valid]
        assert -1 not in owners  # no token without a place


def test_sentences_have_words_without_a_place_and_three_or_four_pictures(data):
    sentences = build_data(replace(CONFIG, scenes="sentences", context_length=64), seed=0)
    counts, captions = set(), set()
    for dataset in (sentences.train, *sentences.evals.values()):
        for index in range(100):
            layout, (caption, spans) = dataset.layout(index), dataset.caption(index)
            names = [dataset.pictures.names[concept] for concept, _ in layout]
            assert [caption[first:last] for first, last in spans] == names
            counts.add(len(layout))
            captions.add(caption)
            sample = dataset.pair(index)
            ends = zip(sample.tokens.ends, sample.tokens.valid, sample.token_picture, strict=True)
            for end, valid, owner in ends:
                inside = [number for number, (first, last) in enumerate(spans) if first < end <= last]
                assert owner == (inside[0] if inside and valid else -1)
            assert sum(sample.tokens.valid) > sum(owner >= 0 for owner in sample.token_picture)
    assert counts == {3, 4}
    assert {caption.split()[0] for caption in captions} == {"a", "this", "there", "here"}
    assert data.evals["seen"].layout(0) == build_data(CONFIG, seed=5).evals["seen"].layout(0)
    again = build_data(replace(CONFIG, scenes="sentences", context_length=64), seed=0).train
    assert again.caption(7) == sentences.train.caption(7)


def test_each_picture_lies_in_its_own_quarter(data):
    cells = 0
    for index in range(100):
        sample = data.train[index]
        quarters = sample.image.unfold(1, 28, 28).unfold(2, 28, 28)  # [3, 2, 2, 28, 28]
        for cell, picture in enumerate(sample.cell_picture):
            quarter = quarters[:, cell // 2, cell % 2]
            if picture == -1:
                assert (quarter == 255).all()
            else:
                concept, place = data.train.layout(index)[picture]
                assert place == cell
                assert torch.equal(quarter, torch.from_numpy(data.train.pictures.images[concept]))
                cells += 1
    assert cells == sum(len(data.train.layout(i)) for i in range(100))


def test_chance_of_pointing_is_one_in_four(data):
    batch = data.collate([data.evals["seen"][i] for i in range(EVAL_SCENES)])
    places = batch.cell_picture.repeat_interleave(2, 1).repeat_interleave(2, 2).flatten(1)  # [B, N=16] of 14 px patches
    own = places[:, None, :] == batch.token_picture[:, :, None]  # [B, M, N]
    assert own[batch.token_picture >= 0].float().mean().item() == 0.25


@pytest.mark.parametrize("image_size", [56, 57])
def test_any_image_size_fills_the_image(image_size):
    data = build_data(DataConfig(image_size=image_size, tokenizer="builtin"), 0)
    assert data.train[0].image.shape == (3, image_size, image_size)


def test_too_small_an_image_is_refused():
    with pytest.raises(UserError, match=r"data.image_size is 15: scenes need at least 16 pixels"):
        DemoPictures(15)


def batches(loader, sampler, count):
    out = []
    for batch in loader:
        sampler.advance()
        out.append((batch.image, batch.input_ids, batch.index))
        if len(out) == count:
            return out


def test_loading_processes_change_nothing(data):
    results = []
    for workers in (0, 2):
        global_state = torch.get_rng_state()
        sampler = GlobalBatchSampler(len(data.train), 4, 0, 1, seed=0)
        results.append(batches(train_loader(data, sampler, workers), sampler, 5))
        assert sampler.position == 20
        assert torch.equal(torch.get_rng_state(), global_state)
    for one, two in zip(*results, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_restarted_loader_goes_on_where_the_trainer_was(data):
    sampler = GlobalBatchSampler(len(data.train), 4, 0, 1, seed=0)
    loader = train_loader(data, sampler, workers=1)  # prefetches two batches that are thrown away
    first = batches(loader, sampler, 2)
    second = batches(loader, sampler, 2)
    fresh = GlobalBatchSampler(len(data.train), 4, 0, 1, seed=0)
    whole = batches(train_loader(data, fresh, workers=0), fresh, 4)
    assert [b[2].tolist() for b in first + second] == [b[2].tolist() for b in whole]
