import io
import json
import os
import pickle
import random
import shutil
import tarfile

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config.schema import DataConfig
from ds_cmli.data.bad import Refused
from ds_cmli.data.sources import tar_index
from ds_cmli.data.sources.tar_members import scan
from ds_cmli.data.sources.tars import MOST_OPEN, Tars
from tests.data.sources.samples import build, members, picture, shown, tar


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))


def tars(*shards, **settings):
    return Tars("it", list(shards), DataConfig(**settings))


def read(source, k):
    return source.image(k), source.captions(k), source.name(k)


def test_samples_are_read_in_place_in_the_order_of_the_shards(tmp_path):
    for shard in range(3):
        tar(tmp_path / f"{shard:05}.tar", members(range(10 * shard, 10 * shard + 10)))
    source = tars(*sorted(tmp_path.glob("*.tar")))
    assert len(source) == 30 and source.bad == []
    for k in (0, 9, 10, 29):
        assert read(source, k) == (picture(k), [f"red apple {k}"], f"0000{k // 10}.tar/{k:06}.png")
    assert len({source.key(k) for k in range(30)}) == 30


def test_pairs_of_tars_train_and_hold_out(tmp_path):
    for shard in range(4):
        tar(tmp_path / f"{shard}.tar", members(range(10 * shard, 10 * shard + 10)))
    for name in (tmp_path, f"{tmp_path}/{{0..3}}.tar", f"{tmp_path}/*.tar"):
        data = build(name)
        assert (len(data.train), len(data.evals["val"])) == (38, 2)
        both = [shown(dataset[k]) for dataset in (data.train, data.evals["val"]) for k in range(len(dataset))]
        assert sorted(both) == list(range(40))


def test_unsorted_members_find_together_and_a_name_that_comes_again_is_another_sample(tmp_path):
    one, two = list(members([1])), list(members([2]))
    shard = tar(tmp_path / "a.tar", [one[1], two[0], one[0], two[2], two[1], *one[:2]])
    source = tars(shard)
    assert [source.captions(k)[0][-1] for k in range(3)] == ["1", "2", "1"]
    assert [source.image(k) for k in range(3)] == [picture(1), picture(2), picture(1)]


def test_captions_come_from_txt_or_json(tmp_path):
    image = picture(0)
    samples = [
        ("a.png", image), ("a.json", json.dumps({"caption": "from json", "alt": "other"}).encode()),
        ("b.PNG", image), ("b.txt", b"from txt\n"), ("b.json", json.dumps({"caption": "no", "alt": "mine"}).encode()),
        ("c.jpeg", image), ("c.json", json.dumps({"captions": ["one", " ", "two"]}).encode()),
        ("d/d.webp", image), ("d/d.txt", "\u00e9t\u00e9".encode()), ("d/d.cls", b"7"),
        ("README", b""), ("._a.png", b""),
    ]  # fmt: skip
    source = tars(tar(tmp_path / "a.tar", samples))
    assert [source.captions(k) for k in range(4)] == [["from json"], ["from txt"], ["one", "two"], ["\u00e9t\u00e9"]]
    other = tars(tmp_path / "a.tar", caption_key="alt")
    assert [other.captions(k) for k in range(2)] == [["other"], ["mine"]]
    with pytest.raises(Refused, match=r"no text under alt"):
        other.captions(2)
    with pytest.raises(Refused, match=r"no .json"):
        other.captions(3)


def test_halves_are_counted_and_named(tmp_path):
    some = [m for m in members(range(6)) if m[0] not in ("000001.png", "000002.txt", "000002.json")]
    some += [("x.png", b""), ("x.txt", b"empty image"), ("y.png", picture(0)), ("y.txt", b"")]
    source = tars(tar(tmp_path / "a.tar", some))
    assert len(source) == 4
    assert source.bad == [
        ("a.tar/000001", "no image"), ("a.tar/000002", "no caption (.txt or .json)"), ("a.tar/x", "empty image"),
        ("a.tar/y", "empty caption"),
    ]  # fmt: skip


