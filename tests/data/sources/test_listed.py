import pytest

from ds_cmli.data.sources.listed import Strings


def test_strings_come_back_as_they_were():
    some = ["", "a", "\u00e9t\u00e9 \u4e2d\u6587", "b\n", ""]
    result = Strings(some)
    assert list(result) == some and len(result) == 5
    for index in (5, -1):
        with pytest.raises(IndexError):
            result[index]
