"""Each kind of source: the same pictures and captions in its form; what is missing or damaged there is named."""

import json
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.opening import open_hub
from ds_cmli.data.sources.arrow import open_parquet, open_saved
from ds_cmli.data.sources.lists import open_json, open_tables
from ds_cmli.data.sources.tars import Tars, open_tars
from ds_cmli.errors import UserError
from tests import make
from tests.make import shard

BYTES = [b"a", b"b"]
TEXTS = [["NA", "2012"], ["one, two"]]
FILES = [{"bytes": content, "path": None} for content in BYTES]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def contents(source):
    return [(source.image(i), source.captions(i)) for i in range(len(source))]


def pictures(folder):
    folder.mkdir(exist_ok=True)
    for image in ("a", "b"):
        (folder / f"{image}.png").write_bytes(image.encode())


def table(folder, name, content, **settings):
    """Return the source of a list beside pictures."""
    pictures(folder)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return open_tables([folder / name], DataConfig(**settings))["train"]


def coco(folder):
    images = [{"id": 8, "file_name": "a.png"}, {"id": 7, "file_name": "b.png"}, {"id": 9, "file_name": "c.png"}]
    texts = [(8, "NA"), (7, "one, two"), (8, "2012"), (9, " ")]
    annotations = [{"image_id": number, "caption": text} for number, text in texts]
    pictures(folder / "train2017")
    path = folder / "annotations/captions_train2017.json"
    make.json_file(path, {"images": images, "annotations": annotations})
    return open_json([path], DataConfig())["train"]


def karpathy(folder):
    pictures(folder / "train")
    rows = (("train", "a", "NA"), ("restval", "b", "one, two"), ("val", "b", "x"), ("train", "a", "2012"))
    path = make.karpathy(folder / "t.json", [(f"train/{image}.png", split, [text, " "]) for split, image, text in rows])
    return open_json([Path(path)], DataConfig())["train"]


def parquet(path, **columns):
    Dataset.from_dict(columns).to_parquet(path)
    return open_parquet([path], DataConfig())["train"]


LONG = "x" * 150
A = [("x/a.jpg", b"a"), ("x/a.json", b'{"caption": ["NA", "2012"]}')]
B = [("b.PNG", b"b"), ("b.txt", b"one, two ")]
APART = [A[1], B[1], B[0], ("x/readme.md", b"-"), ("y.txt", b"alone"), A[0]]  # in the order of their first members
LINKED = [(f"{LONG}.jpg", b"a"), (f"{LONG}.json", A[1][1]), ("1.txt", b"one, two"), ("0.jpg", b"b"),
          ("s/1.txt", "../1.txt", tarfile.SYMTYPE), ("s/1.jpg", "../0.jpg", tarfile.SYMTYPE),
          ("3.jpg", "none.jpg", tarfile.SYMTYPE)]  # fmt: skip


def tar(members, form):
    return lambda folder: open_tars([shard(folder / "0.tar", members, form)], DataConfig())["train"]


