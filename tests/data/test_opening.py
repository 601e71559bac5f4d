import os
import shutil

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.load import build_eval_data
from ds_cmli.data.opening import evaluation_data
from tests.data.sources.samples import build, coco, members, picture, rows, tar, user_error, write


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))


def csv(folder, name, ks, prefix="images/"):
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for k in ks:
        (folder / "images" / f"{k}.png").write_bytes(picture(k))
    lines = ["filepath,title", *(f"{prefix}{k}.png,red apple {k}" for k in ks)]
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


def pictures(data):
    """The files that are trained on and those that are evaluated on, by their real paths."""
    train = {source._path(i).resolve() for part in data.train.pictures.sources for source, i in located(part)}
    held = {source._path(i).resolve() for part in data.evals["val"].pictures.sources for source, i in located(part)}
    return train, held


def located(part):
    for i in range(len(part)):
        source, index = part, i
        while hasattr(source, "indices"):
            source, index = source.source, int(source.indices[index])
        yield source, index


def alias(folder, way):
    """A second source that shares pictures with `a.csv` of 0..99."""
    if way == "two lists of one folder":
        return csv(folder, "b.csv", range(50, 250))
    if way == "the same file":
        (folder / "b.csv").symlink_to("a.csv")
        return folder / "b.csv"
    if way == "another spelling":
        return f"{folder}/./a.csv"
    if way == "a folder that is a symlink":
        (folder / "other").symlink_to(".")
        return csv(folder / "other", "b.csv", range(50, 250))
    (folder / "links").mkdir()
    for k in range(50, 100):
        (folder / "links" / f"x{k}.png").symlink_to(f"../images/{k}.png")
    lines = ["filepath,title", *(f"links/x{k}.png,green pear {k}" for k in range(50, 100))]
    (folder / "b.csv").write_text("\n".join(lines) + "\n")
    return folder / "b.csv"


WAYS = ["two lists of one folder", "the same file", "another spelling", "a folder that is a symlink", "symlinks"]


@pytest.mark.parametrize("way", WAYS)
def test_what_one_source_holds_out_another_does_not_train_on(tmp_path, way):
    first = csv(tmp_path, "a.csv", range(100))
    data = build([str(first), str(alias(tmp_path, way))])
    train, held = pictures(data)
    assert not train & held
    assert len(train | held) == (250 if way.endswith(("of one folder", "that is a symlink")) else 100)
    assert any("are in another source too" in line for line in data.notices)
    # The same picture has one number, whichever source it comes from: it is no negative of itself.
    ids = {data.train.pictures.image_id(index) for index in range(len(data.train))}
    assert len(ids) == len(train)


def test_two_names_of_a_picture_in_one_source_fall_on_the_same_side(tmp_path):
    csv(tmp_path, "a.csv", range(100))
    lines = ["filepath,title"]
    for k in range(100):
        (tmp_path / "images" / f"other{k}.png").symlink_to(f"{k}.png")
        lines += [f"images/{k}.png,red apple", f"images/other{k}.png,red apple"]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    data = build(tmp_path / "a.csv")
    train, held = pictures(data)
    assert not train & held and len(train) > 80
    (line,) = data.notices
    assert line.endswith("are held out under another name too: not trained on")


def test_shards_that_two_sources_share_are_held_out_of_both(tmp_path):
    for shard in range(4):
        tar(tmp_path / f"{shard}.tar", members(range(20 * shard, 20 * shard + 20)))
    data = build([f"{tmp_path}/{{0..2}}.tar", f"{tmp_path}/{{1..3}}.tar"])
    train, held = ([pairs.pictures.image_id(k) for k in range(len(pairs.pictures))]
                   for pairs in (data.train, data.evals["val"]))  # fmt: skip
    assert len(set(train)) + len(set(held)) == 80 and len(train) + len(held) > 100


def test_validation_data_of_the_training_pictures_is_told(tmp_path):
    first = csv(tmp_path, "a.csv", range(100))
    second = csv(tmp_path, "b.csv", range(90, 110))
    data = build(first, val_source=str(second))
    assert data.notices == [
        f"10 of 20 pictures of {second} are trained on and evaluated on: their results say nothing of others"
    ]
    assert len(data.train) == 100 and len(data.evals["val"]) == 20
    assert build(first, val_source=str(csv(tmp_path, "c.csv", range(200, 210)))).notices == []


