"""Files of checkpoints: readable, or an error or a damage that names the reason."""

import os
import resource
from functools import partial

import torch

from ds_cmli.checkpoint.storage import CheckpointWriter, find_damage
from ds_cmli.checkpoint.weights import write_weights

MEGABYTE = {"weight": torch.zeros(2**18)}


def test_a_disk_that_takes_no_more_is_told_as_the_system_does(tmp_path):
    """Not as PyTorch's "unexpected pos 576 vs 534"."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for write in (
        lambda writer, path: writer.save(MEGABYTE, path),
        lambda writer, path: writer.write(path, partial(write_weights, MEGABYTE)),
    ):
        writer = CheckpointWriter()
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))  # as of a disk
        write(writer, tmp_path / "file")
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert "File too large" in writer.error and "pos" not in writer.error


def test_pipes_and_deep_nesting_are_damage(tmp_path):
    os.mkfifo(tmp_path / "rank-0.pt")
    (tmp_path / "checksums.json").write_text('{"rank-0.pt": "digest"}')
    assert find_damage(tmp_path) == "rank-0.pt (by checksums.json): it is no file"
    (tmp_path / "checksums.json").write_text('{"a":' * 100_000)
    assert find_damage(tmp_path).startswith("checksums.json (by checksums.json): ")
    (tmp_path / "checksums.json").unlink()
    os.mkfifo(tmp_path / "checksums.json")
    assert find_damage(tmp_path) == "checksums.json (by checksums.json): it is no file"
