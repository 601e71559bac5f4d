import contextlib
import os
import sys

import pytest

from ds_cmli.data.sampler import Draw
from ds_cmli.data.sources import arrow
from tests.data.sources.samples import build, datasets, parquet, picture, shown, table, user_error


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets().config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("as_image", [False, True])
def test_parquet_files_are_read_undecoded_and_the_size_of_the_copy_is_told_once(tmp_path, as_image, capsys):
    for k in range(2):
        parquet(tmp_path / "data" / f"{k:05}.parquet", range(20 * k, 20 * k + 20), as_image=as_image)
    for _ in range(2):
        data = build(tmp_path / "data")
        assert (len(data.train), len(data.evals["val"])) == (38, 2)
        both = [shown(dataset[k]) for dataset in (data.train, data.evals["val"]) for k in range(len(dataset))]
        assert sorted(both) == list(range(40))
    assert capsys.readouterr().out.count("into Arrow files, once: about 0.00 GB in") == 1


def test_a_process_that_waited_for_the_copy_of_another_reads_it(tmp_path, monkeypatch):
    file, lock = parquet(tmp_path / "train.parquet", range(5)), arrow.FileLock

    @contextlib.contextmanager
    def held_by_another(path):
        monkeypatch.setattr(arrow, "FileLock", lock)
        build(file)  # as another rank does, which was first
        yield

    monkeypatch.setattr(arrow, "FileLock", held_by_another)
    assert len(build(file).train) == 4


def test_splits_are_known_by_the_files_names(tmp_path):
    for split, count in (("train", 5), ("validation", 3), ("test", 2)):
        parquet(tmp_path / f"{split}-00000-of-00001.parquet", range(count))
    data = build(tmp_path)
    assert (len(data.train), len(data.evals["val"])) == (5, 3)
    assert "the test part of" in data.notices[0]


def test_what_save_to_disk_wrote_is_read_with_lists_of_captions(tmp_path):
    texts = [["red apple", "", f"green pear {k}"] for k in range(8)]
    table(range(8), caption="other").add_column("captions", texts).save_to_disk(str(tmp_path / "one"))
    data = build(tmp_path / "one", caption_key="captions")
    source = data.train.pictures.sources[0]
    assert source.captions(0)[0] == "red apple" and len(source.captions(0)) == 2
    assert len(data.evals["val"]) == 2 * 1
    parts = datasets().DatasetDict(train=table(range(5)), validation=table(range(5, 8)))
    parts.save_to_disk(str(tmp_path / "parts"))
    data = build(tmp_path / "parts")
    assert (len(data.train), len(data.evals["val"])) == (5, 3)
    assert [shown(data.train[Draw(k, 1)]) for k in range(5)] == list(range(5))


def test_rows_without_an_image_or_a_caption_are_bad_samples(tmp_path):
    some = table(range(50))
    rows = [dict(row) for row in some]
    rows[3]["image"], rows[4]["caption"], rows[5]["caption"] = None, None, "  "
    datasets().Dataset.from_list(rows).save_to_disk(str(tmp_path / "x"))
    data = build(tmp_path / "x", val_source=str(tmp_path / "x"))
    bad = [data.train[k].bad[1] for k in (3, 4, 5)]
    assert bad == ["no image bytes in its row", "empty caption", "empty caption"]
    assert len(data.evals["val"]) == 48 and len(data.evals["val"].bad) == 2


