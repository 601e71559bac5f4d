"""The index of tars: equal to what `tarfile` reads, made once by all ranks, kept shard by shard."""

import io
import os
import random
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from ds_cmli.data.sources import tar_index
from ds_cmli.data.sources.tar_index import group_samples, index_shards, read_by_tarfile, scan
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
    by_headers = num_refused = 0
    for number in range(200):
        path = tmp_path / f"{number}.tar"
        random_tar(path, chance)
        expected = outcome(lambda path: group_samples(list(read_by_tarfile(path))), path)
        assert outcome(scan, path) == expected, number
        num_refused += expected == "refused"
        by_headers += tar_index.read_headers(path) is not None
    assert num_refused > 20 and by_headers > 40  # both ways were taken


def test_an_index_is_made_once_and_again_when_it_is_damaged_or_a_shard_changes(tmp_path, monkeypatch):
    path = shard(tmp_path / "0.tar", [("a.jpg", b"a"), ("a.txt", b"one")])
    scanned = []
    monkeypatch.setattr(tar_index, "scan", lambda shard: scanned.append(shard) or scan(shard))
    contents = [Tars([path]).captions(0) for _ in range(2)]
    assert contents == [["one"]] * 2 and len(scanned) == 1
    (index,) = (tmp_path / "cache/tar-index").glob("*.index")
    (joined,) = (tmp_path / "cache/tar-index").glob("*.joined")
    index.write_bytes(index.read_bytes()[:-1])
    joined.write_bytes(b"")
    assert Tars([path]).captions(0) == ["one"] and len(scanned) == 2
    content = bytearray(index.read_bytes())
    content[0] ^= 1
    index.write_bytes(content)
    joined.unlink()
    assert Tars([path]).captions(0) == ["one"] and len(scanned) == 3
    shard(path, [("b.jpg", b"new"), ("b.txt", b"two")])
    os.utime(path, (1, 1))
    assert Tars([path]).captions(0) == ["two"] and len(scanned) == 4


def test_a_start_reads_footers_alone_and_maps_one_file(tmp_path):
    paths = [shard(tmp_path / f"{n}.tar", [("0.jpg", b"%d" % n), ("0.txt", b"t")]) for n in range(5)]
    Tars(paths)
    for index in (tmp_path / "cache/tar-index").glob("*.index"):
        content = index.read_bytes()
        index.write_bytes(bytes(24) + content[24:])  # rows that a start must not need
    source = Tars(paths)
    maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(tmp_path) in line]
    assert [source.image(n) for n in range(5)] == [b"0", b"1", b"2", b"3", b"4"]
    assert len(maps) == 1


def test_without_one_array_for_all_shards_the_rows_of_open_ones_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr("ds_cmli.data.sources.tars.MAX_FULL", 1)
    monkeypatch.setattr("ds_cmli.data.sources.tars.MAX_OPEN", 2)
    paths = [make.tar(tmp_path / f"{n}.tar", 3, first=3 * n) for n in range(4)]
    source = Tars([tmp_path / path for path in paths])
    assert source.joined_rows is None
    for n in np.random.default_rng(0).permutation(12).tolist() * 2:
        assert source.captions(n) == [f"a blue circle {n}"] and source.image(n) == make.png(n)
    assert len(source.open) == len(source.open_rows) == 2


def test_shards_that_were_indexed_before_a_stop_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_index, "NUM_THREADS", 1)
    paths = [shard(tmp_path / f"{n}.tar", [("0.jpg", b"J"), ("0.txt", b"t")]) for n in range(6)]
    paths[4].write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"4\.tar is no whole, uncompressed tar"):
        Tars(paths)
    assert len(list((tmp_path / "cache/tar-index").glob("*.index"))) >= 4


def test_progress_is_a_line_and_heartbeats_come(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tar_index, "SECONDS_OF_LINE", 0.0)
    monkeypatch.setattr(tar_index, "SECONDS_OF_WAITING", 0.02)
    monkeypatch.setattr(tar_index, "NUM_THREADS", 2)
    monkeypatch.setattr(tar_index, "scan", lambda path: time.sleep(0.05) or scan(path))
    paths = [shard(tmp_path / f"{n}.tar", [("0.jpg", b"J"), ("0.txt", b"t")]) for n in range(8)]
    beats = []
    Tars(paths, heartbeat=lambda: beats.append(1))
    assert len(beats) > 4
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
    for n in range(12):
        shard(tmp_path / f"{n:02}.tar", [("0.jpg", b"J"), ("0.txt", b"t")])
    results = ranks.run(scanned_by_rank, 2, tmp_path)
    names = [set(scanned) for scanned, _ in results]
    assert names[0] | names[1] == {f"{n:02}.tar" for n in range(12)}
    assert all(len(scanned) >= 3 for scanned in names) and len(names[0] & names[1]) <= 2
    assert all(sizes == [1] * 12 for _, sizes in results)
