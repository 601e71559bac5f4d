import ctypes
import shutil

import pytest

from ds_cmli.common.cache import is_sealed
from ds_cmli.common.native import library


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
