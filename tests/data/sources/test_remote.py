"""Data by name: of a hub on this machine, with faults."""

import errno
import hashlib
import os
import re
import shutil
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest

from ds_cmli.common import pretrained
from ds_cmli.data.sources import attempts, hub, remote
from ds_cmli.data.sources.find import expand, recognise
from tests.data.sources.samples import build, members, parquet, shown, tar, user_error
from tests.data.sources.servers import OWNER_NAME, serving

HUB = f"hf://datasets/{OWNER_NAME}"
SHARDS = {f"data/{n:05}.tar": bytes([n]) * (1000 + n) for n in range(3)}
OTHERS = {"README.md": b"apples", "data/00000.parquet": b"companion", "data/00000_stats.json": b"{}"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server with three shards, caches that are empty, and no waiting between attempts."""
    from huggingface_hub import constants

    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(attempts, "WAITS", (0.0, 0.0))
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    pretrained._answers.cache_clear()
    with serving() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        template = f"{made.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        made.commit({**SHARDS, **OTHERS})
        yield made


def contents(files):
    return {f"data/{file.name}": file.read_bytes() for file in files}


def fault(server, n, *faults):
    """Faults of a shard."""
    server.faults[f"data/{n:05}.tar"] = list(faults)


def firsts(server, n):
    """The first byte of each request for a shard's content."""
    return [first for path, first in server.fetched() if path == f"data/{n:05}.tar"]


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        (HUB, [0, 1, 2]),
        (f"{HUB}@main", [0, 1, 2]),
        (f"{HUB}/data", [0, 1, 2]),
        (f"{HUB}/data/", [0, 1, 2]),
        (f"{HUB}/data/00001.tar", [1]),
        (f"{HUB}/data/*1.tar", [1]),
        (f"{HUB}/data/{{00001..00002}}.tar", [1, 2]),
        (f"{HUB}/data/{{00002,00000}}.tar", [2, 0]),
    ],
)
def test_names_of_shards(server, name, numbers):
    kind, files = recognise(name)
    assert kind == "tars"
    assert [file.name for file in files] == [f"{n:05}.tar" for n in numbers]
    assert contents(files) == {path: SHARDS[path] for path in (f"data/{n:05}.tar" for n in numbers)}
    assert sorted(path for path, first in server.fetched() if path.endswith(".tar") and first == 0) == sorted(
        f"data/{n:05}.tar" for n in numbers
    )


def test_fetched_once_and_then_without_network(server, capsys):
    first = expand(HUB)
    assert "fetching 3 files of" in capsys.readouterr().out
    sent = len(server.fetched())
    assert expand(HUB) == first
    assert len(server.fetched()) == sent
    assert capsys.readouterr().out == ""
    server.shutdown()
    server.server_close()
    assert expand(HUB) == first
    assert "cannot be reached" in capsys.readouterr().out
    assert contents(first) == SHARDS


def test_cut_off_in_the_middle_goes_on_from_there(server):
    fault(server, 1, ("cut", 250))
    assert contents(expand(HUB)) == SHARDS
    assert firsts(server, 1) == [0, 200]


