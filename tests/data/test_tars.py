import io
import json
import os
import tarfile

import numpy as np
import pytest

from ds_cmli.common import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data import sources
from ds_cmli.data.sources import MOST_OPEN, Tars, open_tars


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))


def shard(path, members, form=tarfile.PAX_FORMAT):
    """A tar of members: (name, content), or (name, target, type of link)."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, content, *link in members:
            member = tarfile.TarInfo(name)
            if link:
                member.type, member.linkname = link[0], content
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def samples(*shards, key=""):
    source = Tars(list(shards), key)
    return [(source.image(i), source.captions(i)) for i in range(len(source))]


PAIR = [("a/0.jpg", b"J0"), ("a/0.txt", b"zero "), ("b/0.PNG", b"P0"), ("b/0.json", b'{"caption": ["one", "two"]}')]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_one_name_are_a_sample(tmp_path, form):
    expected = [(b"J0", ["zero"]), (b"P0", ["one", "two"])]
    assert samples(shard(tmp_path / "0.tar", PAIR, form)) == expected
    mixed = shard(
        tmp_path / "1.tar", [PAIR[1], PAIR[3], PAIR[2], ("x/readme.md", b"-"), ("y.jpg", b"alone"), PAIR[0]], form
    )
    assert samples(mixed) == expected  # in the order of their first members


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_and_links(tmp_path, form):
    long = "x" * 150
    members = [
        (f"{long}.jpg", b"J"),
        (f"{long}.txt", b"T"),
        ("1.txt", b"one"),
        ("s/1.txt", "../1.txt", tarfile.SYMTYPE),
    ]
    members += [("1.jpg", f"{long}.jpg", tarfile.LNKTYPE), ("s/1.jpg", "../1.jpg", tarfile.SYMTYPE), ("2.jpg", b"")]
    members += [("2.txt", b"two"), ("3.jpg", "none.jpg", tarfile.SYMTYPE), ("3.txt", b"three")]
    assert samples(shard(tmp_path / "0.tar", members, form))[:2] == [(b"J", ["T"]), (b"J", ["one"])]


def test_a_caption_is_a_key_of_the_json(tmp_path):
    content = json.dumps({"text": "usual", "alt": "other", "none": None}).encode()
    path = shard(tmp_path / "0.tar", [("0.jpg", b"J"), ("0.json", content), ("0.txt", b"plain")])
    assert samples(path) == [(b"J", ["plain"])]
    assert samples(path, key="alt") == [(b"J", ["other"])]
    with pytest.raises(ValueError, match="none"):
        Tars([path], "none").captions(0)


def test_the_index_is_made_once_and_again_when_a_shard_changes(tmp_path, monkeypatch):
    path, scanned = shard(tmp_path / "0.tar", PAIR), []
    scan = sources.scan
    monkeypatch.setattr(sources, "scan", lambda shard: scanned.append(shard) or scan(shard))
    assert samples(path) == samples(path)
    assert len(scanned) == 1
    (cached,) = (tmp_path / "cache/tar-index").glob("*.rows")
    content = bytearray(cached.read_bytes())
    content[-40] ^= 1
    cached.write_bytes(content)
    assert samples(path)[0] == (b"J0", ["zero"])
    assert len(scanned) == 2
    shard(path, [("0.jpg", b"new"), ("0.txt", b"new")])
    os.utime(path, (1, 1))
    assert samples(path) == [(b"new", ["new"])]


def test_more_shards_than_a_process_may_open(tmp_path):
    count = MOST_OPEN + 3
    paths = [shard(tmp_path / f"{i}.tar", [("0.jpg", b"%d" % i), ("0.txt", b"t")]) for i in range(count)]
    before = len(os.listdir("/proc/self/fd"))
    source = Tars(paths)
    assert len(os.listdir("/proc/self/fd")) == before  # no index keeps its file open
    order = np.random.default_rng(0).permutation(count).tolist() * 2
    assert [source.image(i) for i in order] == [b"%d" % i for i in order]
    assert len(source.open) == MOST_OPEN
    assert source.name(2) == "2.tar/0.jpg"


DAMAGES = {
    "cut in a member": lambda content: content[:700],
    "cut behind a member": lambda content: content[:2048],
    "a damaged header": lambda content: content[:1030] + b"\xff" * 100 + content[1130:],
    "two tars joined": lambda content: content + content,
    "empty": lambda _: b"",
    "no tar": lambda _: b"x" * 2000,
    "compressed": lambda content: b"\x1f\x8b" + content,
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_tar_is_an_error_that_names_it(tmp_path, damage):
    path = shard(tmp_path / "7.tar", PAIR)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=r"7\.tar is no whole, uncompressed tar"):
        Tars([path])


def test_samples_without_image_or_caption_are_left_out_and_counted(tmp_path):
    path = shard(tmp_path / "0.tar", [*PAIR, ("c.jpg", b"J"), ("d.txt", b"D"), ("e.jpg", b"J"), ("e.txt", b"")])
    source = open_tars([path], DataConfig())["train"]
    assert (len(source), source.left_out) == (2, 3)
    with pytest.raises(UserError, match=r"1\.tar holds no sample"):
        open_tars([shard(tmp_path / "1.tar", [("0.jpg", b"J"), ("1.txt", b"T")])], DataConfig())
