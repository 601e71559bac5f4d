"""`--dry-run` ends as the run would, and leaves nothing behind. Mistakes of users: tests/config/test_mistakes.py."""

import json
import sys

import pytest

from ds_cmli import train
from ds_cmli.common.cli import exit_code
from ds_cmli.distributed.launchers import OF_A_RANK
from ds_cmli.memory import out_of_memory
from tests.config.test_mistakes import fail, pairs


@pytest.fixture
def command(tmp_path, monkeypatch, one_predictor):
    """Runs train.py in this process with these arguments, on few pairs, into `run`; its exit code."""
    data = pairs(tmp_path / "pairs")
    defaults = ["--preset", "tiny", "--micro-batch", "4", "--data", data, "--output-dir", str(tmp_path / "run")]

    def start(*arguments: str) -> int:
        for name in OF_A_RANK:
            monkeypatch.delenv(name, raising=False)
        monkeypatch.setattr(sys, "argv", ["train.py", *defaults, *arguments])
        return exit_code(train.command)

    start.defaults = defaults
    return start


def contents(folder) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_dry_run_of_a_run_that_goes_on(command, tmp_path, monkeypatch, capsys):
    assert command("--steps", "2") == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert command("--steps", "2", "--dry-run") == 0
    assert "is finished, 2 steps" in capsys.readouterr().out

    for arguments in (["--steps", "4"], ["--steps", "4", "--dry-run"]):
        line = fail(train.command, [*command.defaults, *arguments], monkeypatch, capsys)
        assert "was made with other settings: optim.steps: 2 -> 4" in line
    assert command("--steps", "4", "--resume-with-changes", "--dry-run") == 0
    assert "resuming from" in capsys.readouterr().out
    assert contents(tmp_path) == before

    (weights,) = (tmp_path / "run" / "checkpoint" / "step2").glob("*model_states.pt")
    weights.write_bytes(b"damaged")
    lines = []
    for arguments in (["--steps", "2"], ["--steps", "2", "--dry-run"]):
        lines.append(fail(train.command, [*command.defaults, *arguments], monkeypatch, capsys))
    assert lines[0] == lines[1] and "is damaged" in lines[0]


@pytest.mark.slow
def test_what_is_printed_is_what_was_asked_for(command, tmp_path, capsys):
    assert command("--profile", "1:2", "--resume", "never", "--dry-run") == 0
    out = capsys.readouterr().out
    printed, _ = json.JSONDecoder().raw_decode(out[out.index("{\n") :])
    assert printed["start"] == {"resume": "never", "profile": "1:2", "profile_memory": None}
    assert printed["config"]["optim"]["micro_batch"] == printed["deepspeed"]["train_batch_size"] == 4
    assert "optimizer states" in out  # the predicted memory
    assert not (tmp_path / "run").exists()


def test_a_step_that_needs_more_memory_than_there_is(command, monkeypatch, capsys):
    room = out_of_memory.DeviceRoom(10**6, "of this process, RLIMIT_DATA (ulimit) = 1,000,000 B")
    monkeypatch.setattr(out_of_memory, "process_room", lambda base: room)
    line = fail(train.command, [*command.defaults, "--dry-run"], monkeypatch, capsys)
    assert "out of memory: a step needs" in line and "RLIMIT_DATA" in line