def test_503_passes_or_is_one_line(server, tmp_path):
    fault(server, 0, 503)
    fault(server, 1, 500, 502)
    assert contents(expand(HUB)) == SHARDS
    for folder in ("hf", "cache"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    fault(server, 1, *[503] * 9)
    line = user_error(expand, HUB)
    assert "data/00001.tar cannot be fetched (HTTP 503): start again to go on with what is in" in line
    assert len(server.faults["data/00001.tar"]) == 6
    fault(server, 1)
    assert contents(expand(HUB)) == SHARDS


def test_a_wrong_checksum_is_fetched_again_then_refused(server, capsys):
    wrong = ("bytes", b"x" * 1001)
    fault(server, 1, wrong)
    assert contents(expand(HUB)) == SHARDS
    assert "data/00001.tar has come with another checksum than the hub's" in capsys.readouterr().out
    shutil.rmtree(remote.cache_folder())
    server.commit({"00001.tar": b"y" * 1001, **SHARDS})
    server.faults["00001.tar"] = [wrong, wrong]
    assert "00001.tar came twice with the checksum" in user_error(expand, HUB)
    assert len(expand(HUB)) == 4


def test_damage_in_the_cache_is_fetched_again(server, capsys):
    files = expand(HUB)
    sent = len(server.fetched())
    os.utime(files[0])
    assert expand(HUB) == files
    assert len(server.fetched()) == sent
    with open(files[1], "r+b") as file:
        file.write(b"damage")
    assert contents(expand(HUB)) == SHARDS
    assert "has changed since it was fetched" in capsys.readouterr().out
    os.remove(files[2])
    assert contents(expand(HUB)) == SHARDS


def test_another_revision_of_the_hub_is_named(server, capsys):
    expand(HUB)
    before = server.branches["main"]
    now = server.commit({**SHARDS, "data/00001.tar": b"new" * 500})
    sent = len(server.fetched())
    assert contents(expand(HUB))["data/00001.tar"] == b"new" * 500
    assert f"{HUB} is at revision {now} now, it was at {before}" in capsys.readouterr().out
    assert len(server.fetched()) == sent + 1
    assert contents(expand(f"{HUB}@{before}")) == SHARDS


def test_a_small_disk_is_refused_first(server, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: usage(10, 0, 3002))
    line = user_error(expand, HUB)
    assert "0.00 GB are to be fetched to" in line
    assert "set HF_HOME to a folder on a larger disk" in line
    assert not server.fetched()
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: usage(10, 0, 3003))
    assert contents(expand(HUB)) == SHARDS


def test_without_a_server_one_line_at_once(server, tmp_path):
    server.shutdown()
    server.server_close()
    began = time.monotonic()
    line = user_error(expand, HUB)
    assert time.monotonic() - began < 2
    assert "it cannot be reached" in line
    assert f"run `hf download {OWNER_NAME} --repo-type dataset --revision main` where there is a network" in line


def test_a_fetch_that_was_broken_off_is_not_taken_for_the_whole_without_network(server):
    fault(server, 1, *[503] * 9)
    user_error(expand, HUB)
    server.shutdown()
    server.server_close()
    assert re.search("does not have [1-3] of its files", user_error(expand, HUB))


def test_copies_are_read_once_to_be_checked(server, monkeypatch):
    read = []
    whole = hub.checksums.of_file
    monkeypatch.setattr(hub.checksums, "of_file", lambda path: read.append(path) or whole(path))
    expand(HUB)
    shutil.rmtree(remote.cache_folder() / "remote" / "records")
    for _ in range(3):
        expand(HUB)
    assert len(read) == 6
    shutil.rmtree(remote.cache_folder() / "remote" / "records")
    server.shutdown()
    server.server_close()
    name = f"{HUB}@{server.branches['main']}"
    for _ in range(3):
        expand(name)
    assert len(read) == 9


def test_parts_of_processes_that_were_killed_are_removed(server):
    blobs = Path(remote.Hub(HUB).of_repo) / "blobs"
    blobs.mkdir(parents=True)
    digest = hashlib.sha256(SHARDS["data/00001.tar"]).hexdigest()
    old, new = (blobs / f"{digest}.{name}.incomplete" for name in ("0badc0de", "12345678"))
    for part in (old, new):
        part.write_bytes(b"part")
    os.utime(old, (time.time() - 3600,) * 2)
    assert contents(expand(HUB)) == SHARDS
    assert new.exists() and not old.exists()


def test_what_another_program_fetched_from_the_hub_is_used(server, capsys):
    from huggingface_hub import constants, snapshot_download

    snapshot_download(OWNER_NAME, repo_type="dataset", endpoint=server.url, cache_dir=constants.HF_HUB_CACHE)
    sent = len(server.fetched())
    assert contents(expand(HUB)) == SHARDS
    assert len(server.fetched()) == sent
    shutil.rmtree(remote.cache_folder())
    server.shutdown()
    server.server_close()
    assert contents(expand(HUB)) == SHARDS
    assert f"{HUB} cannot be reached" in capsys.readouterr().out


