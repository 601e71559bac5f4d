"""`pytest -m soak -s tests/data/test_soak_cache.py`: damage of the cache's files, and every type of a tar's members.

A damaged file of the cache is read as it was, made again, or refused in one line: it never gives other content.
"""

import ctypes
import io
import os
import random
import shutil
import subprocess
import tarfile
from collections import Counter
from pathlib import Path

import pytest

from ds_cmli.common.cache import cache_folder
from ds_cmli.common.errors import UserError
from ds_cmli.common.native import library
from ds_cmli.data import assets
from tests.data.sources.samples import build, members, picture, tar
from tests.data.sources.test_arrow import parquet

pytestmark = pytest.mark.soak
CASES = int(os.environ.get("SOAK_CASES", "200"))  # flipped bits of each file; a fifth as many are truncated


def damaged(whole: bytes, chance: random.Random, cut: bool) -> bytes:
    if cut:
        return whole[: chance.randrange(len(whole))]
    content = bytearray(whole)
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    return bytes(content)


def campaign(files, read, cases=CASES * 6 // 5) -> dict[str, Counter]:
    """How the cases of each file end. `read` gives all content; what it makes again is noticed by the file's bytes."""
    before = read()
    counts: dict[str, Counter] = {}
    for path in files():
        kind = "*" + path.suffix if path.suffix else path.name
        result = counts.setdefault(kind, Counter())
        chance = random.Random(path.name)
        for case in range(cases):
            if path not in files():  # it was made again by another name
                path = next(file for file in files() if file.suffix == path.suffix)
            whole = path.read_bytes()
            content = damaged(whole, chance, case % 6 == 0)
            path.write_bytes(content)
            try:
                same = read() == before
                again = path not in files() or path.read_bytes() != content
                result[("made again" if again else "read") if same else "OTHER CONTENT"] += 1
            except UserError as error:
                result["refused" if "\n" not in str(error) else "TRACEBACK"] += 1
            except Exception as error:
                result[f"TRACEBACK {type(error).__name__}"] += 1
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(whole)
    for kind, result in counts.items():
        print(f"\n{kind}: {sum(result.values())} cases, {dict(result)}", end="")
    assert not [end for result in counts.values() for end in result if end.isupper() or end.startswith("TRACEBACK")]
    return counts


def content_of(data):
    """Every picture and caption that is trained or evaluated on."""
    return [
        (source.name(k), source.image(k), source.captions(k))
        for pairs in (data.train, *data.evals.values())
        for source in pairs.pictures.sources
        for k in range(len(source))
    ]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_tar_index(tmp_path, cache):
    name = tar(tmp_path / "data" / "a.tar", members(range(40)))
    folder = cache / "tar-index"

    campaign(lambda: list(folder.glob("*.index")), lambda: content_of(build(name)))


def test_the_copy_of_parquet_files(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "copies"))
    name = parquet(tmp_path / "data" / "x.parquet", range(40))

    def files():
        return [path for path in (tmp_path / "copies").rglob("*") if path.is_file() and path.suffix != ".lock"]

    campaign(files, lambda: content_of(build(name)), CASES // 2)


@pytest.mark.skipif(not shutil.which("c++"), reason="no compiler")
def test_a_compiled_library(tmp_path, cache):
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int seven() { return 7; }')
    copies = iter(range(10**6))

    def read():
        copy = tmp_path / f"{next(copies)}.so"  # the loader keeps a library that it has read
        shutil.copy(library(source, ["-O1"]), copy)
        return ctypes.CDLL(str(copy)).seven()

    campaign(lambda: list((cache / "native").glob("*.so")), read, CASES // 2)


def test_the_demos_assets(tmp_path, cache, monkeypatch):
    """The damage of each is found, so that it is fetched again."""
    monkeypatch.delenv("DS_CMLI_CACHE")
    whole = assets.pictures()
    monkeypatch.setenv("DS_CMLI_CACHE", str(cache))
    fetched = []

    def fetch_again(root: Path, names: list[str]) -> None:
        fetched.extend(names)
        shutil.copytree(whole, root / whole.name, dirs_exist_ok=True)

    monkeypatch.setattr(assets, "_fetch_locked", fetch_again)

    def read():
        assets._ready.clear()
        return [path.read_bytes() for path in sorted(assets.pictures().iterdir())]

    campaign(lambda: sorted((cache_folder() / whole.name).iterdir()), read, CASES // 4)


LINKS = (tarfile.LNKTYPE, tarfile.SYMTYPE)
TYPES = [bytes([k]) for k in range(256)]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def with_member(path: Path, form: int, kind: bytes, role: str, name: str) -> None:
    """A shard of three samples, of which the second has its picture, caption or another file as a member of a type."""
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as archive:
        for k in range(3):
            for end, content in (("png", picture(k)), ("txt", b"red apple %d" % k), ("cls", b"7")):
                info = tarfile.TarInfo(f"{k}.{end}" if k != 1 else f"{name}.{end}")
                info.size = len(content)
                if k == 1 and end == role:
                    info.type = kind
                    info.linkname = f"0.{end}" if kind in LINKS else ""
                    content = b"" if kind in LINKS else content
                    info.size = len(content)
                archive.addfile(info, io.BytesIO(content) if content else None)


NAMES = ("1", "d/1", "/abs/1", "../1", "x" * 150, "y" * 90 + "/" + "z" * 90, "\u00e9", "UP.", "1.a", ".1")
REGULAR = (b"0", b"\0", b"7")
USUAL = (*REGULAR, *b"12345SxgKLXVMDN".decode())


def test_members_of_every_type(tmp_path):
    """Each picture and caption is read, or the member or its sample is named; none is another's."""
    usual = [kind if isinstance(kind, bytes) else kind.encode() for kind in USUAL]
    cases = [(FORMATS["gnu"], kind, NAMES[0]) for kind in TYPES]
    cases += [(form, kind, name) for form in FORMATS.values() for kind in usual for name in NAMES]
    counts: Counter = Counter()
    for form, kind, name in cases:
        for role in ("png", "txt", "cls"):
            if kind in (b"K", b"L", b"x", b"g", b"X") and (len(name) > 99 or not name.isascii()):
                continue  # the header of the long name is then of the member after this one
            try:
                with_member(tmp_path / "a.tar", form, kind, role, name)
            except ValueError:  # a name that is too long for the format
                counts["cannot be written"] += 1
                continue
            end = outcome(tmp_path / "a.tar", kind, role)
            if end.isupper():
                print(f"\n{end}: {(form, kind, role, name)}", end="")
            counts[end] += 1
    print(f"\n{sum(counts.values())} shards: {dict(counts)}", end="")
    assert not any(end.isupper() for end in counts)


def outcome(shard: Path, kind: bytes, role: str) -> str:
    (source,) = build(shard, val_source=str(shard), max_bad_share=1.0).train.pictures.sources
    pairs = Counter((source.image(k), *source.captions(k)) for k in range(len(source)))
    link = kind == tarfile.LNKTYPE
    second = picture(0 if link and role == "png" else 1), f"red apple {0 if link and role == 'txt' else 1}"
    whole = Counter([(picture(0), "red apple 0"), second, (picture(2), "red apple 2")])
    if pairs == whole:
        return "read"
    if pairs - whole:
        return "OTHER CONTENT"
    not_read = dict(source.members_not_read)
    others, _ = not_read.pop("a file of another ending", (0, ""))
    named = source.bad or not_read or others > 3
    return f"{sum((whole - pairs).values())} of 3 lost and named" if named else "SILENT"


@pytest.mark.skipif(not shutil.which("tar"), reason="no tar")
def test_what_gnu_tar_writes(tmp_path):
    """Hard links of equal files, symlinks, sparse files, devices, pipes, long names, in each of its formats."""
    folder = tmp_path / "files"
    folder.mkdir()
    for k in range(6):
        (folder / f"{k}.png").write_bytes(picture(k))
        (folder / f"{k}.txt").write_text(f"red apple {k}")
    os.link(folder / "0.png", folder / "6.png")
    (folder / "6.txt").write_text("red apple 6")
    os.symlink("0.png", folder / "7.png")
    (folder / "7.txt").write_text("red apple 7")
    with open(folder / "8.png", "wb") as file:
        file.truncate(2**20)
    (folder / "8.txt").write_text("red apple 8")
    os.mkfifo(folder / "9.png")
    (folder / "9.txt").write_text("red apple 9")
    (folder / ("n" * 160 + ".png")).write_bytes(picture(10))
    (folder / ("n" * 160 + ".txt")).write_text("red apple 10")
    for form in ("gnu", "oldgnu", "pax", "posix", "ustar"):
        shard = tmp_path / f"{form}.tar"
        order = sorted(os.listdir(folder))
        made = subprocess.run(
            ["tar", *(["-S"] if form != "ustar" else []), f"--format={form}", "-cf", shard, *order],
            cwd=folder,
            capture_output=True,
        )
        data = build(shard, val_source=str(shard), max_bad_share=1.0)
        read = {text: image for _, image, (text,) in content_of(data)}
        expected = {f"red apple {k}": picture(k) for k in range(6)} | {"red apple 6": picture(0)}
        if form != "ustar":  # which has no names so long
            expected["red apple 10"] = picture(10)
        sparse = read.pop("red apple 8", None)  # a format without sparse files stores the zeros
        assert sparse in (None, bytes(2**20))
        assert read == expected
        reasons = dict(data.train.pictures.sources[0].bad)
        assert reasons[f"{form}.tar/7"] == "no image but a symlink"
        print(f"\n{form} ({made.returncode}): {len(read)} read, {reasons}", end="")
