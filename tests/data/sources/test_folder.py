import pytest

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.sources.base import HELD_OUT_MOST, hold_out
from ds_cmli.data.sources.folder import load_folder, read_metadata
from tests.data.sources.samples import build, captions, names, rows, user_error, write


def load(folder, **settings):
    """Training and validation pairs of a folder."""
    parts = load_folder(str(folder), [], DataConfig(**settings))
    return (parts.train, parts.validation) if parts.validation else hold_out(parts.train)


def metadata(path):
    return read_metadata(path, path.parent, DataConfig(), [])


def test_pairs_of_a_folder(tmp_path):
    write(tmp_path, rows(40))
    data = build(tmp_path)
    assert (len(data.train), len(data.evals["val"])) == (38, 2)
    assert not data.has_places
    (train,) = data.train.pictures.sources
    assert not set(names(train)) & {data.evals["val"].name(row) for row in range(2)}
    sample = data.train[0]
    assert sample.image.shape == (3, 8, 8)
    assert sample.image[0, 4, 4] == int(train.name(0)[:3])
    batch = data.collate([sample])
    assert (batch.token_picture == -1).all()
    assert (batch.cell_picture == -1).all()


def test_which_files_are_held_out_depends_on_their_names_only(tmp_path):
    write(tmp_path / "a", rows(40), images=False)
    write(tmp_path / "b", rows(40, "other text")[::-1], images=False)
    assert set(names(load(tmp_path / "a")[1])) == set(names(load(tmp_path / "b")[1]))


def test_all_captions_of_an_image_fall_on_the_same_side(tmp_path):
    write(tmp_path, rows(20) + rows(20, "green pear"), images=False)
    train, validation = load(tmp_path)
    assert captions(validation) == [["red apple", "green pear"]]
    assert captions(train) == [["red apple", "green pear"]] * 19
    assert set(names(train)) | set(names(validation)) == {row["file_name"] for row in rows(20)}


def test_at_most_a_thousand_files_are_held_out(tmp_path):
    write(tmp_path, rows(20_100), images=False)
    assert len(load(tmp_path)[1]) == HELD_OUT_MOST


@pytest.mark.parametrize("name", ["validation", "val"])
def test_a_validation_folder_is_used_as_it_is(tmp_path, name):
    write(tmp_path / "train", rows(5))
    write(tmp_path / name, rows(3, "green pear"))
    data = build(tmp_path)
    assert (len(data.train), len(data.evals["val"])) == (5, 3)
    assert data.evals["val"].pictures.sources[0].folder == tmp_path / name


def test_a_train_folder_alone_has_a_share_held_out(tmp_path):
    write(tmp_path / "train", rows(5))
    assert [len(part) for part in load(tmp_path)] == [4, 1]


def test_csv_with_quotes_and_a_byte_order_mark(tmp_path):
    (tmp_path / "metadata.csv").write_text('\ufefffile_name,text\na.png,"a cat, asleep"\nb.png,dog\n', encoding="utf-8")
    result = metadata(tmp_path / "metadata.csv")
    assert (names(result), captions(result)) == (["a.png", "b.png"], [["a cat, asleep"], ["dog"]])


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"file_name": "a.png", "caption": "x"}', "line 2 has no column 'text' (found: file_name, caption)"),
        (
            '{"filename": "a.png", "text": "x"}',
            "no column 'file_name' (found: filename, text): did you mean 'filename'?",
        ),
        ("{}", "line 2 has no column 'file_name' (found: none)"),
        ('{"file_name": "a.png", "text": ', "line 2 is no JSON"),
        ('["a.png", "x"]', "line 2 is no JSON (a list where an object is needed)"),
        ('{"file_name": "../a.png", "text": "x"}', "file_name '../a.png': give a path inside"),
        ('{"file_name": "b/../../a.png", "text": "x"}', "give a path inside"),
        ('{"file_name": "/etc/a.png", "text": "x"}', "give a path inside"),
        ('{"file_name": "", "text": "x"}', "has file_name ''"),
        ('{"file_name": "a\\u0000.png", "text": "x"}', "has file_name 'a\\x00.png': give the image's path"),
        ('{"file_name": "a.png", "text": ["x", 3]}', "has text ['x', 3]: give the caption as text, or a list of texts"),
        ('{"file_name": "a.png", "text": {"en": "x"}}', "has text {'en': 'x'}"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, said):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n' + line + "\n")
    assert said in user_error(load, str(tmp_path))


