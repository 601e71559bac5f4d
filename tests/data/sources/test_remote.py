"""Data by name: of a hub and of a plain server on this machine, with faults."""

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
from ds_cmli.data.sources import attempts, remote, urls
from ds_cmli.data.sources.find import expand, recognise
from tests.data.sources.samples import build, members, shown, tar
from tests.data.sources.servers import OWNER_NAME, serving
from tests.data.sources.test_arrow import parquet
from tests.data.sources.test_folder import user_error

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
    monkeypatch.setattr(urls, "BLOCK", 400)
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    pretrained._answers.cache_clear()
    with serving() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.url)
        template = f"{made.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        made.commit({**SHARDS, **OTHERS})
        made.files = {f"/{path}": content for path, content in {**SHARDS, **OTHERS}.items()}
        yield made


@pytest.fixture(params=["hub", "http"])
def named(request, server):
    """The same shards by a name of the hub and by URLs."""
    return HUB if request.param == "hub" else f"{server.url}/data/{{00000..00002}}.tar"


def contents(files):
    return {f"data/{file.name}": file.read_bytes() for file in files}


def fault(server, n, *faults):
    """Faults of a shard, on the hub and on the plain server."""
    server.faults[f"data/{n:05}.tar"] = list(faults)
    server.faults[f"/data/{n:05}.tar"] = list(faults)


def firsts(server, n):
    """The first byte of each request for a shard's content."""
    return [first for path, first in server.fetched() if path.strip("/") == f"data/{n:05}.tar"]


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
        ("URL/data/00001.tar", [1]),
        ("URL/data/", [0, 1, 2]),
        ("URL/data/*2.tar", [2]),
        ("URL/data/{00002,00000}.tar", [2, 0]),
    ],
)
def test_names_of_shards(server, name, numbers):
    kind, files = recognise(name.replace("URL", server.url))
    assert kind == "tars"
    assert [file.name for file in files] == [f"{n:05}.tar" for n in numbers]
    assert contents(files) == {path: SHARDS[path] for path in (f"data/{n:05}.tar" for n in numbers)}
    assert sorted(path.strip("/") for path, _ in server.fetched() if path.endswith(".tar") and _ == 0) == sorted(
        f"data/{n:05}.tar" for n in numbers
    )


def test_fetched_once_and_then_without_network(server, named, capsys):
    first = expand(named)
    assert "fetching 3 files of" in capsys.readouterr().out
    sent = len(server.fetched())
    assert expand(named) == first
    assert len(server.fetched()) == sent
    assert capsys.readouterr().out == ""
    server.shutdown()
    server.server_close()
    assert expand(named) == first
    assert "cannot be reached" in capsys.readouterr().out
    assert contents(first) == SHARDS


def test_cut_off_in_the_middle_goes_on_from_there(server, named):
    fault(server, 1, ("cut", 250))
    assert contents(expand(named)) == SHARDS
    assert firsts(server, 1) == ([0, 200] if named == HUB else [0, 0, 400, 800])


def test_a_part_of_a_former_start_is_gone_on_with(server, monkeypatch):
    name = f"{server.url}/data/00001.tar"
    fault(server, 1, ("bytes", SHARDS["data/00001.tar"]), *[("cut", 0)] * 3)
    assert "data/00001.tar cannot be fetched (ClientPayloadError" in user_error(expand, name)
    assert contents(expand(name)) == {"data/00001.tar": SHARDS["data/00001.tar"]}
    assert firsts(server, 1) == [0, 400, 400, 400, 400, 800]


def test_a_server_without_ranges(server):
    server.ranges = False
    fault(server, 2, ("cut", 500))
    files = expand(f"{server.url}/data/")
    assert contents(files) == SHARDS


def test_503_passes_or_is_one_line(server, named, tmp_path):
    fault(server, 0, 503)
    fault(server, 1, 500, 502)
    assert contents(expand(named)) == SHARDS
    for folder in ("hf", "cache"):
        shutil.rmtree(tmp_path / folder, ignore_errors=True)
    fault(server, 1, *[503] * 9)
    line = user_error(expand, named)
    assert "data/00001.tar cannot be fetched (HTTP 503): start again to go on with what is in" in line
    assert len(server.faults["data/00001.tar"]) == 6 or len(server.faults["/data/00001.tar"]) == 6
    fault(server, 1)
    assert contents(expand(named)) == SHARDS


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


def test_damage_in_the_cache_is_fetched_again(server, named, capsys):
    files = expand(named)
    sent = len(server.fetched())
    os.utime(files[0])
    assert expand(named) == files
    assert len(server.fetched()) == sent
    with open(files[1], "r+b") as file:
        file.write(b"damage")
    assert contents(expand(named)) == SHARDS
    assert "has changed since it was fetched" in capsys.readouterr().out
    os.remove(files[2])
    assert contents(expand(named)) == SHARDS


