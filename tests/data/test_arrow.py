import io
import shutil

import datasets
import pytest
from datasets import Dataset, DatasetDict

from ds_cmli.common import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.build import open_hub
from ds_cmli.data.sources import open_parquet, open_saved
from tests.make import picture


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def stored(number):
    out = io.BytesIO()
    picture(number).save(out, "PNG")
    return out.getvalue()


def parquet(path, **columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    Dataset.from_dict(columns).to_parquet(path)
    return path


FILES = [{"bytes": stored(i), "path": f"{i}.png"} for i in range(3)]


@pytest.mark.parametrize("image", [FILES, [file["bytes"] for file in FILES]], ids=["files", "bytes"])
def test_a_caption_is_a_text_or_a_list_of_them(tmp_path, image):
    texts = {"a": ["NA", "2012", "None"], "b": [["x", "y"], ["z"], []]}
    for name, captions in texts.items():
        path = parquet(tmp_path / f"{name}.parquet", image=image, caption=captions, width=[1, 2, 3])
        source = open_parquet([path], DataConfig())["train"]
        assert [source.captions(i) for i in range(3)] == [c if isinstance(c, list) else [c] for c in captions]
        assert [source.image(i) for i in range(3)] == [stored(i) for i in range(3)]
        assert source.fingerprint() == {"images": 3, "columns": ["caption", "image", "width"]}


def test_files_are_split_by_their_names_and_images_may_be_features(tmp_path):
    rows = Dataset.from_dict({"image": FILES, "text": ["a", "b", "c"]}).cast_column("image", datasets.Image())
    files = []
    for name in ("train-0", "validation-0", "test_0", "other"):
        files.append(tmp_path / f"{name}.parquet")
        rows.to_parquet(files[-1])
    parts = open_parquet(files, DataConfig())
    assert {split: len(part) for split, part in parts.items()} == {"train": 6, "validation": 3, "test": 3}
    assert parts["test"].image(2) == stored(2)


def test_a_row_without_its_image_is_an_error_of_that_sample(tmp_path):
    path = parquet(tmp_path / "a.parquet", image=[*FILES[:2], {"bytes": None, "path": None}], text=["a", "b", "c"])
    source = open_parquet([path], DataConfig())["train"]
    assert source.image(1) == stored(1)
    with pytest.raises(ValueError, match="no image"):
        source.image(2)


def test_columns_are_found_or_named(tmp_path):
    path = parquet(tmp_path / "a.parquet", image=FILES, title=["a"] * 3, caption=["b"] * 3)
    with pytest.raises(UserError, match=r"title, caption.*data\.caption_key"):
        open_parquet([path], DataConfig())
    assert open_parquet([path], DataConfig(caption_key="caption"))["train"].captions(0) == ["b"]


def test_a_saved_data_set_or_several_splits(tmp_path):
    rows = Dataset.from_dict({"image": FILES, "text": ["a", "b", "c"]})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict({"train": rows, "val": rows.select([0]), "extra": rows}).save_to_disk(tmp_path / "several")
    assert {split: len(part) for split, part in open_saved([tmp_path / "one"], DataConfig()).items()} == {"train": 3}
    several = open_saved([tmp_path / "several"], DataConfig())
    assert {split: len(part) for split, part in several.items()} == {"train": 3, "validation": 1}


def test_nothing_in_the_users_cache_is_changed(tmp_path, monkeypatch):
    """Neither copies of parquet nor results of `.map()`, also with little space left."""
    path = parquet(tmp_path / "a.parquet", image=FILES, text=["a", "b", "c"])
    own = datasets.load_dataset("parquet", data_files={"train": [str(path)]})["train"]
    own.map(lambda row: {"text": row["text"] * 2}), own.map(lambda row: {"more": 1})
    before = {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.arrow")}
    assert len(before) == 3
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10))
    for _ in range(2):
        assert len(open_parquet([path], DataConfig())["train"]) == 3
    assert {file: file.read_bytes() for file in (tmp_path / "cache").rglob("*.arrow")} == before


def test_what_cannot_be_read_is_one_line_that_names_it(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (tmp_path / "7.parquet").write_bytes(b"PAR1 and no more")
    (tmp_path / "state.json").write_text("{}")
    for opening in (
        lambda: open_parquet([tmp_path / "7.parquet"], DataConfig()),
        lambda: open_saved([tmp_path], DataConfig()),
        lambda: open_hub("hf://datasets/no-such-owner/7@v1", DataConfig()),
    ):
        with pytest.raises(UserError, match=r"7|save_to_disk") as error:
            opening()
        assert "\n" not in str(error.value)
