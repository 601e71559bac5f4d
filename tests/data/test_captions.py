"""Several captions of a picture: which are drawn, of which texts, and how they lie in a batch."""

import random
from itertools import permutations

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import Config, DataConfig
from ds_cmli.data.captions import drawn, sentences
from ds_cmli.data.load import build_data
from ds_cmli.data.sampler import Draw
from ds_cmli.memory.inputs import longest_batch
from tests.data.sources.samples import rows, user_error, write

TEXTS = ["red apple", "green pear", "blue car. It drives! Fast?"]


def several(folder, captions, texts=TEXTS, **settings):
    write(folder / "train", [row for text in texts for row in rows(6, text)])
    write(folder / "val", rows(2))
    settings = {"image_size": 8, "tokenizer": "builtin", "captions": captions, **settings}
    return build_data(DataConfig(source=str(folder), **settings), 0)


def said(data, draw):
    sample = data.train[draw]
    return [caption.tokens.text for caption in (sample, *sample.others)]


def test_texts_are_drawn_without_repetition_and_then_repeated():
    for case in range(200):
        draw = random.Random(case)
        count, wanted, index = draw.randint(1, 9), draw.randint(1, 12), draw.randrange(1000)
        numbers = drawn(count, wanted, case, 3, index)
        assert numbers == drawn(count, wanted, case, 3, index) and len(numbers) == wanted
        first = numbers[:count]
        assert len(set(first)) == len(first) and numbers == [first[k % len(first)] for k in range(wanted)]
        assert numbers[:1] == drawn(count, 1, case, 3, index)
    pairs = [tuple(drawn(3, 2, 0, turn, 5)) for turn in range(3000)]
    assert {*pairs} == {*permutations(range(3), 2)} and min(map(pairs.count, {*pairs})) > 400  # of 500


@pytest.mark.parametrize(
    "captions, expected",
    [
        (["A dog."], ["A dog."]),
        (["A dog runs. It barks!  Why?\nNobody knows"], ["A dog runs.", "It barks!", "Why?", "Nobody knows"]),
        (["One. Two.", "three"], ["One.", "Two.", "three"]),
        (["3.5 m wide... or 4.2 m."], ["3.5 m wide...", "or 4.2 m."]),
        (["狗在跑。它在叫！"], ["狗在跑。", "它在叫！"]),
        (["  . "], ["."]),
    ],
)
def test_sentences_by_hand(captions, expected):
    assert sentences(captions) == expected


def test_a_batch_has_the_texts_image_by_image(tmp_path):
    data = several(tmp_path, 2)
    samples = [data.train[Draw(k, 1)] for k in range(3)]
    batch = data.collate(samples)
    texts = [text for k in range(3) for text in said(data, Draw(k, 1))]
    ids = [data.tokenizer(text).input_ids for text in texts]
    assert [row[: len(own)].tolist() for row, own in zip(batch.input_ids, ids, strict=True)] == ids
    assert batch.pair_id.shape == (3, 3) and batch.token_mask.shape == batch.token_picture.shape == (6, 16)
    assert batch.pair_id[:, 0].tolist() == [sample.image_id for sample in samples]
    equal = [[texts[i] == texts[j] for j in range(6)] for i in range(6)]
    captions = batch.pair_id[:, 1:].flatten()
    assert (captions[:, None] == captions).tolist() == equal


def test_all_captions_of_a_picture_or_all_their_sentences_come(tmp_path):
    whole = several(tmp_path / "whole", 3)
    assert all(sorted(said(whole, Draw(k, 4))) == sorted(TEXTS) for k in range(6))
    split = several(tmp_path / "split", 5, split_sentences=True)
    parts = ["red apple", "green pear", "blue car.", "It drives!", "Fast?"]
    assert all(sorted(said(split, Draw(k, 4))) == sorted(parts) for k in range(6))
    assert len(split.evals["val"]) == 2 and not split.evals["val"][0].others  # evaluation takes captions as they are