CSV = 'file_name,text\na.png,NA\nb.png,"one, two"\n./a.png,2012\nb.png, \nc.png,\n'
TSV = "filepath\ttitle\tsize\na.png\tNA\t3\nb.png\tone, two\t3\na.png\t2012\t3\nc.png\t\t3\n"
LINES = '\ufeff{"file_name": "a.png", "text": ["NA", "", "2012"]}\n\n{"file_name": "b.png", "text": "one, two"}\n'
KINDS = {  # the source in a folder, and how many pictures it leaves out because they have no caption
    "csv": (lambda folder: table(folder, "t.csv", CSV), 1),
    "tsv": (lambda folder: table(folder, "t.tsv", TSV), 1),
    "two captions": (lambda folder: table(folder, "t.tsv", TSV.replace("size", "text"), caption_key="title"), 1),
    "jsonl": (lambda folder: table(folder, "t.jsonl", LINES + '{"file_name": "c.png", "text": []}'), 1),
    "coco": (coco, 1),
    "karpathy": (karpathy, 0),
    "files in parquet": (lambda folder: parquet(folder / "a.parquet", image=FILES, caption=TEXTS, width=[1, 2]), None),
    "bytes in parquet": (lambda folder: parquet(folder / "a.parquet", image=BYTES, text=TEXTS), None),
    "tar, ustar": (tar([*A, *B, ("c.jpg", b"J"), ("d.jpg", b"J"), ("d.txt", b"")], tarfile.USTAR_FORMAT), 2),
    "tar, apart": (tar(APART, tarfile.GNU_FORMAT), 1),
    "tar, gnu links": (tar(LINKED, tarfile.GNU_FORMAT), None),
    "tar, pax links": (tar(LINKED, tarfile.PAX_FORMAT), None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_has_its_bytes_and_all_its_captions_as_they_are(kind, tmp_path):
    opened, left_out = KINDS[kind]
    source = opened(tmp_path)
    assert contents(source) == [(b"a", ["NA", "2012"]), (b"b", ["one, two"])]
    assert left_out is None or source.left_out == left_out


def test_the_first_files_may_be_missing_but_not_all(tmp_path):
    assert len(table(tmp_path, "t.csv", "file_name,text\nnone.png,one\na.png,two\n")) == 2
    with pytest.raises(UserError, match="--image-root"):
        table(tmp_path, "u.csv", "file_name,text\nnone.png,one\n")
    elsewhere = make.pictures(tmp_path / "elsewhere", "none.png")
    source = table(tmp_path, "u.csv", "file_name,text\nnone.png,one\n", image_root=str(elsewhere))
    assert source.image(0) == make.png(0)


def test_a_long_list_takes_a_third_of_its_text(tmp_path):
    rows = [(f"images/{n:08}.jpg", f"a red square next to a blue circle {n}") for n in range(1000)]
    content = "file_name,text\na.png,one\n" + "".join(f"{name},{text}\n" for name, text in rows)
    source = table(tmp_path, "t.csv", content)
    for n in np.random.default_rng(0).permutation(1000).tolist():
        assert (source.name(n + 1), source.captions(n + 1)) == (rows[n][0], [rows[n][1]])
    assert len(source.rows.buffer) + source.rows.ends.nbytes < len(content) / 3


MISTAKES = {  # what a list holds: what the line names
    "a,b\nx,y\n": "line 2",
    "file_name,text\na.png,one,two\n": "line 2: not as many cells",
    'file_name,text\na.png,one\na.png,"open\n': "after line 2",
    "file_name,text\n": "has no row",
    b"file_name,text\n" + b"a.png,one\n" * 3000 + b"a.png,\xff\n": "line 3002 is no UTF-8",
    '{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png"}\n': "line 2.*text",
    '{"file_name": "a.png", "text": "x"}\n{"file_name"\n': "line 2 is no JSON",
    '{"file_name": "a.png", "text": 5}\n': "line 1.*5",
    "{" + '"a":{' * 100_000: "line 1: nested too deeply",
    "file_name,text,text\na.png,one,two\n": "line 2: line 1 has the column text more than once",
    "file_name,text\na.png," + "x" * 140_000 + "\n": r"131072.*: a quote is not closed, or the text is longer",
}


@pytest.mark.parametrize("content", MISTAKES, ids=[*MISTAKES.values()])
def test_a_mistake_in_a_list_is_named_by_its_line(tmp_path, content):
    name = "t.jsonl" if isinstance(content, str) and content.startswith("{") else "t.csv"
    with pytest.raises(UserError, match=MISTAKES[content]) as error:
        table(tmp_path, name, content)
    assert name in str(error.value) and "\n" not in str(error.value)


def test_files_and_saved_data_sets_have_splits_by_their_names(tmp_path):
    rows = Dataset.from_dict({"image": FILES, "text": TEXTS}).cast_column("image", datasets.Image())
    files = [tmp_path / f"{name}.parquet" for name in ("train-0", "validation-0", "test_0", "other")]
    for file in files:
        rows.to_parquet(file)
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "val": rows.select([0]), "extra": rows}).save_to_disk(tmp_path / "several")
    for parts, sizes in (
        (open_parquet(files, DataConfig()), {"train": 4, "validation": 2, "test": 2}),
        (open_saved([tmp_path / "one"], DataConfig()), {"train": 2}),
        (open_saved([tmp_path / "several"], DataConfig()), {"train": 2, "validation": 1}),
    ):
        assert {split: len(part) for split, part in parts.items()} == sizes
        assert contents(parts["train"])[:2] == [(b"a", ["NA", "2012"]), (b"b", ["one, two"])]


