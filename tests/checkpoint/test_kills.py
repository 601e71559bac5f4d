"""A run that is killed while it saves: the next start ends as if nothing had happened, with all its models."""

import itertools
import os
import shutil
import signal
from unittest import mock

import pytest

from ds_cmli.checkpoint.save import Checkpoints
from tests import make, ranks
from tests.checkpoint.runs import assert_same
from tests.drive_train import drive

ALL_OF_TWO_SAVES = pytest.param(4, itertools.count(), marks=pytest.mark.slow)


def train_and_die(arguments: list[str], number: int) -> None:
    """Train; KILL this process before the rename or the sync to disk of this number of all saves."""
    save = Checkpoints.save
    numbers = itertools.count()

    def dying(function):
        def die_or_call(*arguments):
            if next(numbers) == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return die_or_call

    def save_and_die(*arguments):
        with mock.patch.multiple(os, replace=dying(os.replace), fsync=dying(os.fsync)):
            return save(*arguments)

    os.environ.update(ranks.ALONE)
    with mock.patch.object(Checkpoints, "save", save_and_die):
        drive(arguments)


@pytest.mark.parametrize("steps, numbers", [(1, range(14, 21, 2)), ALL_OF_TWO_SAVES])  # 14: the first is published
def test_a_kill_at_a_rename_or_a_sync_of_a_save_changes_nothing(steps, numbers, tmp_path):
    options = {"--data": make.pairs(tmp_path / "pairs", 33), "--steps": steps, "--save-every": 2, "--eval-every": 2}
    settings = {"optim.ema_decay": 0.5, "student.freeze_image": 1, "run.keep_best": True, "run.keep": 1}
    arguments = make.small(options, settings)

    def exit_code(name: str, number: int = -1) -> int:
        words = [*arguments, "--output-dir", str(tmp_path / name)]
        process = ranks.forkserver().Process(target=train_and_die, args=(words, number))
        process.start()
        process.join()
        return process.exitcode

    assert exit_code("straight") == 0
    for number in numbers:
        if exit_code("run", number) == 0:
            assert number > 40, "not all renames and syncs of two saves were seen"
            break
        assert exit_code("run") == 0 and not [*tmp_path.rglob("*.writing")], number
        assert_same(tmp_path / "run", tmp_path / "straight")
        shutil.rmtree(tmp_path / "run")