def test_captions_that_cannot_be_read_are_bad_samples_with_a_stand_in(tmp_path):
    some = list(members(range(40)))
    for name, content in (("000004.txt", b"\xff\xfe\xff"), ("000005.txt", b" \n")):
        some[next(i for i, m in enumerate(some) if m[0] == name)] = (name, content)
    some = [m for m in some if m[0] != "000006.txt"]
    some[next(i for i, m in enumerate(some) if m[0] == "000006.json")] = ("000006.json", b'{"caption": ')
    data = build(tar(tmp_path / "a.tar", some), val_source=str(tar(tmp_path / "v" / "v.tar", members([9]))))
    samples = [data.train[k] for k in range(40)]
    assert [shown(s) for s in samples] == [*range(4), 7, 7, 7, *range(7, 40)]
    assert [s.bad for s in samples[4:7]] == [
        ("a.tar/000004.png", "its .txt is no UTF-8"), ("a.tar/000005.png", "empty caption"),
        ("a.tar/000006.png", "its .json is no JSON (Expecting value: line 1 column 13 (char 12))"),
    ]  # fmt: skip


def archive_of(path, *entries):
    """A shard of (name, type, content or target) entries."""
    with tarfile.open(path, "w") as archive:
        for name, kind, content in entries:
            info = tarfile.TarInfo(name)
            info.type = kind
            if kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):
                info.linkname, content = content, b""
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def test_hard_links_are_read_and_every_other_member_is_counted_and_named(tmp_path):
    file, link, symlink, pipe = tarfile.REGTYPE, tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.FIFOTYPE
    shard = archive_of(
        tmp_path / "a.tar",
        ("folder.jpg", tarfile.DIRTYPE, b""),
        ("a.png", file, picture(1)), ("a.txt", file, b"red apple"), ("a.json", symlink, "x.json"),
        ("b.png", link, "a.png"), ("b.txt", link, "a.txt"), ("c.PNG", link, "b.png"), ("c.txt", file, b"a pear"),
        ("d.png", symlink, "a.png"), ("d.txt", file, b"d"), ("e.png", link, "none.png"), ("e.txt", file, b"e"),
        ("f.png", file, picture(1)), ("f.txt", pipe, b""), ("g.1.png", file, picture(1)), ("g.1.txt", file, b"g"),
        ("h.cls", file, b"7"), ("README", file, b"x"), ("._a.png", file, b"x"), ("i.cls", symlink, "h.cls"),
    )  # fmt: skip
    source = tars(shard)
    assert [source.captions(k) for k in range(len(source))] == [["red apple"], ["red apple"], ["a pear"]]
    assert {source.image(k) for k in range(3)} == {picture(1)}
    assert source.bad == [
        ("a.tar/d", "no image but a symlink"),
        ("a.tar/e", "no image but a hard link to no file before it"),
        ("a.tar/f", "no caption (.txt or .json) but a member of the tar type '6'"),
    ]
    for _ in range(2):  # when it is indexed, and from the index
        (line,) = build(shard, max_bad_share=1.0).summary
        assert line.endswith(
            "(no caption (.txt or .json) but a member of the tar type '6'), not read: 3 members (a name with a dot in "
            "its stem), the first a.tar/g.1.png; 2 members (a file of another ending), the first a.tar/h.cls; "
            "2 members (a symlink), the first a.tar/i.cls"
        )


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"caption": "a", "caption": "b"}', "its .json is no JSON (has 'caption' twice: keep one)"),
        (b'{"caption": "red \\ud800 apple"}', "no Unicode (surrogates not allowed)"),
        (b'{"caption": ' + b"9" * 5000 + b"}", "its .json is no JSON (has a number of 5000 digits)"),
        (b"[" * 100_000, "its .json is no JSON (nested too deeply)"),
        (b'{"caption": ["caption", 1]}', "its .json has no text under"),
    ],
)
def test_a_json_that_is_not_to_be_read_is_a_bad_sample(tmp_path, content, reason):
    some = [m for m in members(range(40)) if not m[0].endswith("txt")]
    some[1] = (some[1][0], content)
    data = build(tar(tmp_path / "a.tar", some), val_source=str(tar(tmp_path / "v" / "v.tar", members([9]))))
    name, result = data.train[0].bad
    assert name == "a.tar/000000.png" and result.startswith(reason)
    assert "not read: the keys of .json url" in build(tar(tmp_path / "b.tar", some[2:])).summary[0]


def header_of(shard, name):
    with tarfile.open(shard) as archive:
        return archive.getmember(name).offset


def test_a_damaged_header_in_the_middle_is_no_end(tmp_path):
    shard = tar(tmp_path / "a.tar", members(range(50)))
    start = header_of(shard, "000020.png")
    with open(shard, "r+b") as file:
        file.seek(start + 148)
        file.write(b"xxxxxx")  # the checksum
    rows, bad, _ = scan(shard)
    assert len(rows) == 49
    assert bad[0] == ("a.tar", f"damaged between the bytes {start:,} and {start + 1024:,}")
    assert bad[1:] == [("a.tar/000020", "no image")]