def test_a_line_for_each_source_counts_it(tmp_path):
    some = rows(40) + rows(40, "green pear")
    some[3]["text"] = None
    write(tmp_path / "a", some)
    tar(tmp_path / "b.tar", members(range(20)))
    data = build([f"{tmp_path}/a::3", f"{tmp_path}/b.tar::1"], max_bad_share=0.5)
    assert data.summary == [
        f"data: {tmp_path}/a: 38 pictures with 75 captions to train on, 2 pictures with 4 captions held out, 0.754 of "
        "an epoch, 1 left out, the first: 003.png (empty caption)",
        f"data: {tmp_path}/b.tar: 19 pictures with 19 captions to train on, 1 pictures with 1 captions held out, 0.246 "
        "of an epoch, none left out",
    ]
    result = build(coco(tmp_path), val_source=str(tmp_path / "a"), max_bad_share=0.5)
    assert result.summary[0].endswith("4 pictures with 10 captions to train on, none left out")
    assert result.summary[1].startswith(f"data: {tmp_path}/a: 40 pictures with 79 captions to evaluate on, 1 left out")


def test_a_share_of_nothing_is_told(tmp_path):
    names = [csv(tmp_path / name, "a.csv", range(100)) for name in "ab"]
    data = build([f"{names[0]}::0.002", f"{names[1]}::1"])
    assert data.mixture.shares == [1, 189]
    assert data.notices == [f"{names[0]}::0.002 asks for less than half a picture of the 190 of an epoch: it gets one"]
    assert build([f"{name}::1e308" for name in names]).mixture.shares == [95, 95]


@pytest.mark.parametrize("kind", ["csv", "tar", "coco"])
def test_a_caption_of_unusual_length_is_told(tmp_path, kind):
    long = "red apple " * 1200
    if kind == "csv":
        path = csv(tmp_path, "a.csv", range(10))
        path.write_text(path.read_text().replace("red apple 4", long))
    elif kind == "tar":
        some = [(n, long.encode() if n == "000004.txt" else c) for n, c in members(range(10))]
        path = tar(tmp_path / "a.tar", some)
    else:
        path = coco(tmp_path)
        path.write_text(path.read_text().replace("red apple 4", long))
    (line,) = (line for line in build(path).notices if "characters" in line)
    length = 11_999 if kind == "tar" else 12_000
    assert f"1 captions of {path}" in line or "1 captions of " in line
    assert f"have more than 1,024 characters, the longest {length:,}, of " in line
    assert build(path, context_length=2048).notices == []


def mark(path, **settings):
    return build(path, **settings).fingerprint[str(path)]


@pytest.mark.parametrize("kind", ["folder", "csv", "coco", "evaluated on"])
def test_pictures_that_are_replaced_or_deleted_between_two_starts_are_noticed(tmp_path, kind):
    if kind == "folder":
        write(tmp_path / "a", rows(10))
        path, image = tmp_path / "a", tmp_path / "a" / "003.png"
    elif kind == "coco":
        path, image = coco(tmp_path, count=40), tmp_path / "train2017" / "000000000002.png"
    else:
        path, image = csv(tmp_path, "a.csv", range(10)), tmp_path / "images" / "3.png"
    settings = {"val_source": str(path)} if kind == "evaluated on" else {}
    source = csv(tmp_path / "other", "b.csv", range(10)) if settings else path
    before = mark(source, **settings)
    content = image.read_bytes()
    image.write_bytes(content + b"more")
    replaced = mark(source, **settings)
    image.unlink()
    deleted = mark(source, **settings)
    image.write_bytes(content)
    assert mark(source, **settings) == before
    if settings:
        before, replaced, deleted = (entry["evaluated_on"] for entry in (before, replaced, deleted))
    assert (replaced["bytes"] - before["bytes"], replaced["missing"]) == (4, 0)
    assert replaced["sizes"] != before["sizes"] != deleted["sizes"]
    assert deleted["missing"] == 1


def test_a_shard_of_the_same_size_with_other_members_is_noticed(tmp_path):
    path = tar(tmp_path / "a.tar", members(range(10)))
    before, size = mark(path), path.stat().st_size
    tar(path, members(range(10), "green pears {k}"))
    assert path.stat().st_size == size
    assert mark(path) != before


