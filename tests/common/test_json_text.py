"""JSON of any damage gives a value of the wanted kind or one `ValueError` of one line."""

import json

import pytest

from ds_cmli.common.json_text import DEEPEST, LONGEST, parse

REFUSED = [
    ('{"a": 1, "a": 2}', "'a' twice"), ("[" * 10_000, "nested"), ('{"a": ' * 10_000, "nested"),
    ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nested"), ('{"a": ' + "9" * 400 + "}", "400 digits"),
    ("9" * 5000, "5000 digits"), ('{"a": -' + "9" * 400 + "}", "digits"), ("{", "Expecting"), ("", "Expecting"),
    (b"", "Expecting"), (b'{"a": "\xe9"}', "decode"), (b'"\xed\xa0\x80"', "decode"), (b"\xff\xfe\x00", "truncated"),
    ("[]", "a list where an object is needed"), ("null", "null where"), ("1.5", "a number where"),
    ("true", "a truth value where"), ('"a"', "a text where"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "words"), REFUSED, ids=range(len(REFUSED)))
def test_what_is_refused(text, words):
    with pytest.raises(ValueError, match=words) as error:
        parse(text, dict)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize("text", ['{"a": NaN}', '{"a": -Infinity}', '{"a": 1e999}'])
def test_numbers_that_are_not_finite(text):
    assert parse(text, dict)
    with pytest.raises(ValueError, match="give a finite one"):
        parse(text, dict, finite=True)


def test_what_is_taken():
    deep = "[" * (DEEPEST - 1) + "0" + "]" * (DEEPEST - 1)
    assert parse(deep, list) == json.loads(deep)
    assert parse("[" * DEEPEST + "]" * DEEPEST, list)
    wide = json.dumps([[n, {"a": n}] for n in range(1000)])
    assert parse(wide, list) == json.loads(wide)
    assert parse("9" * LONGEST, object) == 10**LONGEST - 1
    for coding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert parse('{"a": "é"}'.encode(coding), dict) == {"a": "é"}
