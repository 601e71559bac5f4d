"""Every list with every damage: one line with the file, the place and what to do, before a model is loaded."""

import json
import os

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.evaluate.suites.suite import read_suite
from tests.evaluate.suites import lists

# Of each kind, a list and the keys that are read.
FILES = {
    lists.sugarcrepe: ("data/add_obj.json", ("filename", "caption", "negative_caption")),
    lists.vg_relation: (
        "visual_genome_relation.json",
        ("image_path", "bbox_x", "bbox_y", "bbox_w", "bbox_h", "true_caption", "false_caption", "relation_name"),
    ),
    lists.vg_attribution: ("visual_genome_attribution.json", ("image_path", "bbox_w", "true_caption", "attributes")),
    lists.coco_order: ("coco_order.json", ("image", "caption_options")),
    lists.winoground: ("examples.jsonl", ("image_0", "image_1", "caption_0", "caption_1")),
    lists.colorswap: ("test.json", ("image_1", "image_2", "caption_1", "caption_2")),
    lists.docci: ("docci_descriptions.jsonlines", ("split", "image_file", "description")),
    lists.dci: ("annotations/3.json", ("image", "short_caption", "extra_caption")),
    lists.iiw: ("IIW-400/data.jsonl", ("image/key", "IIW")),
    lists.sharegpt4v: ("share-captioner.json", ("image", "conversations")),
}
PICTURES = ("filename", "image_path", "image", "image_0", "image_1", "image_2", "image_file", "image/key")
ids = {"ids": lambda value: getattr(value, "__name__", str(value))}


def entries(file):
    text = file.read_text()
    if "jsonl" in file.suffix:
        return list(map(json.loads, text.splitlines()))
    return json.loads(text)


def one(content, file):
    """An entry of the middle of a list, or the object of a file."""
    if isinstance(content, list):
        return content[2]
    return content.get("2", content)


def refused(tmp_path, settings):
    with pytest.raises(UserError) as error:
        read_suite(lists.write_suite(tmp_path, task=settings))
    line = str(error.value)
    assert line.startswith("--suite: task") and ("\n" not in line or "data.source" in line)
    return line


@pytest.mark.parametrize(("write", "name", "key"), [(w, n, k) for w, (n, keys) in FILES.items() for k in keys], **ids)
def test_keys(tmp_path, write, name, key):
    settings = write(tmp_path)
    file = tmp_path / name
    before = file.read_bytes()
    for value, words in (
        (None, f"no '{key}'"),
        ({"a": 1}, f"'{key}' is dict, and "),
        (True, f"'{key}' is bool, and "),
    ):
        content = entries(file)
        if value is None:
            del one(content, file)[key]
        else:
            one(content, file)[key] = value
        lists.write(file, content)
        line = refused(tmp_path, settings)
        if not (write is lists.iiw and key == "image/key"):
            assert words in line
        assert str(file) in line and "fetch it again, or repair it" in line
        assert any(place in line for place in ("entry 2", "line 3", "its object")), line
        file.write_bytes(before)
    content = entries(file)
    if key in PICTURES:
        one(content, file)[key] = "../none"
        lists.write(file, content)
        line = refused(tmp_path, settings)
        assert "its picture '../none" in line and "is not in" in line
    elif key not in ("extra_caption", "conversations", "attributes", "split") and not key.startswith(
        ("bbox", "caption_o")
    ):
        one(content, file)[key] = " "
        lists.write(file, content)
        assert f"its '{key}' is ' ', and a text of whole characters is needed" in refused(tmp_path, settings)


@pytest.mark.parametrize("content", [b"", b'{"a', b"\xff\xfe\x00", b"[]", b"null", b"3"], ids=repr)
@pytest.mark.parametrize(("write", "name"), [(w, n) for w, (n, _) in FILES.items()], **ids)
def test_files(tmp_path, write, name, content):
    settings = write(tmp_path)
    (tmp_path / name).write_bytes(content)
    line = refused(tmp_path, settings)
    assert str(tmp_path / name) in line and "fetch it again" in line


@pytest.mark.parametrize(("write", "name"), [(w, n) for w, (n, _) in FILES.items()], **ids)
def test_byte_order_marks_and_line_ends_of_windows(tmp_path, write, name):
    file = lists.write_suite(tmp_path, task=write(tmp_path))
    before, path = read_suite(file)["task"], tmp_path / name
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    after = read_suite(file)["task"]
    assert getattr(after, "questions", None) == getattr(before, "questions", None)
    assert getattr(after, "pairs", None) == getattr(before, "pairs", None)