def test_columns_are_found_or_named(tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(UserError, match=r"title, caption.*data\.caption_key"):
        parquet(path, image=FILES, title=["a"] * 2, caption=["b"] * 2)
    source = open_parquet([path], DataConfig(caption_key="caption"))["train"]
    assert source.captions(0) == ["b"]
    columns = {"images": 2, "columns": ["caption", "image", "title"]}
    assert source.fingerprint().items() >= columns.items()


def test_nothing_in_the_users_cache_is_changed(tmp_path, monkeypatch):
    """It keeps copies of parquet and results of `.map()`, also with little space left."""
    path = tmp_path / "a.parquet"
    parquet(path, image=FILES, text=["a", "b"])
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)
    users_data = datasets.load_dataset("parquet", data_files={"train": [str(path)]})["train"]
    users_data.map(lambda row: {"text": row["text"] * 2})
    users_data.map(lambda row: {"more": 1})
    cached = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.arrow")}
    assert len(cached) == 3
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10))
    for _ in range(2):
        assert len(open_parquet([path], DataConfig())["train"]) == 2
    assert {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.arrow")} == cached


def test_a_caption_is_a_key_of_the_json(tmp_path):
    content = json.dumps({"text": "usual", "alt": "other", "none": None}).encode()
    path = shard(tmp_path / "0.tar", [("0.jpg", b"J"), ("0.json", content), ("0.txt", b"plain")])
    captions = {key: Tars([path], DataConfig(caption_key=key)).captions for key in ("", "alt", "none")}
    assert captions[""](0) == ["plain"] and captions["alt"](0) == ["other"]
    with pytest.raises(ValueError, match="none"):
        captions["none"](0)


NUMBER = '{"images": [{"id": 1, "file_name": "a.png"}], "annotations": [{"image_id": 1, "caption": 5}]}'
UNREADABLE = [  # opening a file or folder, its content, what the line names
    (open_json, "t.json", "[]", "no list of captions"),
    (open_json, "t.json", '{"images": [{"filename": "x", "split": "other"}]}', "no list of captions"),
    (open_json, "t.json", '{"images": [{}]}', "no list of captions"),
    (open_json, "t.json", NUMBER, r"a caption of a\.png is 5: give a text"),
    (open_parquet, "7.parquet", "PAR1 and no more", "as parquet"),
    (open_saved, "saved/state.json", "{}", "save_to_disk"),
    (open_tars, "1.tar", "\0" * tarfile.RECORDSIZE, "holds no sample"),
]


@pytest.mark.parametrize(("opening", "name", "content", "message"), UNREADABLE)
def test_what_cannot_be_read_is_one_line_that_names_it(tmp_path, opening, name, content, message):
    path = tmp_path / name
    make.json_file(path, content)
    path = path.parent if opening is open_saved else path
    with pytest.raises(UserError, match=message) as error:
        opening([path], DataConfig())
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_a_data_set_that_the_hub_does_not_have_is_one_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"^hf://datasets/no-such-owner/7@v1 cannot be fetched: [^\n]*$"):
        open_hub("hf://datasets/no-such-owner/7@v1", DataConfig())
