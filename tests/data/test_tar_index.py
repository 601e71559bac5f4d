"""The index of tars: equal to what `tarfile` reads, made once by all ranks, kept shard by shard."""

import io
import os
import random
import tarfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

from ds_cmli.config.schema import DataConfig
from ds_cmli.data.shard_cache import opening_progress
from ds_cmli.data.sources import tar_index
from ds_cmli.data.sources.tar_index import group_samples, index_shards, read_members, scan
from ds_cmli.data.sources.tars import Tars
from ds_cmli.errors import UserError
from tests import make, ranks
from tests.make import shard

FORMATS = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))


def random_tar(path, chance):
    """Write a tar as libraries and people make them, half of the time damaged."""
    with tarfile.open(path, "w", format=chance.choice(FORMATS)) as archive:
        for number in range(chance.randrange(12)):
            stem = chance.choice(("", "a/", "./", "f" * 60 + "/", "g" * 120 + "/", "ü/")) + f"{number // 2:03}"
            for ending in chance.sample(("jpg", "json", "txt", "PNG", "cls", "seg.png"), chance.randrange(1, 5)):
                member = tarfile.TarInfo(f"{stem}.{ending}")
                member.mtime = chance.choice((0, 1700000000, 1700000000.25))
                content = chance.randbytes(chance.choice((0, 3, 512, 700, 9000, 20000)))
                member.size = len(content)
                if chance.random() < 0.04:
                    member.type = chance.choice((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE))
                    member.linkname = f"{number // 2:03}.jpg"
                    member.size = 0
                archive.addfile(member, io.BytesIO(content) if member.isreg() else None)
    if chance.random() < 0.5:
        content = bytearray(path.read_bytes())
        place = chance.randrange(len(content))
        damaged = content[:place] + chance.randbytes(8) + content[place + chance.choice((1, 8, 512)) :]
        content = chance.choice((content[:place], damaged, content + content))
        path.write_bytes(content)


def outcome(function, path):
    try:
        return function(path).tolist()
    except Exception as error:
        assert function is not scan or str(error).startswith(f"{path} is no whole, uncompressed tar")
        return "refused"


def test_headers_give_the_samples_that_tarfile_gives_on_random_and_damaged_tars(tmp_path):
    chance = random.Random(5)
    num_fast = num_refused = 0
    for number in range(200):
        path = tmp_path / f"{number}.tar"
        random_tar(path, chance)
        with mock.patch.object(tar_index, "FastHeader", tarfile.TarInfo):
            expected = outcome(lambda path: group_samples(list(read_members(path))), path)
        with mock.patch.object(tarfile.TarInfo, "frombuf", wraps=tarfile.TarInfo.frombuf) as slow_headers:
            assert outcome(scan, path) == expected, number
        num_refused += expected == "refused"
        num_fast += expected not in ("refused", []) and slow_headers.call_count == 1  # the tar's end
    assert num_refused > 20 and num_fast > 20  # both ways were taken


def tars(folder, count):
    """Write tars of one sample each, whose image is the tar's number."""
    return [shard(folder / f"{n:02}.tar", [("0.jpg", b"%d" % n), ("0.txt", b"t")]) for n in range(count)]


def cached(folder):
    return sorted((folder / "cache/tar-index").glob("*.index"))


def test_a_tar_without_its_ending_is_named_with_the_byte(tmp_path):
    path = Path(make.tar(tmp_path / "0.tar", 2))
    os.truncate(path, 4 * 1024)  # four members, each a header and a block
    line = make.refused(make.data, path)
    assert line.endswith("0.tar is no whole, uncompressed tar: ValueError: damaged or cut off at byte 4,096")


def test_an_index_is_made_once_and_again_when_it_is_damaged_or_a_shard_changes(tmp_path, monkeypatch):
    (path,) = tars(tmp_path, 1)
    scanned = []
    monkeypatch.setattr(tar_index, "scan", lambda shard: scanned.append(shard) or scan(shard))
    assert [Tars([path], DataConfig()).image(0) for _ in range(2)] == [b"0"] * 2 and len(scanned) == 1
    (index,) = cached(tmp_path)
    content = index.read_bytes()
    for damaged, num_scanned in ((content[:-1], 2), (bytes([content[0] ^ 1]) + content[1:], 3)):
        index.write_bytes(damaged)
        source = Tars([path], DataConfig())
        assert len(scanned) == 2  # a start reads footers alone, not the rows
        assert source.image(0) == b"0" and len(scanned) == num_scanned
    shard(path, [("b.jpg", b"new"), ("b.txt", b"two")])
    os.utime(path, (1, 1))
    assert Tars([path], DataConfig()).captions(0) == ["two"] and len(scanned) == 4


def test_few_shards_are_open_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("ds_cmli.data.sources.tars.MAX_OPEN", 2)
    num_open = len(os.listdir("/proc/self/fd"))
    source = Tars([Path(make.tar(tmp_path / f"{n}.tar", 3, first=3 * n)) for n in range(4)], DataConfig())
    for n in np.random.default_rng(0).permutation(12).tolist() * 2:
        assert source.captions(n) == [f"a blue circle {n}"] and source.image(n) == make.png(n)
    assert len(os.listdir("/proc/self/fd")) <= num_open + 2 * 2  # of a shard and of its index
    assert source.name(5) == "1.tar/0005.png"


def test_shards_that_were_indexed_before_a_stop_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "NUM_THREADS", 1)
    paths = tars(tmp_path, 6)
    paths[4].write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"4\.tar is no whole, uncompressed tar"):
        Tars(paths, DataConfig())
    assert len(cached(tmp_path)) >= 4


def test_indexing_prints_a_line_and_is_progress_while_a_single_tar_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tar_index, "SECONDS_OF_LINE", 0.0)
    monkeypatch.setattr(tar_index, "SECONDS_OF_WAITING", 0.02)
    monkeypatch.setattr(tar_index, "NUM_THREADS", 2)
    num_values = []  # of the progress, while a tar is read

    def slow_scan(path):
        values = set()
        for _ in range(5):
            values.add(opening_progress())
            time.sleep(0.1)
        num_values.append(len(values))
        return scan(path)

    monkeypatch.setattr(tar_index, "scan", slow_scan)
    Tars(tars(tmp_path, 8), DataConfig())
    assert min(num_values) > 2
    assert "of 8 tars, some" in capsys.readouterr().out


def scanned_by_rank(rank, world_size, folder):
    """Index the tars of a folder, and return the names of those that this rank scanned."""
    scanned = []

    def slow_scan(path):
        scanned.append(path.name)
        time.sleep(0.1)
        return scan(path)

    tar_index.scan = slow_scan
    tar_index.NUM_THREADS = 1
    indices = index_shards(sorted(folder.glob("*.tar")))
    return scanned, [index.num_samples for index in indices]


def test_all_ranks_make_missing_indices(tmp_path):
    paths = tars(tmp_path, 12)
    results = ranks.run(scanned_by_rank, 2, tmp_path)
    first, second = (set(scanned) for scanned, _ in results)
    assert first | second == {path.name for path in paths}
    assert min(len(first), len(second)) >= 3 and len(first & second) <= 2
    assert all(sizes == [1] * 12 for _, sizes in results)