def test_a_hole_of_zeros_is_told(tmp_path):
    shard = tar(tmp_path / "a.tar", members(range(50)))
    start = header_of(shard, "000010.png")
    with open(shard, "r+b") as file:
        file.seek(start)
        file.write(bytes(30 * 1024))
    rows, bad, _ = scan(shard)
    assert len(rows) == 40
    assert bad[0] == ("a.tar", f"damaged between the bytes {start:,} and {start + 30 * 1024:,}")


@pytest.mark.parametrize(
    ("keep", "samples", "told"),
    [
        (lambda shard: header_of(shard, "000007.png") + 600, 7, "within a member"),
        (lambda shard: header_of(shard, "000007.png"), 7, "without the mark of an archive's end"),
        (lambda shard: header_of(shard, "000007.png") + 100, 7, "without the mark of an archive's end"),
    ],
)
def test_a_truncated_shard_is_told(tmp_path, keep, samples, told):
    shard = tar(tmp_path / "a.tar", members(range(10)))
    os.truncate(shard, keep(shard))
    rows, bad, _ = scan(shard)
    assert len(rows) == samples
    assert any(told in reason for name, reason in bad if name == "a.tar")


def test_joined_archives_and_extended_headers_are_whole(tmp_path):
    one, two = tar(tmp_path / "1.tar", members(range(5))), tar(tmp_path / "2.tar", members(range(5, 9)))
    joined = tmp_path / "a.tar"
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    rows, bad, _ = scan(joined)
    assert (len(rows), bad) == (9, [])
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        with tarfile.open(joined, "w", format=form, pax_headers={"comment": "of all"}) as archive:
            for k in range(3):
                for end in ("png", "txt"):
                    (tmp_path / "x").write_bytes(picture(k))
                    archive.add(tmp_path / "x", f"{'long' * 40}{k}.{end}")
        rows, bad, _ = scan(joined)
        assert (len(rows), bad) == (3, [])


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"", "is empty"), (b"\x1f\x8b" + bytes(1000), "is compressed: unpack it"), (b"x" * 2000, "is no tar archive")],
)
def test_what_is_no_tar_is_refused_in_one_line(tmp_path, content, said):
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match=said):
        build(tmp_path / "a.tar")


def test_tars_without_a_pair_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"hold no pair \(the first: a.tar/000000 \(no image\)\)"):
        build(tar(tmp_path / "a.tar", [m for m in members([0, 1]) if "png" not in m[0]]))
    with pytest.raises(UserError, match=r"no image among their members"):
        build(tar(tmp_path / "b.tar", [("a.cls", b"1")]))


def test_the_index_is_kept_and_remade_for_what_has_changed(tmp_path, monkeypatch):
    shards = [tar(tmp_path / f"{k}.tar", members(range(10 * k, 10 * k + 10))) for k in range(3)]
    scanned = []
    monkeypatch.setattr(tar_index, "scan", lambda path: (scanned.append(path.name), scan(path))[1])
    tars(*shards[:2])
    tars(*shards[:2])
    assert scanned == ["0.tar", "1.tar"]
    assert [tars(*shards).captions(k) for k in (0, 29)] == [["red apple 0"], ["red apple 29"]]
    assert scanned[2:] == ["2.tar"]
    before = tars(*shards)
    tar(shards[0], members(range(3), "green pear {k}"))
    os.utime(shards[0], ns=(1, 1))
    after = tars(*shards[::-1])
    assert scanned[3:] == ["0.tar"]
    assert len(after) == 23 and after.captions(20) == ["green pear 0"] and after.captions(0) == ["red apple 20"]
    assert before.captions(29) == ["red apple 29"]  # what a running process has mapped stays
    os.utime(shards[1], ns=(1, 1))
    tars(*shards)
    # A damaged index is made again.
    (file,) = (tmp_path / "cache" / "tar-index").glob("*.index")
    file.unlink()
    file.write_bytes(b"")
    assert len(tars(*shards)) == 23 and len(scanned) == 8


