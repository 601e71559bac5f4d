"""What is no file by any name that a start reads: one line at once, and nothing waits for it."""

import os
import shutil
import signal
import socket

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import read
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.opening import open_sources
from ds_cmli.data.sources.find import expand
from ds_cmli.data.sources.patterns import MOST_FILES
from ds_cmli.data.tokens import builtin_tokenizer, load_tokenizer
from ds_cmli.models.weights import WeightsSource, weights_file

ENDINGS = ("csv", "tsv", "json", "tar", "parquet")


@pytest.fixture(autouse=True)
def limit():
    """Ends a test that waits, as `open` of a pipe does."""

    def late(number, frame):
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path):
    os.mkfifo(path)


def device(path):
    path.symlink_to("/dev/zero")


def unix_socket(path):
    before = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has at most 107 bytes
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


MAKERS = (pipe, device, unix_socket)


@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.parametrize("ending", ENDINGS)
def test_a_source_that_is_no_file(make, ending, tmp_path):
    name = tmp_path / f"a.{ending}"
    make(name)
    for source in (str(name), str(tmp_path), str(tmp_path / f"*.{ending}"), str(tmp_path / f"{{a,b}}.{ending}")):
        words = r"no regular file|do not exist|no folder|no metadata"
        with pytest.raises(UserError, match=words) as error:
            open_sources(DataConfig(source=source))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("make", MAKERS)
def test_a_part_of_a_source_that_is_no_file(make, tmp_path):
    for name in ("metadata.jsonl", "metadata.csv", "train/metadata.csv", "dataset_dict.json", "dataset_info.json"):
        folder = tmp_path / name.replace("/", "-")
        (folder / name).parent.mkdir(parents=True)
        make(folder / name)
        with pytest.raises(UserError, match=r"data.source is|no file that can be read") as error:
            open_sources(DataConfig(source=str(folder)))
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_whose_name_ends_like_a_file(ending, tmp_path):
    (tmp_path / "data" / f"a.{ending}").mkdir(parents=True)
    for source in (tmp_path / "data", tmp_path / "data" / f"a.{ending}"):
        with pytest.raises(UserError, match=r"a folder with no metadata.jsonl"):
            open_sources(DataConfig(source=str(source)))


@pytest.mark.parametrize("make", MAKERS)
def test_weights_tokenizers_and_json_that_are_no_files(make, tmp_path):
    for name in ("w.safetensors", "w.pth", "folder/model.safetensors", "folder2/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make(tmp_path / name)
        given = tmp_path / name.partition("/")[0]
        with pytest.raises(UserError, match=r"student.image_weights is .*: .* is no regular file"):
            weights_file(WeightsSource("student.image_weights", str(given), False), "a file")
    builtin_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json", "another"):
        folder = tmp_path / f"with-{name}"
        shutil.copytree(tmp_path / "tokenizer", folder)
        (folder / name).unlink(missing_ok=True)
        make(folder / name)
        with pytest.raises(UserError, match=f"data.tokenizer is .*{name}' is no regular file"):
            load_tokenizer(str(folder), 16)
    make(tmp_path / "config.json")
    with pytest.raises(ValueError, match="no regular file"):
        read(tmp_path / "config.json", dict)


def test_braces_name_a_limited_number_of_files():
    for pattern in ("{0..9999}{0..9999}.tar", "{0..99999999}.tar", "{a,b}" * 60 + ".tar", "{0..9}" * 10 + ".csv"):
        with pytest.raises(UserError, match=f"more than {MOST_FILES:,} files"):
            expand(pattern)
    with pytest.raises(UserError, match="10000 of 10000 files do not exist"):
        expand("/nowhere/{0000..9999}.tar")
    with pytest.raises(UserError, match="1 of 1 files do not exist"):
        expand("/nowhere/{" + "9" * 5000 + "..1}.tar")
    with pytest.raises(UserError, match=r"6 of 6 files do not exist, the first '/nowhere/a2.tar'"):
        expand("/nowhere/{a,b}{2..0}.tar")
