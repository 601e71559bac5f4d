"""Which caption of a picture is drawn, and its sentences."""

import pytest

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.captions import drawn, sentences
from ds_cmli.data.load import build_data
from ds_cmli.data.sampler import Draw
from tests.data.sources.samples import rows, write

TEXTS = ["red apple", "green pear", "blue car. It drives! Fast?"]


def test_each_caption_comes_as_often_at_random_turns():
    numbers = [drawn(3, 0, turn, 5) for turn in range(3000)]
    assert {*numbers} == {0, 1, 2} and min(map(numbers.count, range(3))) > 900
    assert numbers == [drawn(3, 0, turn, 5) for turn in range(3000)]


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


def test_a_sentence_of_any_caption_is_drawn(tmp_path):
    write(tmp_path / "train", [row for text in TEXTS for row in rows(6, text)])
    write(tmp_path / "val", rows(2))
    config = DataConfig(source=str(tmp_path), image_size=8, tokenizer="builtin", split_sentences=True)
    data = build_data(config, 0)
    said = {data.train[Draw(k, turn)].tokens.text for k in range(6) for turn in range(40)}
    assert said == {"red apple", "green pear", "blue car.", "It drives!", "Fast?"}
    assert len(data.evals["val"]) == 2  # evaluation takes captions as they are


@pytest.mark.parametrize("scenes", ["names", "sentences"])
def test_a_scene_s_sentence_is_of_one_picture(scenes):
    config = {"image_size": 56, "tokenizer": "builtin", "context_length": 32}
    data = build_data(DataConfig(**config, scenes=scenes, split_sentences=True), 0)
    for k in range(20):
        sample, layout = data.train[Draw(k, 2)], data.train.layout(k)
        (picture,) = {*sample.token_picture} - {-1}
        assert sample.tokens.text.endswith(data.train.pictures.names[layout[picture][0]])
