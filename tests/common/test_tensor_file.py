"""A safetensors file with a checksum in it is still one for every other reader, and each flipped bit of it is found."""

import hashlib
import shutil

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from ds_cmli.common import tensor_file

TENSORS = {"b": torch.arange(6.0).view(2, 3), 'a"é': torch.ones(3, dtype=torch.bfloat16), "empty": torch.zeros(0)}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"".join(tensor_file.pieces(TENSORS)))
    return path


def test_every_other_program_reads_it(file):
    read = load_file(file)
    assert read.keys() == TENSORS.keys() and all(torch.equal(read[name], TENSORS[name]) for name in read)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["format"] == "pt"  # which transformers asks for
    zeroed = file.read_bytes().replace(metadata["sha256"].encode(), b"0" * 64)
    assert hashlib.sha256(zeroed).hexdigest() == metadata["sha256"]
    assert (int.from_bytes(file.read_bytes()[:8], "little") + 8) % 8 == 0  # the tensors are aligned


def test_each_byte_flipped_is_found_by_us_or_by_the_library(file):
    whole = file.read_bytes()
    assert tensor_file.damage(file) is None
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1
        file.write_bytes(content)
        if tensor_file.damage(file) is None:
            with pytest.raises((SafetensorError, UnicodeDecodeError)):
                load_file(file)


def test_a_shorter_or_longer_file_is_found(file):
    whole = file.read_bytes()
    for content in (whole[:-1], whole + b"\0"):
        file.write_bytes(content)
        assert "does not match the checksum" in tensor_file.damage(file)


def test_the_checksum_stays_with_a_copy_and_a_file_without_one_is_not_refused(file, tmp_path):
    assert tensor_file.damage(shutil.copy(file, tmp_path / "copy.safetensors")) is None
    save_file(TENSORS, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert tensor_file.damage(tmp_path / "theirs.safetensors") is None


def test_a_digest_of_something_else_in_another_programs_file_is_none_of_ours(tmp_path):
    path = tmp_path / "theirs.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt", "epoch": "3", "data_hash": "5" * 64})
    assert tensor_file.damage(path) is None
