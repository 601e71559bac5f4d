import json

import pytest

from ds_cmli.common import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.sources import open_folder, open_json, open_tables


def rows(source):
    return {source.name(i): source.captions(i) for i in range(len(source))}


def write(folder, **files):
    for name, content in files.items():
        path = folder / name.replace("__", "/").replace("_csv", ".csv").replace("_jsonl", ".jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    for image in ("a.png", "b.png"):
        (folder / image).write_bytes(image.encode())


def opened(path, **settings):
    return open_tables([path], DataConfig(**settings))["train"]


def test_cells_stay_strings_and_rows_of_one_image_are_one_image(tmp_path):
    rest = 'a.png,"one, two"\nb.png,"three\nfour ""five"""\n'
    write(tmp_path, t_csv="file_name,text\na.png,NA\nb.png,2012\n./a.png,None\nb.png, \n" + rest)
    source = opened(tmp_path / "t.csv")
    assert rows(source) == {"a.png": ["NA", "None", "one, two"], "b.png": ["2012", 'three\nfour "five"']}
    assert source.image(1) == b"b.png"
    assert source.left_out == 0


def test_tabs_and_columns_are_found_or_named(tmp_path):
    (tmp_path / "t.tsv").write_text("filepath\ttitle\tsize\na.png\tone, two\t3\n")
    write(tmp_path, k_csv="file_name,text,german\na.png,one,eins\n")
    assert rows(opened(tmp_path / "t.tsv")) == {"a.png": ["one, two"]}
    assert rows(opened(tmp_path / "k.csv", caption_key="german")) == {"a.png": ["eins"]}


def test_json_lines_hold_a_text_or_a_list(tmp_path):
    lines = [{"file_name": "a.png", "text": ["one", "", "two"]}, {"file_name": "b.png", "text": "null"}]
    write(tmp_path, t_jsonl="\ufeff" + "\n\n".join(map(json.dumps, lines)))
    assert rows(opened(tmp_path / "t.jsonl")) == {"a.png": ["one", "two"], "b.png": ["null"]}


def test_images_without_a_caption_are_left_out_and_counted(tmp_path):
    write(tmp_path, t_csv="file_name,text\na.png,\nb.png,one\nc.png, \n")
    source = opened(tmp_path / "t.csv")
    assert (rows(source), source.left_out) == ({"b.png": ["one"]}, 2)


def test_a_folder_has_a_table_or_parts_with_tables(tmp_path):
    write(
        tmp_path,
        train__metadata_csv="file_name,text\nx.png,one\n",
        val__metadata_jsonl='{"file_name": "y", "text": "two"}',
    )
    for name in ("train/x.png", "val/y"):
        (tmp_path / name).write_bytes(b"")
    parts = open_folder([tmp_path], DataConfig())
    assert {split: rows(part) for split, part in parts.items()} == {
        "train": {"x.png": ["one"]},
        "validation": {"y": ["two"]},
    }
    write(tmp_path, metadata_csv="file_name,text\na.png,one\n")
    with pytest.raises(UserError, match="keep one for train"):
        open_folder([tmp_path], DataConfig())


def test_coco_and_karpathy(tmp_path):
    images = [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}]
    annotations = [{"image_id": 8, "caption": "b1"}, {"image_id": 7, "caption": "a1"}, {"image_id": 8, "caption": "b2"}]
    (tmp_path / "annotations").mkdir()
    coco = tmp_path / "annotations/captions_train2017.json"
    coco.write_text(json.dumps({"images": images, "annotations": annotations}))
    (tmp_path / "train2017").mkdir()
    (tmp_path / "train2017/b.png").write_bytes(b"B")
    source = open_json([coco], DataConfig())["train"]
    assert rows(source) == {"b.png": ["b1", "b2"], "a.png": ["a1"]}
    assert source.image(0) == b"B"
    listed = [
        {"filepath": "x", "filename": "a.png", "split": split, "sentences": [{"raw": split}, {"raw": " "}]}
        for split in ("train", "restval", "val", "test")
    ]
    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.png").write_bytes(b"")
    (tmp_path / "dataset.json").write_text(json.dumps({"images": listed}))
    parts = open_json([tmp_path / "dataset.json"], DataConfig())
    assert {split: rows(part) for split, part in parts.items()} == {
        "train": {"x/a.png": ["train", "restval"]},
        "validation": {"x/a.png": ["val"]},
        "test": {"x/a.png": ["test"]},
    }


def test_the_first_files_may_be_missing_but_not_all(tmp_path):
    write(tmp_path, t_csv="file_name,text\nnone.png,one\na.png,two\n", u_csv="file_name,text\nnone.png,one\n")
    assert len(opened(tmp_path / "t.csv")) == 2
    with pytest.raises(UserError, match="--image-root"):
        opened(tmp_path / "u.csv")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/none.png").write_bytes(b"here")
    assert opened(tmp_path / "u.csv", image_root=str(tmp_path / "elsewhere")).image(0) == b"here"


MISTAKES = {  # what a list holds: what the line names
    "a,b\nx,y\n": "line 2",
    "file_name,text\na.png,one,two\n": "line 2: not as many cells",
    'file_name,text\na.png,one\na.png,"open\n': "after line 2",
    "file_name,text\na.png\n": "line 2: not as many cells",
    "file_name,text\n": "has no row",
    b"file_name,text\n" + b"a.png,one\n" * 3000 + b"a.png,\xff\n": "line 3002 is no UTF-8",
    '{"file_name": "a.png", "text": "x"}\n{"file_name": "a.png"}\n': "line 2.*text",
    '{"file_name": "a.png", "text": "x"}\n{"file_name"\n': "line 2 is no JSON",
    '{"file_name": "a.png", "text": 5}\n': "line 1.*5",
    '{"file_name": null, "text": "x"}\n': "line 1.*None",
}


@pytest.mark.parametrize("content", MISTAKES)
def test_a_mistake_in_a_list_is_named_by_its_line(tmp_path, content):
    kind = "jsonl" if isinstance(content, str) and content.startswith("{") else "csv"
    write(tmp_path, **{f"t_{kind}": content})
    with pytest.raises(UserError, match=MISTAKES[content]) as error:
        opened(tmp_path / f"t.{kind}")
    assert f"t.{kind}" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"images": [{"filename": "x", "split": "other"}]}', '{"images": [{}]}']
)
def test_a_json_of_another_form_is_one_line(tmp_path, content):
    (tmp_path / "t.json").write_text(content)
    with pytest.raises(UserError, match=r"t\.json") as error:
        open_json([tmp_path / "t.json"], DataConfig())
    assert "\n" not in str(error.value)