def test_a_copy_of_the_data_is_the_same(tmp_path):
    path = csv(tmp_path / "a", "a.csv", range(10))
    before = mark(path)
    shutil.copytree(tmp_path / "a", tmp_path / "b")  # with other dates
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "a")
    assert mark(path) == before


def test_a_source_of_which_nothing_is_left_is_refused(tmp_path):
    first = csv(tmp_path, "a.csv", range(100))
    held = pictures(build(first))[1]
    second = csv(tmp_path, "b.csv", [int(path.stem) for path in held][:2])
    assert f"{second} has no picture left" in user_error(build, [str(first), str(second)])


def evaluated(run, name, split=None):
    """The pictures that `evaluate --data NAME` takes of a run with these settings, and its lines."""
    data = evaluation_data(DataConfig(image_size=8, tokenizer="builtin", **run), str(name))
    data.val_source = "" if split else data.val_source
    result = build_eval_data(data, 0, split)
    (pairs,) = result.evals.values()
    return len(pairs.pictures), [*result.summary, *result.notices]


def of_kind(kind, folder):
    """80 pictures in a source of a kind."""
    if kind == "csv":
        return csv(folder, "a.csv", range(80))
    if kind == "tar":
        return tar(folder / "a.tar", members(range(80)))
    if kind == "coco":
        return coco(folder, count=80)
    write(folder, rows(80))
    return folder


@pytest.mark.parametrize("kind", ["csv", "tar", "coco", "folder"])
def test_data_given_to_an_evaluation_is_evaluated_whole_unless_a_share_is_asked_for(tmp_path, kind):
    new = of_kind(kind, tmp_path / "new")
    other = of_kind("csv", tmp_path / "other")
    run = {"source": str(other), "caption_key": "title", "held_out": 0.5}
    count, (line,) = evaluated(run, new)
    assert count == 80 and f"80 pictures with {200 if kind == 'coco' else 80} captions to evaluate on" in line
    assert evaluated(run, new, "val")[0] == 4 and evaluated(run, new, "all")[0] == 80
    # Of the run's own data it is what training has held out, however the name is written.
    own = {"source": [str(new), str(other)]}
    for name in (new, f"{new.parent}/./{new.name}", os.path.relpath(new)):
        count, (line,) = evaluated(own, name)
        assert count == 4 and "held out of training to evaluate on" in line
    assert evaluated({"source": str(other), "val_source": str(new)}, new)[0] == 80
    assert evaluated({"source": str(new), "val_source": str(other)}, new)[0] == 80


def test_what_is_not_evaluated_of_data_with_parts_is_told(tmp_path):
    for part, count in (("train", 12), ("validation", 7)):
        write(tmp_path / "new" / part, rows(count))
    count, (_, line) = evaluated({"source": "demo"}, tmp_path / "new")
    assert count == 7 and line == f"the training part of {tmp_path / 'new'} is not evaluated"
    need = "data.image_root is '/': no source here reads it"
    for split in (None, "all"):
        data = evaluation_data(DataConfig(image_size=8, tokenizer="builtin"), str(tmp_path / "new"))
        data.image_root, data.val_source = "/", "" if split else data.val_source
        with pytest.raises(UserError, match=need):
            build_eval_data(data, 0, split)


@pytest.mark.parametrize(("held_out", "count"), [(None, 5), (0.2, 20), (0.001, 1), (1, 1), (30, 30), (99, 99)])
def test_the_held_out_share_is_a_setting(tmp_path, held_out, count):
    name = csv(tmp_path, "a.csv", range(100))
    data = build(name, held_out=held_out)
    assert (len(data.train), len(data.evals["val"])) == (100 - count, count)


def test_a_held_out_share_that_cannot_be_is_refused_or_told(tmp_path):
    name = csv(tmp_path, "a.csv", range(10))
    for held_out in (10, 11, 0.96):
        assert "leaves none of the 10 pictures of" in user_error(lambda share=held_out: build(name, held_out=share))
    assert "data.held_out is 1.5" in user_error(lambda: build(name, held_out=1.5))
    (line, _) = build(name, val_source=str(name), held_out=3).notices
    assert line == "data.held_out has no effect: validation has data of its own"
