"""Files that are written: whole and on disk, or an error that names the reason."""

import json
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from ds_cmli.checkpoint.storage import CheckpointWriter, find_damage, newest_first
from ds_cmli.checkpoint.weights import write_weights
from ds_cmli.files import sha256

MEGABYTE = {"weight": torch.zeros(2**18)}


@contextmanager
def files_limited_to(num_bytes: int) -> Iterator[None]:
    """A disk on which a file cannot be larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_disk_that_takes_no_more_is_told_as_the_system_does(tmp_path):
    """Not as PyTorch's "unexpected pos 576 vs 534"."""
    for write in (
        lambda writer: writer.save(MEGABYTE, str(tmp_path / "rank-0.pt")),
        lambda writer: writer.write(tmp_path / "model.safetensors", lambda path: write_weights(MEGABYTE, path)),
    ):
        writer = CheckpointWriter()
        with files_limited_to(2**16):
            write(writer)
        assert "File too large" in writer.error and "pos" not in writer.error


def test_files_have_their_checksums_and_those_that_are_taken_are_no_part(tmp_path):
    writer = CheckpointWriter()
    writer.save(MEGABYTE, str(tmp_path / "rank-0.pt"))
    writer.write(tmp_path / "state.json", lambda path: path.write_text("{}"))
    writer.write(tmp_path / "model.safetensors", lambda path: write_weights(MEGABYTE, path))
    assert writer.take_digest("model.safetensors") == sha256(tmp_path / "model.safetensors")
    assert writer.gather() == {name: sha256(tmp_path / name) for name in ("rank-0.pt", "state.json")}
    assert writer.error is None


def test_weights_can_be_read_by_whom_other_files_can(tmp_path):
    umask = os.umask(0o022)
    try:
        write_weights(MEGABYTE, tmp_path / "model.safetensors")
    finally:
        os.umask(umask)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("place", ["checksums.json", "rank-0.pt"])
def test_a_pipe_in_the_place_of_a_file_is_damage(place, tmp_path):
    (tmp_path / "checksums.json").write_text(json.dumps({"rank-0.pt": "digest"}))
    (tmp_path / place).unlink(missing_ok=True)
    os.mkfifo(tmp_path / place)
    assert find_damage(tmp_path) == f"{place} (by checksums.json): it is no file"


def test_checksums_that_are_nested_too_deeply_are_damage(tmp_path):
    (tmp_path / "checksums.json").write_text('{"a":' * 100_000)
    assert "checksums.json" in find_damage(tmp_path)


def test_a_pipe_in_the_place_of_latest_leaves_the_newest(tmp_path):
    for name in ("step2", "step10", "step10.1", "step10.writing"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "latest")
    assert [path.name for path in newest_first(tmp_path)] == ["step10.1", "step10", "step2"]