@pytest.mark.parametrize(("write", "name"), [(w, n) for w, (n, _) in FILES.items() if w is not lists.dci], **ids)
def test_a_list_with_something_that_is_no_object(tmp_path, write, name):
    settings, file = write(tmp_path), tmp_path / name
    content = entries(file)
    content[2 if isinstance(content, list) else "2"] = "text"
    lists.write(file, content)
    line = refused(tmp_path, settings)
    assert str(file) in line and ("entry 2" in line or "line 3" in line) and "fetch it again, or repair it" in line


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("Question ID", "id", "whose first line is not Question ID,Type,Statement: fetch it again"),
        ("5,Orientation", "6,Orientation", "line 6: a pair is an odd and an even 'Question ID' of one 'Type'"),
        ("6,Orientation", "6,Color", "line 7: a pair is an odd and an even"),
        ("6,Orientation", "six,Orientation", "line 7: a pair is an odd and an even"),
        ("5,Orientation", "305,Orientation", "305.jpg' is not there: fetch it again"),
        ('""16"" on it"', '""16"" on it', "line 17: a quote is not closed"),
        ('""7"" on it"', '""7"" on it', "line 8: a quote is not closed"),
        ('7,Orientation,"', '7,Orientation,x,"', "line 8: 4 cells where 3 are needed"),
        ('7,Orientation,"', '7,"Orientation ', "line 8: 2 cells where 3 are needed"),
        ("a statement", "", ""),
    ],
)
def test_questions_of_mmvp(tmp_path, old, new, words):
    settings, file = lists.mmvp(tmp_path), tmp_path / "Questions.csv"
    text = file.read_text()
    if not words:  # the last row of a pair is lost
        text, words = text.rsplit("\n", 2)[0], "line 16: it has no second row of its pair"
    file.write_text(text.replace(old, new))
    line = refused(tmp_path, settings)
    assert words in line and str(file) in line
    # A byte order mark and the line ends of Windows are read.
    lists.mmvp(tmp_path)
    suite = lists.write_suite(tmp_path, task=settings)
    before = read_suite(suite)["task"].questions
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert read_suite(suite)["task"].questions == before


def test_questions_of_mmvp_as_other_programs_write_them(tmp_path):
    """Blank lines, and quotes inside of a cell."""
    suite = lists.write_suite(tmp_path, task=lists.mmvp(tmp_path))
    before, file = read_suite(suite)["task"].questions, tmp_path / "Questions.csv"
    text = file.read_text()
    file.write_text(text.replace("\n", "\n\n") + "\n\n")
    assert read_suite(suite)["task"].questions == before
    file.write_text(text.replace('"' + lists.WORDS[3] + ', with a ""3"" on it"', '5" tall'))
    assert read_suite(suite)["task"].questions[1].captions[0] == 'a photo of 5" tall'
    file.write_text(text + '17,Color,"' + "x" * 200_000)
    with pytest.raises(UserError, match=r"line 18: no CSV \(field larger"):
        read_suite(suite)


@pytest.mark.parametrize("content", [b"", b"\xff", b"Question ID,Type,Statement\n"], ids=repr)
def test_questions_of_mmvp_that_are_empty(tmp_path, content):
    settings = lists.mmvp(tmp_path)
    (tmp_path / "Questions.csv").write_bytes(content)
    assert "Questions.csv, wh" in refused(tmp_path, settings)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "image" / "3.jpg").unlink(), "3.txt, line 1: its picture '"),
        (lambda folder: (folder / "caption" / "3.txt").write_text("\ntext"), "3.txt, line 1: its 'caption' is ''"),
        (lambda folder: (folder / "caption" / "3.txt").write_bytes(b"\xff"), "3.txt, which cannot be read ('utf-8'"),
        (lambda folder: [file.unlink() for file in (folder / "caption").iterdir()], "has no .txt file"),
    ],
)
def test_captions_of_urban1k(tmp_path, damage, words):
    settings = lists.urban1k(tmp_path)
    damage(tmp_path)
    assert words in refused(tmp_path, settings)


def test_pipes_do_not_block(tmp_path):
    settings = lists.winoground(tmp_path)
    (tmp_path / "examples.jsonl").unlink()
    os.mkfifo(tmp_path / "examples.jsonl")
    assert "which cannot be read (no regular file)" in refused(tmp_path, settings)
    os.mkfifo(tmp_path / "pipe.toml")
    with pytest.raises(UserError, match="no regular file"):
        read_suite(str(tmp_path / "pipe.toml"))


@pytest.mark.parametrize(
    ("write", "more", "words"),
    [
        (lists.docci, {"split": "val"}, "--suite: task.split is 'val': Input should be 'train', 'test'"),
        (lists.docci, {"split": "qual_dev"}, "has no entry of the split 'qual_dev'"),
        (lists.iiw, {"images": ["IIW-400/photos"]}, "--suite: task: 2 files and 1 images: give each file"),
        (lists.iiw, {"files": []}, "--suite: task.files is []: List should have at least 1 item"),
        (lists.sharegpt4v, {"first": 0}, "--suite: task.first is 0: Input should be greater than or equal to 1"),
        (lists.sharegpt4v, {"first": 9}, "entry 8: its picture 'coco/8.jpg' is not in"),
        (lists.retrieval, {"data": "photos"}, "--suite: task: data.source is '"),
        (lists.pointing_game, {"split": "val"}, "has the lists test; 'all' takes every picture"),
        (lists.winoground, {"images": 3}, "--suite: task.images is 3: give a path as a text"),
        (lists.winoground, {"images": "examples.jsonl"}, "is not in"),
        (lists.dci, {"files": "photos"}, "has no .json file"),
    ],
)
def test_settings(tmp_path, write, more, words):
    assert words in refused(tmp_path, {**write(tmp_path), **more})
