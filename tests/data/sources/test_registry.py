import pytest

from ds_cmli.config.registry import SOURCES, load
from ds_cmli.data.sources.find import expand, recognise, weighted
from tests.data.sources.samples import build, members, picture, rows, tar, user_error, write


def make(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_every_kind_has_a_function_that_opens_it():
    assert all(callable(load(SOURCES[kind])) for kind in SOURCES)


@pytest.mark.parametrize(
    ("files", "name", "kind", "count"),
    [
        (["metadata.jsonl", "a.tar"], "", "folder", 0),
        (["train/metadata.csv"], "", "folder", 0),
        (["1.jpg"], "", "folder", 0),
        (["0.tar", "1.TAR", "0_stats.json", "0.parquet", "1.parquet"], "", "tars", 2),
        (["0.tar", "1.tar"], "1.tar", "tars", 1),
        (["00.tar", "01.tar", "02.tar"], "{00..01}.tar", "tars", 2),
        (["a0.tar", "a1.tar", "b0.tar"], "{a,b}{0..0}.tar", "tars", 2),
        (["a0.tar", "a1.tar", "b0.tar"], "a*.tar", "tars", 2),
        (["pairs.csv"], "pairs.csv", "csv", 1),
        (["pairs.tsv"], "pairs.tsv", "csv", 1),
        (["dataset_coco.json"], "dataset_coco.json", "json", 1),
        (["0.parquet", "1.parquet"], "", "parquet", 2),
        (["data/0.parquet"], "data/*.parquet", "parquet", 1),
        (["dataset_dict.json", "train/state.json"], "", "saved", 0),
        (["state.json", "data-0.arrow"], "", "saved", 0),
        ([], "nowhere", "folder", 0),
        ([], "x" * 300, "folder", 0),
        (["x.zip"], "x.zip", "folder", 0),
    ],
)
def test_a_source_is_recognised_by_what_it_is(tmp_path, files, name, kind, count):
    make(tmp_path, *files)
    entry, paths = recognise(f"{tmp_path}/{name}" if name else str(tmp_path))
    assert (entry, len(paths)) == (kind, count)


@pytest.mark.parametrize(
    ("files", "name", "said"),
    [
        (["0.tar", "other.parquet"], "", "which could be meant as uncompressed WebDataset tars"),
        (["0.tar", "1.csv"], "*", "which names files of several kinds, or of none: accepted are 'demo'"),
        (["0.tar"], "{0..3}.tar", "3 of 4 files do not exist, the first"),
        ([], "*.tar", "no file matches it"),
        ([], "{0..999999}.tar", "more than 100,000 files"),
    ],
)
def test_what_could_be_meant_twice_or_is_not_there_is_refused(tmp_path, files, name, said):
    make(tmp_path, *files)
    assert said in user_error(recognise, f"{tmp_path}/{name}" if name else str(tmp_path))


def test_the_line_for_what_is_nothing_lists_all_that_is_accepted(tmp_path):
    (tmp_path / "x.zip").touch()
    said = user_error(build, tmp_path / "x.zip")
    assert "(a file)" in said and all(entry.what in said for entry in SOURCES.values())
    assert "a command: download what it gives first" in user_error(recognise, "pipe:cat x.tar")


def test_ranges_are_expanded_as_a_shell_does(tmp_path):
    make(tmp_path, *(f"{k:02}.tar" for k in range(8, 12)), "8.tar", "9.tar", "10.tar")
    assert [p.name for p in expand(f"{tmp_path}/{{08..11}}.tar")] == ["08.tar", "09.tar", "10.tar", "11.tar"]
    assert [p.name for p in expand(f"{tmp_path}/{{8..10}}.tar")] == ["8.tar", "9.tar", "10.tar"]


def test_weights_come_behind_two_colons():
    assert weighted("a") == (["a"], None)
    assert weighted(["a::0.7", "b::3"]) == (["a", "b"], [0.7, 3.0])
    assert weighted(["a", "b"]) == (["a", "b"], None)


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        (["a::0.7", "b"], "gives 1 of 2 sources a weight: give all one, or none"),
        (["a::x", "b::1"], "is 'a::x': write WHAT::WEIGHT with a number above 0"),
        (["a::0", "b::1"], "above 0"), (["a::-1", "b::1"], "above 0"), (["a::nan", "b::1"], "above 0"),
        (["a::inf", "b::1"], "above 0"),
        (["a::1", "a::2"], "names 'a' twice"),
        ("a::0.5", "the only source: leave its weight out"),
        (["demo", "a"], "the demo stands alone"),
    ],
)  # fmt: skip
def test_weights_that_say_nothing_are_refused(sources, said):
    assert said in user_error(weighted, sources)


def test_a_setting_that_no_source_reads_is_refused(tmp_path):
    write(tmp_path, rows(4))
    said = user_error(lambda: build(tmp_path, separator=","))
    assert said == "data.separator is ',': no source here reads it, only csv"
    assert "it says nothing of the demo" in user_error(lambda: build("demo", image_root="x"))


def test_validation_data_may_be_given(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    shards = [tar(tmp_path / name / "0.tar", members(range(k, k + 10))) for k, name in enumerate("ab")]
    data = build(shards[0], val_source=str(shards[1]))
    assert (len(data.train), len(data.evals["val"])) == (10, 10)
    assert data.evals["val"].pictures.sources[0].image(9) == picture(10)
    said = user_error(lambda: build(shards[0], val_source=str(tmp_path / "x")))
    assert said.startswith("data.val_source is ")