def test_too_few_captions_are_repeated_and_told_or_refused(tmp_path):
    mixed = several(tmp_path / "mixed", 4)
    assert mixed.notices == [
        f"6 of 6 pictures of {tmp_path}/mixed/train/metadata.jsonl that were looked at have fewer captions than "
        "data.captions = 4: theirs are repeated"
    ]
    texts = said(mixed, Draw(0, 0))
    assert sorted(texts[:3]) == sorted(TEXTS) and texts[3] == texts[0]
    with pytest.raises(UserError, match=r"data.captions is 2: no picture has more than one caption: give 1, or data"):
        several(tmp_path / "single", 2, TEXTS[:1])
    with pytest.raises(UserError, match=r"data.captions is 2: no picture has more than one sentence"):
        several(tmp_path / "sentences", 2, TEXTS[:1], split_sentences=True)


def test_others_stand_in_for_a_caption_without_a_token(tmp_path):
    data = several(tmp_path, 3, [*TEXTS[:2], "\u200b"])
    texts = said(data, Draw(0, 0))
    assert sorted(texts[:2]) == sorted(TEXTS[:2]) and texts[2] == texts[0] and data.train[0].bad is None


def test_a_scenes_captions_are_orders_of_its_pictures_or_its_pictures(tmp_path):
    config = {"image_size": 56, "tokenizer": "builtin", "context_length": 32}
    one = build_data(DataConfig(**config), 0)
    data = build_data(DataConfig(**config, captions=3), 0)
    for k in range(20):
        pictures, texts = len(data.train.layout(k)), said(data, Draw(k, 2))
        assert len({*texts}) == min(3, {1: 1, 2: 2, 3: 6, 4: 24}[pictures])
        words = sorted(one.train[k].tokens.text.split())
        assert all(sorted(text.split()) == words for text in texts)
    for scenes in ("names", "sentences"):
        data = build_data(DataConfig(**config, scenes=scenes, captions=4, split_sentences=True), 0)
        for k in range(20):
            sample, layout = data.train[Draw(k, 2)], data.train.layout(k)
            of_pictures = []
            for caption in (sample, *sample.others):
                (picture,) = {*caption.token_picture} - {-1}
                assert caption.tokens.text.endswith(data.train.pictures.names[layout[picture][0]])
                of_pictures.append(picture)
            assert sorted(of_pictures[: len(layout)]) == list(range(len(layout)))
    assert {name: len(pairs) for name, pairs in data.evals.items()} == {"seen": 300, "unseen": 300}
    assert not data.evals["seen"][0].others


def test_a_batch_of_a_prediction_has_as_many_texts():
    config = Config(data=DataConfig(captions=3))
    batch = longest_batch(config, 4)
    assert batch.input_ids.shape == batch.token_mask.shape == (12, 64) and batch.pair_id.shape == (4, 4)
    assert len(batch.pair_id.unique()) == 16 and len(batch.index) == 4 and batch.image.shape[0] == 4


@pytest.mark.parametrize(
    "sections, line",
    [
        ({"data": {"captions": 0}}, "data.captions is 0"),
        ({"data": {"captions": -1}}, "data.captions is -1"),
        ({"data": {"captions": 257}}, "data.captions is 257"),
        ({"data": {"captions": True}}, "data.captions is True"),
        ({"data": {"split_sentences": "yes"}}, "data.split_sentences is 'yes'"),
        ({"loss": {"captions": "some"}}, "loss.captions is 'some'"),
        ({"loss": {"captions": "each"}}, "loss.captions is 'each': data.captions is 1"),
        (
            {"data": {"captions": 2}, "loss": {"captions": "each", "weights": {"cmli_sigmoid": 1.0}}},
            "loss.captions is 'each': the losses are cmli_sigmoid, none of them contrastive",
        ),
    ],
)
def test_mistakes(sections, line):
    assert user_error(Config.from_dict, sections).startswith(line)