def test_a_list_of_captions_is_accepted(tmp_path):
    some = rows(4)
    some[0]["text"], some[1]["text"] = ["red apple", "green pear", None, " "], []
    write(tmp_path, some)
    result = metadata(tmp_path / "metadata.jsonl")
    assert captions(result) == [["red apple", "green pear"], ["red apple"], ["red apple"]]
    assert result.bad == [("001.png", "empty caption")]


def test_csv_without_the_column_is_named(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,txt\na.png,x\n")
    assert "line 2 has no column 'text' (found: file_name, txt): did you mean 'txt'?" in user_error(load, str(tmp_path))


def test_folder_mistakes_are_one_line(tmp_path):
    assert "which is no folder" in user_error(load, str(tmp_path / "none"))
    assert "no metadata.jsonl or metadata.csv" in user_error(load, str(tmp_path))
    (tmp_path / "metadata.jsonl").write_bytes(b'{"file_name": "\xff"}')
    assert "save it as UTF-8" in user_error(load, str(tmp_path))
    write(tmp_path, rows(1))
    assert "names 1 images with a caption" in user_error(load, str(tmp_path))


def test_too_many_empty_captions_stop_at_load_and_few_are_reported(tmp_path):
    some = rows(30)
    some[7]["text"], some[9]["text"] = "  ", None
    write(tmp_path, some)
    said = user_error(build, tmp_path)
    assert "007.png (empty caption), 009.png (empty caption)" in said
    data = build(tmp_path, max_bad_share=0.1)
    assert data.bad == [("007.png", "empty caption"), ("009.png", "empty caption")]
    assert len(data.train) + len(data.evals["val"]) == 28


def make(folder, *names):
    """Empty files, and folders with usable metadata for names that end in a slash."""
    for name in names:
        if name.endswith("/"):
            write(folder / name, rows(4))
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).touch()
    return str(folder)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["0001.tar.gz"], "it holds 0001.tar.gz"),
        (["data/train-0.parquet", "x.parquet"], "it holds data, x.parquet"),
        (["1.jpg", "2.jpg", "3.jpg", "4.jpg"], "it holds 1.jpg, 2.jpg, 3.jpg ..."),
        (["metadata.json"], "it holds metadata.json"),
        (["validation/"], "it holds validation"),
    ],
)
def test_a_folder_without_metadata_is_told_what_it_is_and_what_is_accepted(tmp_path, names, said):
    line = user_error(load, make(tmp_path / "data", *names))
    assert f"no metadata.jsonl or metadata.csv in it or in its train/ ({said})" in line
    assert "accepted are 'demo' and a folder of images" in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x.zip", "a file"),
        ("x", "a file"),
        ("nowhere/", "it does not exist"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_source_that_is_no_folder_is_told_what_it_is_and_what_is_accepted(tmp_path, name, said):
    if not name.endswith("/") and len(name) < 300:
        make(tmp_path, name)
    line = user_error(load, str(tmp_path / name))
    assert f"({said})" in line and "accepted are 'demo' and a folder of images" in line


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["./", "train/"], "has metadata.jsonl and train/metadata.jsonl: keep one"),
        (["./", "validation/"], "has metadata.jsonl and validation/metadata.jsonl: keep one"),
        (["train/", "validation/", "val/"], "has train/metadata.jsonl and validation/metadata.jsonl and val/metadata"),
        (["./", "metadata.csv"], "has both metadata.jsonl and metadata.csv: keep one of them"),
        (["train/", "train/metadata.csv"], "has both metadata.jsonl and metadata.csv"),
        (["train/", "val/", "val/metadata.csv"], "has both metadata.jsonl and metadata.csv"),
        (["metadata.jsonl/x"], "metadata.jsonl is no file that can be read"),
    ],
)
def test_metadata_that_could_be_meant_twice_is_refused(tmp_path, names, said):
    assert said in user_error(load, make(tmp_path, *names))


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train/", "validation/"], []),
        (["train/", "val/"], []),
        (["train/", "validation/", "test/"], ["test is not used: training takes train/, validation validation/"]),
        (["train/", "val/", "test/x.png"], ["test is not used: training takes train/, validation val/"]),
        (["train/", "validation/x.png"], ["validation is not used: training takes train/, validation a share of that"]),
        (["./", "test/"], ["test is not used: training takes the folder around it, validation a share of that"]),
        (["train/", "valid/", "test/"], ["test is not used", "valid is not used"]),
    ],
)
def test_folders_that_are_not_used_get_a_line(tmp_path, names, said):
    notices = build(make(tmp_path, *names)).notices
    assert len(notices) == len(said)
    assert all(words in notice for words, notice in zip(said, notices, strict=True))