def test_another_size_on_the_server_is_named(server, capsys):
    name = f"{server.url}/data/"
    files = expand(name)
    server.files["/data/00001.tar"] = b"new" * 500
    server.files["/data/00003.tar"] = b"more"
    capsys.readouterr()
    result = contents(expand(name))
    assert result == {**SHARDS, "data/00003.tar": b"more"}
    said = capsys.readouterr().out
    assert f"{name}00001.tar has changed on its server (1,001 bytes then, 1,500 now)" in said
    os.remove(files[1])
    assert contents(expand(name))["data/00001.tar"] == b"new" * 500


def test_another_revision_of_the_hub_is_named(server, capsys):
    expand(HUB)
    before = server.branches["main"]
    now = server.commit({**SHARDS, "data/00001.tar": b"new" * 500})
    sent = len(server.fetched())
    assert contents(expand(HUB))["data/00001.tar"] == b"new" * 500
    assert f"{HUB} is at revision {now} now, it was at {before}" in capsys.readouterr().out
    assert len(server.fetched()) == sent + 1
    assert contents(expand(f"{HUB}@{before}")) == SHARDS


def test_a_small_disk_is_refused_first(server, named, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: usage(10, 0, 3002))
    line = user_error(expand, named)
    assert "0.00 GB are to be fetched to" in line
    assert f"set {'HF_HOME' if named == HUB else 'DS_CMLI_CACHE'} to a folder on a larger disk" in line
    assert not server.fetched()
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda path: usage(10, 0, 3003))
    assert contents(expand(named)) == SHARDS


@pytest.mark.parametrize("name", ["{00000..00002}.tar", "*.tar", "", "0000[0-2].tar"])
def test_urls_without_a_server(server, name):
    name = f"{server.url}/data/{name}"
    expand(name)
    for faults in ([503] * 9, None):
        server.faults["page"] = faults or []
        if faults is None:
            server.shutdown()
            server.server_close()
        assert contents(expand(name)) == SHARDS
    shutil.rmtree(remote.cache_folder())
    assert "it cannot be reached (Client" in user_error(expand, name)


def test_without_a_server_one_line_at_once(server, named, tmp_path):
    server.shutdown()
    server.server_close()
    began = time.monotonic()
    line = user_error(expand, named)
    assert time.monotonic() - began < 2
    assert "it cannot be reached" in line
    if named == HUB:
        assert f"run `hf download {OWNER_NAME} --repo-type dataset --revision main` where there is a network" in line
    else:
        folder = tmp_path / "cache" / "remote" / named.rpartition("/")[0].replace("://", "/")
        assert f"copy its files to {folder}, or give" in line
        folder.mkdir(parents=True)
        for path, content in SHARDS.items():
            (folder / Path(path).name).write_bytes(content)
        assert contents(expand(named)) == SHARDS
        os.remove(folder / "00001.tar")
        assert "does not have 1 of its files" in user_error(expand, named)


def test_a_fetch_that_was_broken_off_is_not_taken_for_the_whole_without_network(server, named):
    fault(server, 1, *[503] * 9)
    user_error(expand, named)
    server.shutdown()
    server.server_close()
    assert re.search("does not have [1-3] of its files", user_error(expand, named))


def test_copies_are_read_once_to_be_checked(server, named, monkeypatch):
    read = []
    whole = urls.checksums.of_file
    monkeypatch.setattr(urls.checksums, "of_file", lambda path: read.append(path) or whole(path))
    server.etags = named == HUB
    expand(named)
    shutil.rmtree(remote.cache_folder() / "remote" / "records")
    for _ in range(3):
        expand(named)
    assert len(read) == 6
    shutil.rmtree(remote.cache_folder() / "remote" / "records")
    server.shutdown()
    server.server_close()
    name = f"{HUB}@{server.branches['main']}" if named == HUB else named
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


def test_a_full_or_closed_disk_is_one_line(server, named, tmp_path, monkeypatch):
    folder = tmp_path / ("hf" if named == HUB else "cache/remote")
    home = "HF_HOME" if named == HUB else "DS_CMLI_CACHE"
    full = OSError(errno.ENOSPC, "No space left on device")

    def fetch(*_):
        raise full

    with monkeypatch.context() as patch:
        patch.setattr(remote.Hub if named == HUB else remote.Urls, "fetch", fetch)
        line = user_error(expand, named)
    assert f"it cannot be written to {folder} ([Errno 28] No space left on device): set {home} to another" in line
    if named == HUB:
        file = tmp_path / "file"
        file.touch()
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(file))
        assert f"it cannot be written to {file} ([Errno 17] File exists" in user_error(expand, named)


def test_a_page_with_links_that_are_no_files(server):
    server.files["/data/?C=N"] = b"sorted"
    server.files["/data/old/00009.tar"] = b"in another folder"
    server.files["/data/empty.tar"] = b""
    assert contents(expand(f"{server.url}/data/")) == {**SHARDS, "data/empty.tar": b""}


def test_a_page_cannot_lead_out_of_the_cache(server, tmp_path):
    server.files["/page/"] = b'<a href="a.tar"></a><a href="../../../../../stolen.tar"></a>'
    server.files["/page/a.tar"] = server.files["/stolen.tar"] = b"content"
    line = user_error(expand, f"{server.url}/page/")
    assert "/page/../../../../../stolen.tar has no size on its server" in line
    assert not list(tmp_path.rglob("stolen.tar"))


