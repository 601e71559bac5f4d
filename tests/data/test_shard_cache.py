"""Copies of remote shards: fetched once a node, again after failures, in a bounded folder."""

import errno
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from ds_cmli.data import network, shard_cache
from ds_cmli.data.shard_cache import LostShard, Shard, ShardCache, fetched_bytes, serve, start_fetching
from ds_cmli.data.sources.tar_index import read_footer
from ds_cmli.errors import UserError
from profiling.speed import storage_server
from tests import make

SIZE = 10_240  # bytes of a tar of two samples


@pytest.fixture(autouse=True)
def own_folder_and_no_pauses(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path))
    monkeypatch.setattr(network, "FIRST_PAUSE", 0.001)


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "bucket"
    folder.mkdir()
    for number in range(8):
        make.tar(folder / f"{number}.tar", 2, first=number)
    (folder / "6.tar").write_bytes(b"x" * SIZE)  # damaged
    with storage_server.http(folder) as server:
        yield server


def shards(server, *numbers: int) -> list[Shard]:
    return [Shard(f"{server.url}/{number}.tar", SIZE) for number in numbers]


def contents(server, *numbers: int) -> list[bytes]:
    return [(server.folder / f"{number}.tar").read_bytes() for number in numbers]


@contextmanager
def fetching(num_shards: int = 8):
    """Return a cache of so many shards, for which a thread fetches as the fetching process does."""
    cache = ShardCache(num_shards * SIZE)
    end = threading.Event()
    with cache.lock():
        thread = threading.Thread(target=serve, args=(cache, end.is_set))
        thread.start()
        try:
            yield cache
        finally:
            end.set()
            thread.join()


def test_many_readers_get_a_shard_that_is_fetched_once_with_its_index(server):
    with fetching() as cache, ThreadPoolExecutor(6) as readers:
        paths = list(readers.map(ShardCache(cache.max_bytes).get, shards(server, 1, 2, 1, 1, 2, 1)))
    assert [path.read_bytes() for path in paths] == contents(server, 1, 2, 1, 1, 2, 1)
    assert server.fetched == {"1.tar": 1, "2.tar": 1}
    assert read_footer(paths[0].with_suffix(".rows")).num_samples == 2
    assert not list(cache.requests.iterdir())


def test_what_does_not_exist_or_is_damaged_is_lost_and_not_tried_again(server):
    with fetching() as cache:
        for _ in range(2):
            with pytest.raises(LostShard, match="no such file"):
                cache.get(*shards(server, 9))
            with pytest.raises(LostShard, match="no whole, uncompressed tar"):
                cache.get(*shards(server, 6))
    assert server.fetched == {"6.tar": 1}
    assert fetched_bytes() == 0


def test_what_cannot_be_fetched_is_a_users_mistake_that_a_later_start_tries_again(server, monkeypatch):
    monkeypatch.setattr(shard_cache, "RETRY_SECONDS", 0.3)
    server.is_gone = True
    with fetching() as cache:
        with pytest.raises(UserError, match=rf"^{server.url}/1\.tar cannot be fetched \([2-9] tries\): Server"):
            cache.get(*shards(server, 1))
        server.is_gone = False
        with pytest.raises(UserError, match="it has 10,240 bytes and not 999"):  # it was replaced since the start
            cache.get(Shard(f"{server.url}/2.tar", 999))
        monkeypatch.setattr(shard_cache, "FORGET_SECONDS", 0)
        assert cache.get(*shards(server, 1)).exists()


def test_the_folder_is_bounded_and_keeps_what_is_in_use(server):
    with fetching(3) as cache:
        for number in (0, 1, 2):
            cache.get(*shards(server, number))
        old = time.time() - 2 * shard_cache.IN_USE_SECONDS
        os.utime(cache.path(*shards(server, 1)), (old, old))
        cache.want(shards(server, 0, 2))
        cache.want(shards(server, 3))  # in the place of the copy that is not in use
        time.sleep(0.3)
        cache.want(shards(server, 4))  # all copies are in use
        time.sleep(0.3)
        assert [cache.path(shard).exists() for shard in shards(server, *range(5))] == [True, False, True, True, False]
        assert len(list(cache.folder.glob("*.rows"))) == 3
        for number in (4, 5, 0, 7):  # a reader waits
            assert cache.get(*shards(server, number)).exists()
            assert fetched_bytes() <= 3 * SIZE


def test_a_full_disk_is_one_line_and_leaves_no_part(monkeypatch):
    def fill_disk(storage, path, file, **options):
        Path(file).write_bytes(b"part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MemoryFileSystem, "get_file", fill_disk)
    with fetching() as cache, pytest.raises(UserError, match=r"shards is full: free some space, lower data\.cache_gb"):
        cache.get(Shard("memory://bucket/1.tar", None))
    assert fetched_bytes() == 0


def read_and_wait(url, copies):
    """Act as a rank that is killed while it trains."""
    cache = ShardCache(10**6)
    start_fetching(10**6)
    copies.put(cache.get(Shard(url, None)))
    time.sleep(100)


def test_the_fetching_process_ends_with_its_rank_and_forgets_what_a_killed_one_left(server):
    cache = ShardCache(SIZE)
    (cache.folder / "x.part").touch()
    (cache.requests / "x.failed").touch()
    processes = multiprocessing.get_context("fork")
    copies = processes.Queue()
    rank = processes.Process(target=read_and_wait, args=(f"{server.url}/3.tar", copies))
    rank.start()
    assert [copies.get().read_bytes()] == contents(server, 3)
    assert sorted(file.suffix for file in cache.folder.iterdir()) == ["", ".lock", ".rows", ".tar"]
    assert not list(cache.requests.iterdir())
    with pytest.raises(TimeoutError):
        cache.lock().acquire(timeout=0)
    rank.kill()
    cache.lock().acquire(timeout=3)
