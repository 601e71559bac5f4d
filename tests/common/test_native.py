import ctypes
import shutil

import pytest

from ds_cmli.common.cache import is_sealed
from ds_cmli.common.errors import UserError
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


@pytest.mark.parametrize(
    ("named", "line"),
    [
        ("no-such-compiler", "finds no compiler 'no-such-compiler': install g\\+\\+, or set CXX"),
        ("'g++", 'finds no compiler "\'g\\+\\+"'),
        ("true", r"true cannot compile .*five.cpp \(no message\): CXX names another compiler"),
        ("false", r"false cannot compile .*five.cpp \(no message\)"),
    ],
)
def test_a_compiler_that_is_none(named, line, tmp_path, monkeypatch):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", named)
    (tmp_path / "five.cpp").write_text("")
    with pytest.raises(UserError, match=line):
        library(tmp_path / "five.cpp", [])
    assert not list(tmp_path.rglob("*.so"))
