"""Wrong captions of a picture: in each kind of source, made by a rule, and in a batch."""

import json

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from ds_cmli.config.effects import reasons
from ds_cmli.config.schema import Config, DataConfig
from ds_cmli.data.bad import Refused
from ds_cmli.data.batch import ABSENT
from ds_cmli.data.captions import swapped
from ds_cmli.data.load import build_data
from ds_cmli.data.sampler import Draw
from ds_cmli.data.sources.base import texts_of
from tests.conftest import ZERO1
from tests.data.sources.samples import coco, members, picture, rows, table, tar, user_error, write

COUNT = 6
# Of the pictures in their order: two, one, none (a blank one does not count), and for the others two.
WRONG = [["blue apple", "red pear"], ["green car"], ["  "], *[["a", "b"]] * 3]


def build(source, **settings):
    config = {"image_size": 8, "tokenizer": "builtin", "negatives": "field", "negatives_count": 2, "held_out": 1}
    return build_data(DataConfig(source=str(source), **(config | settings)), 0)


def jsonl(folder):
    write(folder, [{**row, "negatives": wrong} for row, wrong in zip(rows(COUNT), WRONG, strict=True)])
    return folder


def metadata_csv(folder):
    write(folder, rows(COUNT))
    names = [json.loads(line)["file_name"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    (folder / "metadata.jsonl").unlink()
    cells = [json.dumps(wrong).replace('"', '""') for wrong in WRONG]
    lines = [f'{name},red apple,"{cell}"' for name, cell in zip(names, cells, strict=True)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text,negatives", *lines]))
    return folder


def parquet(folder):
    folder.mkdir()
    table(range(COUNT), negatives=WRONG).to_parquet(str(folder / "x.parquet"))
    return folder / "x.parquet"


def saved(folder):
    table(range(COUNT), negatives=WRONG).save_to_disk(str(folder))
    return folder


def tars(folder):
    samples = []
    for name, content in members(range(COUNT)):
        if name.endswith(".json"):
            content = json.dumps({"negatives": WRONG[int(name[:6])]}).encode()
        samples.append((name, content))
    tar(folder / "0.tar", samples)
    return folder / "0.tar"


def csv(folder):
    folder.mkdir()
    for k in range(COUNT):
        (folder / f"{k}.png").write_bytes(picture(k))
    lines = [f"{k}.png\tred apple\t{json.dumps(wrong)}" for k, wrong in enumerate(WRONG)]
    (folder / "x.tsv").write_text(
        "\n".join(["filepath\ttitle\tnegatives", *lines])
        .replace('"', '""')
        .replace("\t[", '\t"[')
        .replace("]\n", ']"\n')
        + '"'
    )
    return folder / "x.tsv"


def annotated(folder):
    path = coco(folder, count=COUNT)
    content = json.loads(path.read_text())
    for image, wrong in zip(content["images"], WRONG, strict=True):
        image["negatives"] = wrong
    path.write_text(json.dumps(content))
    return path


def karpathy(folder):
    folder.mkdir()
    images = []
    for k, wrong in enumerate(WRONG):
        (folder / f"{k}.png").write_bytes(picture(k))
        sentences = [{"raw": f"red apple {k}"}, {"raw": "an apple"}]
        images.append({"filename": f"{k}.png", "split": "train", "sentences": sentences, "negatives": wrong})
    (folder / "dataset.json").write_text(json.dumps({"images": images}))
    return folder / "dataset.json"


@pytest.mark.parametrize("kind", [jsonl, metadata_csv, parquet, saved, tars, csv, annotated, karpathy])
def test_each_source_with_named_fields_has_a_list_of_them(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    data = build(kind(tmp_path / "data"))
    source = data.train.pictures
    listed = sorted(source.negatives(k) for k in range(len(source)))
    assert len(listed) == COUNT - 1  # one is held out
    for texts in listed:
        assert texts in ([], *WRONG)
    assert sum(texts == ["a", "b"] for texts in listed) >= 2 and not any("negatives" in line for line in data.summary)
    without = build(kind(tmp_path / "again"), negatives="")
    if kind is not tars:  # whose captions are in .txt: .json is not looked at
        assert any("negatives" in line for line in without.summary)
    assert not without.train[0].others and without.train[0].wrong == 0


def test_a_batch_has_them_after_the_captions_and_marks_those_that_lack(tmp_path):
    data = build(jsonl(tmp_path / "data"), captions=1)
    indices = {json.dumps(data.train.pictures.negatives(k)): k for k in range(len(data.train))}
    samples = [data.train[Draw(k, 3)] for k in indices.values()]
    batch = data.collate(samples)
    assert batch.wrong == 2 and batch.pair_id.shape == (len(samples), 4) and len(batch.input_ids) == 3 * len(samples)
    for key, row in zip(indices, batch.pair_id.tolist(), strict=True):
        assert row[2:].count(ABSENT) == 2 - len(json.loads(key)) and row[1] != ABSENT
    texts = [caption.tokens.text for sample in samples for caption in sample.others if not caption.absent]
    assert sorted(texts) == sorted(text for key in indices for text in json.loads(key))
    notices = [line for line in data.notices if "wrong captions" in line]
    assert len(notices) == 1 and "have fewer wrong captions than data.negatives_count = 2" in notices[0]


@pytest.mark.parametrize("value", ["a text", 3, 0, False, {}, {"a": 1}, [1], [["a"]], '{"a": 1}'])
def test_what_is_no_list_of_texts_is_one_line(value, tmp_path):
    write(tmp_path / "data", [{**row, "negatives": value} for row in rows(COUNT)])
    line = user_error(build, tmp_path / "data")
    assert "which cannot be used: its negatives are no list of texts; give a list of wrong captions, or null" in line


def test_lists_by_hand():
    for value in (None, [], "", "  ", "[]", "[null]", [" ", None]):
        assert texts_of(value) == []
    assert texts_of(' ["a", "b "] ') == texts_of(["a", None, "b"]) == ["a", "b"]
    for value in ("[", '"a"', "a, b", '["\\ud800"]'):
        with pytest.raises(Refused):
            texts_of(value)


def test_a_row_of_parquet_without_a_list_is_a_broken_sample(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    texts = ["no list", *['["x", "y"]'] * (COUNT - 1)]
    table(range(COUNT), negatives=texts).to_parquet(str(tmp_path / "x.parquet"))
    data = build(tmp_path / "x.parquet", caption_key="caption")
    samples = [data.train[k] for k in range(len(data.train))]
    assert all(len(sample.others) == sample.wrong == 2 for sample in samples)
    bad = [sample.bad[1] for sample in samples if sample.bad]
    assert bad in ([], ["its negatives are no list of texts"])  # it may be the one that is held out


@pytest.mark.parametrize(
    "caption, expected",
    [
        ("a red apple", {"a apple red"}),
        ("The cat sees a dog.", {"The sees cat a dog.", "The dog sees a cat.", "The cat dog a sees."}),
        ("apple", set()),
        ("an Apple and the apple", set()),
        ("", set()),
    ],
)
def test_swaps_by_hand(caption, expected):
    assert {*swapped(caption, 9, 0, 1)} == expected
    assert len(swapped(caption, 1, 5)) == min(1, len(expected)) and swapped(caption, 1, 5) == swapped(caption, 1, 5)


def test_swaps_of_the_captions_that_a_step_takes(tmp_path):
    write(tmp_path / "data", [*rows(COUNT, "red apple"), *rows(COUNT, "green pear")])
    data = build(tmp_path / "data", negatives="swap", captions=2, negatives_count=3)
    sample = data.train[Draw(0, 1)]
    texts = [sample.tokens.text, *(caption.tokens.text for caption in sample.others)]
    assert {*texts[:2]} == {"red apple", "green pear"} and {*texts[2:4]} == {"apple red", "pear green"}
    assert [caption.absent for caption in sample.others] == [False, False, False, True]
    assert len(data.evals["val"]) == 2 and not data.evals["val"][0].others
    write(tmp_path / "words", rows(COUNT, "apple"))
    with pytest.raises(UserError, match=r"data.negatives is 'swap': no caption has two words that could be exchanged"):
        build(tmp_path / "words", negatives="swap")
    with pytest.raises(UserError, match=r"data.negatives is 'field': no picture has a list 'negatives'"):
        build(tmp_path / "words")


def test_a_scenes_wrong_captions_have_a_name_of_none_of_its_pictures():
    config = {"image_size": 56, "tokenizer": "builtin", "context_length": 32, "negatives": "field"}
    data = build_data(DataConfig(**config, captions=2, negatives_count=3), 0)
    names = data.train.pictures.names
    for k in range(15):
        sample, own = data.train[Draw(k, 1)], [names[concept] for concept, _ in data.train.layout(k)]
        assert sample.wrong == 3 and len(sample.others) == 4
        for caption in sample.others[1:]:
            missing = [name for name in own if name not in caption.tokens.text]
            assert len(missing) >= 1 and caption.tokens.text != sample.tokens.text
    with pytest.raises(UserError, match=r"data.negatives is 'swap': a scene's names say the same in any order"):
        build_data(DataConfig(image_size=56, tokenizer="builtin", negatives="swap"), 0)


@pytest.mark.parametrize(
    "sections, line",
    [
        ({"data": {"negatives": "hard"}}, "data.negatives is 'hard'"),
        ({"data": {"negatives": "field", "negatives_count": 0}}, "data.negatives_count is 0"),
        ({"data": {"negatives": "field", "negatives_count": 999}}, "data.negatives_count is 999"),
        ({"loss": {"negatives": "some"}}, "loss.negatives is 'some'"),
        (
            {"data": {"negatives": "field"}, "loss": {"weights": {"cls_kd": 1.0}}},
            "data.negatives is 'field': the losses are cls_kd, none of which compares pairs",
        ),
        (
            {"data": {"negatives": "field", "captions": 2}, "loss": {"captions": "each"}},
            "loss.captions is 'each': a wrong caption belongs to none of the contrasts",
        ),
    ],
)
def test_mistakes(sections, line):
    assert user_error(Config.from_dict, sections).startswith(line)


def test_settings_without_effect():
    idle = reasons(Config(), DeepSpeedConfig.of(ZERO1), 1)
    assert "data.negatives asks for no wrong captions" == idle["data.negatives_count"] == idle["loss.negatives"]