def test_a_damaged_index_is_made_again(tmp_path):
    shard = tar(tmp_path / "a.tar", members(range(12)))
    before = [read(tars(shard), k) for k in range(12)]
    chance = random.Random(0)
    for case in range(60):
        path = next((tmp_path / "cache" / "tar-index").glob("*.index"))
        content = bytearray(path.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        path.write_bytes(content[: chance.randrange(len(content))] if case % 5 == 0 else content)
        source = tars(shard)
        assert [read(source, k) for k in range(len(source))] == before


def test_another_shard_with_the_name_size_and_time_of_the_first_is_indexed(tmp_path):
    shard = tar(tmp_path / "a.tar", members(range(12)))
    times = shard.stat().st_atime_ns, shard.stat().st_mtime_ns
    assert tars(shard).captions(3) == ["red apple 3"]
    tar(shard, [*members(range(6)), *list(members(range(6, 12)))[::-1]])
    os.utime(shard, ns=times)
    assert [tars(shard).captions(k) for k in (5, 6)] == [["red apple 5"], ["red apple 11"]]


def test_a_copy_of_a_shard_is_not_indexed_again(tmp_path, monkeypatch):
    shard = tar(tmp_path / "a.tar", members(range(12)))
    tars(shard)
    monkeypatch.setattr(tar_index, "scan", None)
    shutil.copy2(shard, tmp_path / "copy")
    os.replace(tmp_path / "copy", shard)
    assert tars(shard).captions(3) == ["red apple 3"]


def test_an_index_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"cannot be written to .*set DS_CMLI_CACHE to another folder"):
        tars(tar(tmp_path / "a.tar", members([1])))


def test_more_shards_than_files_may_be_open(tmp_path):
    count = MOST_OPEN + 20
    source = tars(*(tar(tmp_path / f"{k:04}.tar", members([k])) for k in range(count)))
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        assert [source.captions(k) for k in range(count)] == [[f"red apple {k}"] for k in range(count)]
    assert len(os.listdir("/proc/self/fd")) - before <= MOST_OPEN + 1


def test_a_pickled_source_opens_its_files_again(tmp_path):
    source = tars(tar(tmp_path / "a.tar", members(range(300))))
    source.image(0)
    there = pickle.dumps(source)
    assert len(there) < 1000 and read(pickle.loads(there), 299) == read(source, 299)


def test_the_fingerprint_names_the_shards(tmp_path):
    shards = [tar(tmp_path / f"{k}.tar", members(range(10))) for k in range(2)]
    result = tars(*shards).fingerprint()
    assert result.pop("members") and result.pop("sampled")
    assert result == {"pictures": 20, "files": {shard.name: shard.stat().st_size for shard in shards}}


def number(value):
    """A field of 12 bytes as GNU tar writes numbers that octal digits cannot: base 256, negative ones as well."""
    return bytes([0x80 if value >= 0 else 0xFF]) + (value % 256**11).to_bytes(11, "big")


@pytest.mark.parametrize("kind", [b"0", b"x", b"L", b"S", b"5"])
@pytest.mark.parametrize("size", [-1, -512, -(2**40), 2**63, 2**80])
def test_a_header_with_a_size_that_cannot_be_is_told(tmp_path, size, kind):
    shard = tar(tmp_path / "a.tar", members(range(10)))
    start = header_of(shard, "000007.png")
    content = bytearray(shard.read_bytes())
    content[start + 124 : start + 136], content[start + 156 : start + 157] = number(size), kind
    content[start + 148 : start + 156] = b"        "
    content[start + 148 : start + 156] = b"%06o\0 " % sum(content[start : start + 512])
    shard.write_bytes(content)
    rows, bad, _ = scan(shard)
    assert len(rows) == (9 if size < 0 or kind not in (b"0", b"S") else 7)
    assert [name for name, _ in bad if name.startswith("a.tar/000007")]


def test_parts_by_the_names_of_shards_are_told(tmp_path):
    for name in ("train-0", "train-1", "val-0"):
        tar(tmp_path / f"{name}.tar", members(range(10)))
    (line,) = build(tmp_path).notices
    assert "has shards of train and validation by their names, and all are one part" in line


def test_a_text_that_is_no_caption_by_its_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("ds_cmli.data.sources.tars.MOST_TEXT_BYTES", 1000)
    some = [(n, b"x" * 1001 if n == "000004.txt" else c) for n, c in members(range(10))]
    source = tars(tar(tmp_path / "a.tar", some))
    with pytest.raises(Refused, match=r"1,001 bytes of text"):
        source.captions(4)
    assert source.captions(5) == ["red apple 5"]