def test_the_advice_for_a_hub_without_network_helps_after_another_revision_was_fetched(server):
    from huggingface_hub import constants, snapshot_download

    expand(HUB)
    server.commit({**SHARDS, "data/00003.tar": b"more"})
    shutil.rmtree(constants.HF_HUB_CACHE)
    snapshot_download(OWNER_NAME, repo_type="dataset", endpoint=server.url, cache_dir=constants.HF_HUB_CACHE)
    server.shutdown()
    server.server_close()
    assert contents(expand(HUB)) == {**SHARDS, "data/00003.tar": b"more"}


def test_a_full_or_closed_disk_is_one_line(server, tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")

    def fetch(*_):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(remote.Hub, "fetch", fetch)
        line = user_error(expand, HUB)
    assert f"it cannot be written to {tmp_path / 'hf'} ([Errno 28] No space left on device): set HF_HOME to an" in line
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(file))
    assert f"it cannot be written to {file} ([Errno 17] File exists" in user_error(expand, HUB)


def test_names_in_mixtures_and_as_validation_data(server, tmp_path):
    server.commit(
        {f"{n}.tar": tar(tmp_path / "t.tar", members(range(20 * n, 20 * n + 20))).read_bytes() for n in range(2)}
    )
    tar(tmp_path / "near.tar", members(range(60, 80)))
    mixed = build([f"{HUB}/0.tar::0.5", f"{tmp_path}/near.tar::0.5"], val_source=f"{HUB}/1.tar")
    assert len(mixed.train) == 40 and len(mixed.evals["val"]) == 20
    line = user_error(lambda: build(f"{HUB}/0.tar", val_source=f"{HUB}/2.tar"))
    assert line.startswith("data.val_source is") and "1 of 1 files do not exist" in line


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("pipe:cat a.tar", "a command: download what it gives first"),
        ("hf://red/apples", "write hf://datasets/OWNER/NAME"),
        ("hf://datasets/red", "write hf://datasets/OWNER/NAME"),
        ("hf://datasets/blue/apples", "its server refuses it (HTTP 404): check the name"),
        (f"{HUB}@nowhere", "its server refuses it (HTTP 404)"),
        (f"{HUB}/data/{{00001..00004}}.tar", "2 of 4 files do not exist, the first 'data/00003.tar'"),
        (f"{HUB}/*.tar", "no file matches it"),
        (
            f"{HUB}/README.md",
            "or of none: accepted of the hub are",
        ),
        (f"{HUB}/data/00000*", "names files of several kinds"),
        ("https://example.org/{00001..00004}.tar", "4 of 4 files do not exist, the first"),
    ],
)
def test_what_cannot_be_fetched_is_refused_in_one_line(server, name, said):
    line = user_error(expand, name)
    assert said in line
    assert "\n" not in line
    assert not server.fetched()


@pytest.mark.slow  # the import of datasets
def test_parquet_of_the_hub(server, tmp_path, monkeypatch):
    monkeypatch.setattr(pytest.importorskip("datasets").config, "HF_DATASETS_CACHE", str(tmp_path / "arrow"))
    files = {}
    for part, ks in (("train", range(20)), ("validation", range(20, 24))):
        path = parquet(tmp_path / "x.parquet", ks)
        files[f"default/{part}-00000-of-00001.parquet"] = path.read_bytes()
    server.commit({**files, "README.md": b"apples"}, "refs/convert/parquet")
    name = f"{HUB}@refs/convert/parquet"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "datasets", None)
        assert "is read by the package datasets: pip install" in user_error(build, name)
    assert not server.fetched()
    data = build(name)  # its training and its validation part
    assert (len(data.train), len(data.evals["val"])) == (20, 4)
    assert shown(data.evals["val"][0]) == 20


def test_progress_is_printed_now_and_then(server, monkeypatch, capsys):
    monkeypatch.setattr(remote, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(remote, "TELL_SECONDS", 0.1)
    fault(server, 1, ("wait", 0.3))
    expand(HUB)
    assert re.search(r"fetched 0\.00 GB of 3 files of .*, 0\.00 GB, at 0\.0 MB/s", capsys.readouterr().out)


def test_those_that_wait_take_the_result_or_the_error(server):
    fault(server, 1, ("wait", 0.5))
    results = []
    threads = [threading.Thread(target=lambda: results.append(expand(HUB))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == results[2]
    assert firsts(server, 0) == [0]