def test_a_file_that_changes_while_it_is_fetched(server):
    server.faults["/data/00001.tar"] = [("change", b"new" * 300)]
    line = user_error(expand, f"{server.url}/data/00001.tar")
    assert "data/00001.tar has changed on its server while it was fetched: start again" in line
    assert contents(expand(f"{server.url}/data/00001.tar")) == {"data/00001.tar": b"new" * 300}


def test_two_names_of_the_same_files_at_once(server):
    fault(server, 1, ("wait", 0.3))
    results = []
    names = (f"{server.url}/data/", f"{server.url}/data/*.tar", f"{server.url}/data/{{00000..00002}}.tar")
    threads = [threading.Thread(target=lambda name=name: results.append(expand(name))) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [contents(files) for files in results] == [SHARDS] * 3
    assert firsts(server, 1) == [0, 400, 800]


def test_names_in_mixtures_and_as_validation_data(server, tmp_path):
    made = {f"/{n}.tar": tar(tmp_path / "t.tar", members(range(20 * n, 20 * n + 20))).read_bytes() for n in range(2)}
    server.files = made
    server.commit({"0.tar": made["/0.tar"]})
    tar(tmp_path / "near.tar", members(range(60, 80)))
    mixed = build([f"{HUB}::0.5", f"{tmp_path}/near.tar::0.5"], val_source=f"{server.url}/1.tar")
    assert len(mixed.train) == 40 and len(mixed.evals["val"]) == 20
    line = user_error(lambda: build(HUB, val_source=f"{server.url}/2.tar"))
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
            "or of none: accepted by a URL, which ends in / for a folder, are",
        ),
        (f"{HUB}/data/00000*", "names files of several kinds"),
        ("URL/data/{00001..00004}.tar", "2 of 4 files do not exist, the first"),
        ("URL/data/9*.tar", "no file matches it"),
        ("URL/nothing/", "its server refuses it (FileNotFoundError"),
        ("URL/data/x.tar?token=secret", "with a user, a password or a query"),
        ("http://me:secret@localhost/x.tar", "with a user, a password or a query"),
        ("URL/data/../x.tar", "leave '.' and '..' out"),
        ("file:///data/x.tar", "a local file: give its path"),
        ("nonsense://data/x.tar", "Protocol not known: nonsense"),
        ("gs://bucket/x.tar", "install gcsfs"),
    ],
)
def test_what_cannot_be_fetched_is_refused_in_one_line(server, name, said):
    line = user_error(expand, name.replace("URL", server.url))
    assert said in line
    assert "secret" not in line and "\n" not in line
    assert not server.fetched()


def test_s3_needs_its_library(server, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    assert "pip install 'ds-cmli[remote]'" in user_error(expand, "s3://bucket/x.tar")


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("s3://bucket/data/0000?.tar", [0, 1, 2]),
        ("s3://bucket/data/{00001..00002}.tar", [1, 2]),
        ("s3://bucket/data", [0, 1, 2]),
        ("s3://bucket/data/", [0, 1, 2]),
        ("s3://bucket/data/00001.tar", [1]),
    ],
)
def test_shards_in_s3(server, monkeypatch, name, numbers):
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    keys = {"AWS_ENDPOINT_URL": server.url, "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret"}
    for key, value in {**keys, "AWS_DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(key, value)
    server.files = {f"/bucket{path}": content for path, content in server.files.items()}
    server.faults["/bucket/data/00001.tar"] = [("cut", 100)]
    assert contents(expand(name)) == {path: SHARDS[path] for path in (f"data/{n:05}.tar" for n in numbers)}
    server.shutdown()
    server.server_close()
    assert len(expand(name)) == len(numbers)


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


def test_progress_is_printed_now_and_then(server, named, monkeypatch, capsys):
    monkeypatch.setattr(remote, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(remote, "TELL_SECONDS", 0.1)
    fault(server, 1, ("wait", 0.3))
    expand(named)
    assert re.search(r"fetched 0\.00 GB of 3 files of .*, 0\.00 GB, at 0\.0 MB/s", capsys.readouterr().out)


def test_those_that_wait_take_the_result_or_the_error(server, named):
    fault(server, 1, ("wait", 0.5))
    results = []
    threads = [threading.Thread(target=lambda: results.append(expand(named))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1] == results[2]
    assert firsts(server, 0) in ([0], [0, 400, 800])


def test_data_of_a_name_is_data_of_its_copies(server, tmp_path):
    made = {f"/{n}.tar": tar(tmp_path / "t.tar", members(range(20 * n, 20 * n + 20))).read_bytes() for n in range(2)}
    server.files = made
    far = build(f"{server.url}/{{0..1}}.tar", held_out=0.1)
    for path, content in made.items():
        (tmp_path / path[1:]).write_bytes(content)
    near = build(tmp_path / "{0..1}.tar", held_out=0.1)
    assert list(far.fingerprint.values()) == list(near.fingerprint.values())
    assert [shown(far.train[k]) for k in range(36)] == [shown(near.train[k]) for k in range(36)]
