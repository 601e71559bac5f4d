import ctypes
import random
import shutil

import pytest

from ds_cmli.common.cache import is_sealed, library, seal


def test_damage_of_a_sealed_file_is_found(tmp_path):
    path = tmp_path / "x"
    chance = random.Random(0)
    for size in (0, 1, 100, 2**20 + 1):
        content = chance.randbytes(size)
        path.write_bytes(content)
        assert not is_sealed(path)
        seal(path)
        whole = path.read_bytes()
        assert whole.startswith(content) and is_sealed(path)
        for _ in range(40):
            damaged = bytearray(whole)
            damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
            path.write_bytes(damaged)
            assert not is_sealed(path)
            path.write_bytes(whole[: chance.randrange(len(whole))])
            assert not is_sealed(path)
    assert not is_sealed(tmp_path / "none") and not is_sealed(tmp_path)


@pytest.mark.skipif(not shutil.which("c++"), reason="no compiler")
def test_a_damaged_library_is_compiled_again(tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int seven() { return 7; }')
    built = library(source, ["-O1"])
    whole = built.read_bytes()
    for damaged in (whole[:-1], whole[:2000] + bytes([whole[2000] ^ 8]) + whole[2001:], whole[:-32], b""):
        built.write_bytes(damaged)
        assert library(source, ["-O1"]) == built and is_sealed(built)
    assert ctypes.CDLL(str(built)).seven() == 7
