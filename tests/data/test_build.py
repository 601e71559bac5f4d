import os
import shutil

import pytest

from ds_cmli.config.presets import load_preset
from ds_cmli.data.build import build_eval_data
from ds_cmli.data.held_out import evaluation_data, hold_out
from ds_cmli.data.opening import expand, split_weights
from ds_cmli.errors import UserError
from tests import make


def config(**settings):
    return load_preset("tiny", {"data": settings}).data


def sizes(**settings):
    opened = make.data(**settings)
    return len(opened.train), {name: len(split) for name, split in opened.evals.items()}


@pytest.mark.parametrize(
    ("pattern", "files"),
    [("{00..02}", "00 01 02"), ("{a,b}{1,2}", "a1 a2 b1 b2"), ("[ab]1", "a1 b1"), ("0?", "00 01 02"), ("01", "01")],
)
def test_patterns(tmp_path, pattern, files):
    for name in ("00", "01", "02", "a1", "a2", "b1", "b2"):
        (tmp_path / f"{name}.tar").touch()
    assert [file.stem for file in expand(f"{tmp_path}/{pattern}.tar")] == files.split()


def test_missing_files_are_named_with_the_nearest(tmp_path):
    (tmp_path / "shard-00.tar").touch()
    with pytest.raises(UserError, match=r"2 of 3 files do not exist, the first .*shard-01\.tar"):
        expand(f"{tmp_path}/shard-{{00..02}}.tar")
    with pytest.raises(UserError, match=r"did you mean .*shard-00\.tar"):
        expand(f"{tmp_path}/shard-0.tar")
    with pytest.raises(UserError, match="nouser"):
        expand("~nouser/x.csv")


def test_weights_belong_to_all_sources_or_none():
    assert split_weights("a") == (["a"], None)
    assert split_weights(["a::0.7", "b:: 3"]) == (["a", "b"], [0.7, 3.0])
    for sources in (["a::1"], ["a::1", "b"], ["a::0", "b::1"], ["a::x", "b::1"], ["a", "a"], ["demo", "a"]):
        with pytest.raises(UserError, match="--data is "):
            split_weights(sources)


def test_a_share_is_held_out_by_name_whatever_the_order(tmp_path):
    make.pairs(tmp_path / "a", 40)
    first = make.data(tmp_path / "a", held_out=8)
    lines = (tmp_path / "a/metadata.jsonl").read_text().splitlines()
    (tmp_path / "a/metadata.jsonl").write_text("\n".join(reversed(lines)))
    again = make.data(tmp_path / "a", seed=1, held_out=0.2)
    names, names_again = ({data.evals["val"].name(i) for i in range(8)} for data in (first, again))
    assert names == names_again
    assert not names & {first.train.images.name(i) for i in range(32)}
    assert sizes(source=str(tmp_path / "a")) == (38, {"val": 2})
    with pytest.raises(UserError, match="leaves none to train on"):
        hold_out("a", first.train.images.sources[0][0], 40)


def test_parts_of_the_source_and_other_data_are_evaluated_on(tmp_path):
    make.pairs(tmp_path / "a/train", 12)
    make.pairs(tmp_path / "a/validation", 5)
    a = str(tmp_path / "a")
    b = make.pairs(tmp_path / "b", 7)
    assert sizes(source=a) == (12, {"val": 5})
    assert sizes(source=b, val_source=a) == (7, {"val": 5})
    assert sizes(source=[a, b], held_out=3) == (16, {"val": 8})
    with pytest.raises(UserError, match="has no test part, but train, validation"):
        build_eval_data(config(source=a), 0, "test")
    assert len(build_eval_data(config(source=a), 0, "all")[0]["all"]) == 17
    assert len(build_eval_data(config(source=a), 0, "val")[0]["val"]) == 5
    shutil.copy(tmp_path / "a/train/metadata.jsonl", tmp_path / "a/train/metadata.csv")
    with pytest.raises(UserError, match="keep one for train"):
        make.data(a)


def test_evaluation_of_a_run_on_its_own_and_on_other_data(tmp_path, monkeypatch):
    make.pairs(tmp_path / "a", 20)
    make.pairs(tmp_path / "b", 7, column="german")
    run = config(source=str(tmp_path / "a"), held_out=4, image_root=str(tmp_path / "a"), image_key="file_name")
    assert len(build_eval_data(evaluation_data(run, str(tmp_path / "a")), 0, None)[0]["val"]) == 4
    other_data = evaluation_data(run, str(tmp_path / "b"))
    assert (other_data.image_root, other_data.image_key, other_data.val_source) == ("", "", str(tmp_path / "b"))
    with pytest.raises(UserError, match=r"german.*data\.caption_key"):
        build_eval_data(other_data, 0, None)
    monkeypatch.chdir(tmp_path / "b")
    assert evaluation_data(run, ".").image_root == ""


def test_kinds_are_found_by_what_a_folder_holds(tmp_path):
    make.pairs(tmp_path / "listed")
    make.parquet(tmp_path / "hub/data", 20)
    (tmp_path / "hub/README.md").write_text("a clone of the hub")
    (tmp_path / "tars").mkdir()
    make.tar(tmp_path / "tars/00000.tar")
    shutil.copy(next((tmp_path / "hub/data").iterdir()), tmp_path / "tars/00000.parquet")  # as img2dataset
    # As `hf download` fills a folder.
    shutil.copytree(tmp_path / "listed", tmp_path / "linked", copy_function=os.symlink)
    for name, kind in (("listed", "a folder"), ("hub", "parquet"), ("tars", "tar"), ("linked", "a folder")):
        opened = make.data(tmp_path / name, held_out=4)
        assert len(opened.train) in (16, 20) and kind in opened.summary[0]


def test_a_folder_of_no_kind_is_refused_the_nearest_guess_first(tmp_path):
    make.pictures(tmp_path, "images/1.jpg", "classes/cat/1.jpg")
    make.json_file(tmp_path / "other/x.bin", "")
    guesses = {"images": "metadata.csv", "classes": "by class", "other": "x.bin"}
    for name, guess in guesses.items():
        first, second = make.refused(make.data, tmp_path / name).split("; accepted are ")
        assert guess in first and name in first and "tars" in second


@pytest.mark.parametrize(("num_held_out", "is_told"), [(99, True), (100, False)])
def test_few_held_out_pictures_are_a_line(tmp_path, num_held_out, is_told):
    summary = make.data(make.pairs(tmp_path / "pairs", 110), held_out=num_held_out).summary
    line = "only 99 pictures are held out: recalls of fewer than 100 are mostly chance (data.held_out, data.val_source)"
    assert (line in summary) == is_told == any("are held out: recalls" in line for line in summary)
