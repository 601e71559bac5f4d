"""A broken sample, however broken, is replaced by the next one; too many end the run, which is saved first."""

import os
import signal

import pytest

from ds_cmli.data.images import read_image_file
from ds_cmli.errors import UserError
from tests import make
from tests.drive_train import drive


@pytest.fixture
def at_most_a_minute():
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("reading does not end"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def write_zeros(file):
    file.touch()
    os.truncate(file, 5 * 10**9)


BROKEN = {  # what writes an image's file, and the reason that is given
    "no picture": (lambda file: file.write_bytes(b"not a picture"), "cannot identify"),
    "pipe": (os.mkfifo, "not a regular file"),
    "link to a device": (lambda file: file.symlink_to("/dev/zero"), "not a regular file"),
    "five GB of zeros": (write_zeros, "5,000,000,000 bytes, more than an image may have"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_image_is_a_bad_sample_and_replaced_by_the_next(tmp_path, at_most_a_minute, kind):
    write_file, reason = BROKEN[kind]
    loaded = make.data(make.pairs(tmp_path, 12), held_out=2, max_bad_share=1.0)
    replaced = loaded.train.images.name(4)
    (tmp_path / replaced).unlink()
    write_file(tmp_path / replaced)
    sample = loaded.train[4]
    name, given_reason = sample.bad
    assert sample.index == 4 and name == replaced and given_reason.startswith(reason)
    assert (sample.image == loaded.train[5].image).all()
    if kind != "no picture":  # the others are not even read
        with pytest.raises(ValueError, match=reason):
            read_image_file(tmp_path / replaced)


def test_samples_of_a_tar_that_has_vanished_are_bad_and_named(tmp_path):
    make.tar(tmp_path / "0.tar", 8)
    make.tar(tmp_path / "1.tar", 8, first=8)
    loaded = make.data(tmp_path, held_out=2, max_bad_share=1.0)
    (tmp_path / "1.tar").unlink()
    loaded.train.images.sources[0][0].opened.clear()  # as in a process that has not read it yet
    samples = [loaded.train[index] for index in range(len(loaded.train))]
    names, reasons = zip(*(sample.bad for sample in samples if sample.bad), strict=True)
    _, indices = loaded.train.images.sources[0]
    second_tar = [indices[number] - 8 for number in range(len(indices)) if indices[number] >= 8]
    assert list(names) == [f"1.tar, sample {number}" for number in second_tar]
    assert set(reasons) == {"no such file"}


def test_too_many_bad_samples_end_a_run_that_is_saved_first(tmp_path, demo):
    pairs = make.pairs(tmp_path / "pairs", 40, broken=range(5, 15))
    options = {"--data": pairs, "--steps": 8, "--output-dir": tmp_path / "run"}
    with pytest.raises(UserError, match="samples of 38 cannot be used"):
        drive(make.small(options, {"data.held_out": 2, "run.log_every": 2}))
    assert (tmp_path / "run/checkpoint/latest").read_text() == "step2"
