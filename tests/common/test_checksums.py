"""Checksums of objects and lines: every flipped bit is noticed, or changes nothing that is read."""

import json
import random

import pytest

from ds_cmli.common import checksums
from ds_cmli.common.json_text import parse

CONTENT = {"config": {"data": {"context_length": 64, "source": "a/b"}}, "revision": None, "share": 0.1}


def flipped(content: bytes, bit: int) -> bytes:
    out = bytearray(content)
    out[bit // 8] ^= 1 << bit % 8
    return bytes(out)


def test_every_flipped_bit_of_an_object_is_noticed_or_changes_nothing():
    text = json.dumps(checksums.sealed(CONTENT), indent=2).encode()
    noticed = 0
    for bit in range(8 * len(text)):
        try:
            result = parse(flipped(text, bit), dict)
            checksums.verify(result)
        except ValueError:
            noticed += 1
        else:
            assert result.items() >= CONTENT.items()  # a blank between, or the name of the checksum
    assert noticed > 0.8 * 8 * len(text)


def test_an_object_without_a_checksum_is_as_it_is():
    checksums.verify(CONTENT)


LINES = [json.dumps({"step": step, "loss": 1 / step}).encode() for step in range(1, 7)]


@pytest.fixture
def file(tmp_path):
    (tmp_path / ("m" + checksums.LINES)).write_bytes(checksums.of_lines(b"".join(x + b"\n" for x in LINES)))
    return tmp_path / "m"


def test_lines_that_are_whole_or_gone(file):
    assert checksums.changed(LINES, file) == []
    for _ in range(50):
        kept = [line for line in LINES if random.random() < 0.6]
        assert checksums.changed(kept, file) == []
    assert checksums.changed([*LINES, b'{"step": 7}'], file) == []  # written without a checksum
    assert checksums.changed(LINES, file.with_name("another")) == []


@pytest.mark.parametrize("number", range(1, 7))
def test_a_changed_line_is_named_wherever_it_stands(number, file):
    for bit in range(8 * len(LINES[number - 1])):
        lines = [*LINES]
        lines[number - 1] = flipped(lines[number - 1], bit)
        assert checksums.changed(lines, file) == [number]


def test_lines_of_another_order_or_twice_are_named(file):
    first, second, *rest = LINES
    assert checksums.changed([second, first, *rest], file) == [2]
    assert checksums.changed([first, first, second, *rest], file) == [2]


def test_checksums_that_are_cut_off_or_no_checksums_name_only_lines_that_have_one(file):
    sums = file.with_name("m" + checksums.LINES)
    whole = sums.read_bytes()
    for length in range(len(whole)):
        sums.write_bytes(whole[:length])
        assert checksums.changed(LINES, file) == []
    sums.write_bytes(bytes(len(whole)))  # as after a loss of power
    assert checksums.changed(LINES, file) == []
