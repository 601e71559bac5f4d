import json
import random
from itertools import chain
from types import SimpleNamespace
from unittest import mock

import datasets
import numpy as np
import pytest

from ds_cmli.data.pairs import BadSamples, EvalPairs, Images
from ds_cmli.data.sampler import Draw
from ds_cmli.errors import UserError
from tests import make
from tests.data.batches import global_batches, run

WEIGHTS = {"short": 0.3, "long": 0.7}
REVERSED = {"long": 0.7, "short": 0.3}
STEPS = 10  # of about three epochs
SOURCES = {
    "folder": ["folder"],
    "tars": ["*.tar"],
    "coco": ["coco.json"],
    "parquet": ["parquet"],
    "columns": ["in_columns.jsonl"],
    "weighted": ["folder::0.5", "*.tar::0.3", "parquet::0.2"],
}
CASES = [(name, 0) for name in SOURCES] + [("tars", 3), ("weighted", 3)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder with a source of each kind, one with a broken image."""
    root = tmp_path_factory.mktemp("sources")
    make.pairs(root / "folder", 30, broken=[7])
    make.tar(root / "0.tar", 12)
    make.tar(root / "1.tar", 9, first=12)
    make.parquet(root / "parquet", 20)
    images = [{"id": i, "file_name": f"folder/{i}.png"} for i in range(20) if i != 7]
    texts = [{"image_id": image["id"], "caption": f"text {k} of {image['id']}"} for image in images for k in range(3)]
    make.json_file(root / "coco.json", {"images": images, "annotations": texts})
    in_columns(root, "in_columns.jsonl")
    return root


def in_columns(folder, name):
    """Write pictures with captions in two columns; the first lacks a short one, and the second a long one."""
    form = name.rpartition(".")[-1]
    rows = [{"short": f"short {n}", "long": f"long {n}"} for n in range(20)]
    rows[0]["short"] = ""
    rows[1]["long"] = None
    if form == "tar":
        members = [((f"{n:02}.png", make.png(n)), (f"{n:02}.json", json.dumps(rows[n]).encode())) for n in range(20)]
        make.shard(folder / name, chain(*members))
        return
    make.pictures(folder, *(f"{n}.png" for n in range(20)))
    images = [make.png(n) if form == "parquet" else f"{n}.png" for n in range(20)]
    table = datasets.Dataset.from_list(rows).add_column("image", images)
    write = {"csv": table.to_csv, "jsonl": table.to_json, "parquet": table.to_parquet}[form]
    write(folder / name)


def data(folders, sources, **settings):
    names = [str(folders / source) for source in sources]
    augmentation = {"random_resized_crop": 0.5, "color_jitter": 0.4, "horizontal_flip": 0.5}
    settings = {"augmentation": augmentation, "held_out": 2, "max_bad_share": 1, **settings}
    return make.data(names, seed=5, **settings)


@pytest.mark.parametrize(("name", "window"), CASES)
def test_samples_captions_and_pixels_resume_on_any_ranks_and_workers(folders, name, window):
    sources = SOURCES[name]
    weights = WEIGHTS if name == "columns" else None
    chance = random.Random(str(sources))
    opened = data(folders, sources, shuffle_window=window, caption_weights=weights)
    whole, _ = run(opened, 1, 0, None, STEPS)
    for before, after in (((1, 2), (8, 0)), ((4, 0), (2, 2))):  # ranks and workers
        stop = chance.randint(1, STEPS - 1)
        first, state = run(opened, *before, None, stop)
        second, _ = run(opened, *after, state, STEPS - stop)
        assert global_batches(first + second) == global_batches(whole), (before, stop, after)
        if not window:  # the ranks of the windowed order take turns in a batch
            assert first + second == whole


@pytest.mark.parametrize("form", ["csv", "jsonl", "parquet", "tar"])
def test_captions_are_drawn_by_the_weights_of_their_columns(tmp_path, form):
    in_columns(tmp_path, f"0.{form}")
    source = {"sources": [f"0.{form}"], "val_source": str(tmp_path / f"0.{form}"), "augmentation": {}}
    opened = data(tmp_path, **source, caption_weights=WEIGHTS)
    long_alone = data(tmp_path, **source, caption_weights=REVERSED, caption_key="long")
    drawn = [[opened.train[Draw(n, turn)].tokens.text for turn in range(50)] for n in range(20)]
    assert set(drawn[0]) == {"long 0"} and set(drawn[1]) == {"short 1"}
    num_long = sum(text == f"long {n}" for n in range(2, 20) for text in drawn[n])
    assert abs(num_long - 0.7 * 900) < 4 * (900 * 0.7 * 0.3) ** 0.5  # four standard deviations
    assert [long_alone.train[Draw(n, 7)].tokens.text for n in range(20)] == [texts[7] for texts in drawn]
    assert len(opened.evals["val"].rows) == 38
    assert [text for _, text in long_alone.evals["val"].rows] == [f"long {n}" for n in range(20) if n != 1]


def test_announced_images_reach_the_sources_that_fetch_them_by_their_numbers_there():
    def fetching(announced):
        return SimpleNamespace(prefetch=lambda indices: announced.extend(indices.tolist()))

    whole, part = [], []
    shares = {"whole": (fetching(whole), range(10)), "local": (object(), range(4))}
    shares["part"] = fetching(part), np.array([2, 5, 7])
    Images(shares).prefetch(np.array([1, 15, 12, 9, 16]))
    assert (whole, part) == ([1, 9], [5, 7])


def test_an_image_without_a_caption_of_words_has_an_error_that_says_so():
    images = Images({"list": (SimpleNamespace(captions=lambda index: ["", None, " \t", ("long", "")]), range(1))})
    with pytest.raises(ValueError, match="empty caption"):
        images.captions(0)


def test_a_storage_that_is_lost_while_captions_are_read_is_the_mistake(tmp_path):
    images = make.data(make.pairs(tmp_path)).train.images
    with mock.patch.object(Images, "captions", side_effect=UserError("the bucket does not answer")):
        assert make.refused(EvalPairs, images, make.config().data) == "the bucket does not answer"


def test_tokens_are_those_of_the_caption_without_special_ones_and_padding(tmp_path):
    captions = ["one", "two words", "a much longer caption " * 3, "end"]
    source = make.captioned(tmp_path, [[text] for text in captions])
    loaded = make.data(source, val_source=source)
    batch = make.batches(loaded, 4, 1)[0]  # all samples, in their order
    positions = range(batch.input_ids.shape[1])
    for row, text in enumerate(captions):
        ids = loaded.tokenizer(text).input_ids
        assert batch.attention_mask[row].tolist() == [n < len(ids) for n in positions]
        assert batch.token_mask[row].tolist() == [0 < n < len(ids) - 1 for n in positions]  # no class or end token
        assert batch.input_ids[row, : len(ids)].tolist() == ids
    assert len(positions) <= 32 and batch.index.tolist() == [0, 1, 2, 3]


def test_equal_pictures_and_equal_captions_are_told_by_their_ids(tmp_path):
    source = make.captioned(tmp_path, [["same", "other"], ["same"], ["third"], ["fourth"]])
    loaded = make.data(source, val_source=source)
    assert len(loaded.train) == 4  # a picture a sample, with one of its captions at a turn
    ids = loaded.collate([loaded.train[n] for n in range(4)]).pair_id
    assert len({*ids[:, 0].tolist()}) == 4
    drawn = [loaded.collate([loaded.train[Draw(0, turn)], loaded.train[1]]).pair_id for turn in range(16)]
    captions_are_equal = {(pair_ids[0, 1] == pair_ids[1, 1]).item() for pair_ids in drawn}
    assert captions_are_equal == {True, False} and len({pair_ids[0, 0].item() for pair_ids in drawn}) == 1


def test_too_many_bad_samples_end_training_and_the_first_five_are_named():
    bad = BadSamples(0.1, 100)
    one_rank = SimpleNamespace(group=None)
    bad.add([(f"{i}.png", "broken") for i in range(7)])
    bad.check(one_rank, 20)  # of the data set, not of 20
    assert bad.check(one_rank) == [
        "7 bad samples were replaced; the first: " + ", ".join(f"{i}.png (broken)" for i in range(5))
    ]
    bad.add([("7.png", "broken")] * 4)
    bad.check(one_rank, 200)
    with pytest.raises(UserError, match=r"11 samples of 100.*max_bad_share = 0.1.*0\.png.*4\.png \(broken\)$"):
        bad.check(one_rank, 100)
