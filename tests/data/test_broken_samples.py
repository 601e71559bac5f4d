"""A broken sample, however broken, is replaced by the next one; too many end the run, which is saved first."""

import os
import signal

import pytest

from ds_cmli.data.images import read_image_file
from ds_cmli.errors import UserError
from tests import make
from tests.drive_train import drive


def data(source, **settings):
    return make.data_of(make.config(data={"source": str(source), "held_out": 2, "max_bad_share": 1.0, **settings}))


@pytest.fixture
def at_most_a_minute():
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("reading does not end"))
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)


def replace_by_fifo(file):
    file.unlink()
    os.mkfifo(file)


def replace_by_device(file):
    file.unlink()
    file.symlink_to("/dev/zero")


ENDLESS = {  # what an image's file may be, and the reason that is given
    "pipe": (replace_by_fifo, "not a regular file"),
    "link to a device": (replace_by_device, "not a regular file"),
    "five GB of zeros": (lambda file: os.truncate(file, 5 * 10**9), "5,000,000,000 bytes, more than an image may have"),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_an_image_whose_reading_would_not_end_is_a_bad_sample(tmp_path, at_most_a_minute, kind):
    make_endless, reason = ENDLESS[kind]
    make.pairs(tmp_path / "pairs", 12)
    loaded = data(tmp_path / "pairs")
    replaced = loaded.train.images.name(4)
    make_endless(tmp_path / "pairs" / replaced)
    sample = loaded.train[4]
    assert sample.bad[0] == replaced and sample.bad[1].startswith(reason)
    assert (sample.image == loaded.train[5].image).all()
    with pytest.raises(ValueError, match=reason):
        read_image_file(tmp_path / "pairs" / replaced)


def test_samples_of_a_tar_that_has_vanished_are_bad_and_named(tmp_path):
    make.tar(tmp_path / "0.tar", 8), make.tar(tmp_path / "1.tar", 8, first=8)
    loaded = data(tmp_path)
    (tmp_path / "1.tar").unlink()
    loaded.train.images.sources[0][0].opened.clear()  # as in a process that has not read it yet
    samples = [loaded.train[index] for index in range(len(loaded.train))]
    names = [sample.bad[0] for sample in samples if sample.bad]
    _, indices = loaded.train.images.sources[0]
    in_second = [indices[number] - 8 for number in range(len(indices)) if indices[number] >= 8]
    assert names == [f"1.tar, sample {number}" for number in in_second]
    assert {sample.bad[1] for sample in samples if sample.bad} == {"no such file"}


def test_too_many_bad_samples_end_a_run_that_is_saved_first(tmp_path, demo):
    make.pairs(tmp_path / "pairs", 40, broken=range(5, 15))
    options = {"--data": tmp_path / "pairs", "--steps": 8, "--output-dir": tmp_path / "run"}
    with pytest.raises(UserError, match="samples of 38 cannot be used"):
        drive(make.small(options, {"data.held_out": 2, "run.log_every": 2}))
    assert (tmp_path / "run/checkpoint/latest").read_text() == "step2"