@pytest.mark.parametrize(
    ("columns", "settings", "said"),
    [
        ({"image": "jpg", "caption": "a", "b": ["x"] * 4}, {}, "has the columns a, b: say which one is meant by"),
        (
            {"text": ["x"] * 4},
            {},
            "has caption and text: say which one is meant by data.caption_key (--csv-caption-key)",
        ),
        ({}, {"image_key": "caption"}, "is 'caption', and"),
        (
            {"caption": "words", "captions": [{"raw": "x"}] * 4},
            {},
            "no column of texts or lists of texts, but captions (st",
        ),
        ({"n": [1] * 4}, {"caption_key": "n"}, "(train) has no column of texts or lists of texts, but n (int64)"),
        (
            {"caption": "words", "text": [1] * 4},
            {},
            "(train) has no column of texts or lists of texts, but text (int64)",
        ),
        ({"image": "pic", "caption": "words"}, {}, None),
    ],
)
def test_columns_are_found_or_given(tmp_path, columns, settings, said):
    path = parquet(tmp_path / "x.parquet", range(4), **columns)
    if said is None:
        assert len(build(path, **settings).train) == 3
    else:
        assert said in user_error(lambda: build(path, **settings))


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"no parquet")
    assert "x.parquet', which cannot be read (" in user_error(build, tmp_path / "x.parquet")
    datasets().DatasetDict(a=table(range(3))).save_to_disk(str(tmp_path / "d"))
    assert "has the splits a: name one 'train'" in user_error(build, tmp_path / "d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert "pip install 'ds-cmli[parquet]'" in user_error(build, tmp_path / "x.parquet")


def test_captions_are_counted_and_measured_without_reading_them(tmp_path):
    texts = [["red apple", "", "pear"], None, [], ["x" * 2000, None, "y"], *[["red"]] * 4]
    result = table(range(8), caption="other").add_column("captions", texts)
    result.select([3, 0, 1, 2, 4, 5, 6, 7]).save_to_disk(str(tmp_path / "one"))
    data = build(tmp_path / "one", caption_key="captions", val_source=str(tmp_path / "one"), max_bad_share=0.5)
    (source,) = data.train.pictures.sources
    assert source.caption_counts().tolist() == [2, 2, 0, 0, 1, 1, 1, 1]
    assert source.caption_bytes().tolist() == [2000, 9, 0, 0, 3, 3, 3, 3]
    (line,) = (line for line in data.notices if "characters" in line)
    assert line.startswith("1 captions of ") and "the longest 2,000, of row 0" in line
    datasets().Dataset.from_dict({"image": [picture(k) for k in range(3)], "caption": ["a", None, "ab"]}).to_parquet(
        str(tmp_path / "a.parquet")
    )
    (source,) = build(tmp_path / "a.parquet", val_source=str(tmp_path / "a.parquet")).train.pictures.sources
    assert (source.caption_counts().tolist(), source.caption_bytes().tolist()) == ([1, 0, 1], [1, 0, 2])


def test_files_and_splits_of_unknown_names_are_told(tmp_path):
    for split, count in (("train", 5), ("validation", 3), ("foo", 2)):
        parquet(tmp_path / "files" / f"{split}-00000-of-00001.parquet", range(count))
    data = build(tmp_path / "files")
    assert len(data.train) == 7
    (line,) = (line for line in data.notices if "name none of the parts" in line)
    assert line.endswith("are trained on, the first: foo-00000-of-00001.parquet")
    parts = datasets().DatasetDict(train=table(range(5)), foo=table(range(5, 8)))
    parts.save_to_disk(str(tmp_path / "saved"))
    (line,) = build(tmp_path / "saved").notices
    assert line.startswith("the split 'foo' of ") and line.endswith("known are train, validation, valid, val, test")


def test_files_that_two_sources_share_are_held_out_of_both(tmp_path):
    for k in range(3):
        parquet(tmp_path / f"{k}.parquet", range(20 * k, 20 * k + 20))
    data = build([f"{tmp_path}/{{0,1}}.parquet", f"{tmp_path}/{{1,2}}.parquet"])
    train, held = ([shown(pairs[k]) for k in range(len(pairs))] for pairs in (data.train, data.evals["val"]))
    assert not set(train) & set(held) and len(set(train) | set(held)) == 60
    assert any("in another source too" in line for line in data.notices)


def test_columns_that_are_not_read_are_named(tmp_path):
    path = parquet(tmp_path / "x.parquet", range(4), wrong=["x"] * 4, negatives=[["x"]] * 4)
    for name in (path, tmp_path / "saved"):
        table(range(4), wrong=["x"] * 4, negatives=[["x"]] * 4).save_to_disk(str(tmp_path / "saved"))
        assert build(name, caption_key="caption").summary[0].endswith(", not read: the columns wrong, negatives")


def test_a_damaged_copy_is_made_again_and_a_text_that_is_no_unicode_is_a_bad_sample(tmp_path, capsys):
    pa = pytest.importorskip("pyarrow")
    texts = pa.array(["red", "apple", "pear"] * 10)
    content = bytearray(texts.buffers()[2])
    content[3] = 0xFF  # of the second text
    broken = pa.Array.from_buffers(pa.string(), 30, [None, texts.buffers()[1], pa.py_buffer(content)])
    folder = tmp_path / "data"
    folder.mkdir()
    with open(folder / os.fsdecode(b"x\xff.parquet"), "wb") as file:
        pa.parquet.write_table(pa.table({"image": [picture(k) for k in range(30)], "caption": broken}), file)
    for flip in (None, 1200, -40, None):
        copies = list((tmp_path / "cache").rglob("*.arrow"))
        if flip:
            whole = bytearray(copies[0].read_bytes())
            whole[flip] ^= 16
            copies[0].write_bytes(whole)
        data = build(folder, held_out=1)
        bad = [data.train[k].bad for k in range(29)]
        assert sum(item is not None and "can't decode byte 0xff" in item[1] for item in bad) == 1
        assert shown(data.train[0]) == 0
    assert capsys.readouterr().out.count("into Arrow files") == 3