def test_a_folder_whose_images_the_metadata_names_is_used(tmp_path):
    write(tmp_path, [{"file_name": f"test/{k}.png", "text": "red"} for k in range(4)], images=False)
    make(tmp_path, "test/x.png")
    assert load_folder(str(tmp_path), [], DataConfig()).notices == []


def test_metadata_that_a_symlink_brings_in_is_refused_unless_allowed(tmp_path):
    write(tmp_path / "outside", rows(4))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "outside")
    said = user_error(load, str(tmp_path / "data"))
    assert said.endswith("is a symlink out of the data folder: data.follow_symlinks=true allows it")
    assert len(build(tmp_path / "data", follow_symlinks=True).train) == 3


def test_file_names_are_told_apart_by_where_they_lead(tmp_path):
    write(tmp_path, [{"file_name": name, "text": "red"} for name in ("a.png", "./a.png", "b/../a.png", "b.png")], False)
    result = metadata(tmp_path / "metadata.jsonl")
    assert (names(result), captions(result)) == (["a.png", "b.png"], [["red"] * 3, ["red"]])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metadata.csv", "file_name,text\na.png,a cat, asleep\n", "line 2 has 3 cells and the first line 2"),
        ("metadata.csv", "file_name,text,text\na.png,x,y\n", "has the column 'text' twice: keep one"),
        ("metadata.csv", "file_name,text\na.png\n", "line 2 has 1 cells and the first line 2"),
        (
            "metadata.jsonl",
            '{"file_name": "a.png", "text": "x", "text": "y"}',
            "line 1 is no JSON (has 'text' twice",
        ),
        ("metadata.jsonl", "[" * 100_000, "line 1 is no JSON"),
        ("metadata.jsonl", '{"file_name": ' + "1" * 5000 + "}", "line 1 is no JSON"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "\\ud800"}', "line 1 is no Unicode"),
        ("metadata.jsonl", '{"file_name": "\\ud800.png", "text": "x"}', "line 1 is no Unicode"),
    ],
)
def test_odd_lines_are_named(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    assert said in user_error(load, str(tmp_path))


def test_captions_of_unknown_tokens_are_counted(tmp_path):
    some = rows(30)
    for k in (3, 4, 5):
        some[k]["text"] = "\u4e2d\u6587 red"
    some[6]["text"] = "\u4e2d red apple"  # mostly known
    write(tmp_path, some)
    (line,) = build(tmp_path).notices
    assert line.startswith("3 of 30 captions looked at are mostly tokens that data.tokenizer = 'builtin' does not know")
    assert "the first of 003.png" in line


def test_of_many_captions_a_sample_is_looked_at(tmp_path, monkeypatch):
    monkeypatch.setattr("ds_cmli.data.oddities.LOOKED_AT", 10)
    write(tmp_path, rows(400, "\u4e2d"))
    (line,) = build(tmp_path).notices
    assert line.startswith("20 of 20 captions looked at")


@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv"])
def test_columns_that_are_not_read_are_named(tmp_path, name):
    write(tmp_path, rows(4))
    if name == "metadata.csv":
        (tmp_path / "metadata.jsonl").unlink()
        (tmp_path / name).write_text(
            "file_name,text,wrong,negatives\n" + "".join(f"00{k}.png,a,b,c\n" for k in range(4))
        )
    else:
        some = [{**row, "wrong": 1} for row in rows(4)]
        some[2]["negatives"] = ["a"]
        write(tmp_path, some)
    assert build(tmp_path).summary[0].endswith(", none left out, not read: the columns wrong, negatives")
