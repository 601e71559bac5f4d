"""How commands end: one line for a mistake, and what is done before an output is lost."""

import shlex
import subprocess
import sys

import click
import pytest
import torch

from ds_cmli.common import UserError, blame, check_writable, exit_code
from tests.ranks import ROOT, clean_environment, python


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("lr is -1:\n give more"), "lr is -1: give more"),
        (FileNotFoundError(2, "No such file", "x.json"), "No such file: 'x.json'"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(error, line, capsys, monkeypatch):
    @click.command()
    def command():
        raise error

    monkeypatch.setattr(sys, "argv", ["command"])
    assert exit_code(command) == 2
    assert capsys.readouterr().err.strip() == f"error: {line}"
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert exit_code(command) == 2 and not capsys.readouterr().err.strip()  # rank 0 prints it


def test_what_a_library_raises_is_blamed_on_what_was_given(monkeypatch):
    with pytest.raises(UserError, match=r"^--data x: KeyError: 'caption'$"), blame("--data x"):
        raise KeyError("caption")
    with pytest.raises(torch.OutOfMemoryError), blame("DeepSpeed refuses the configuration"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setenv("DS_CMLI_TRACEBACK", "1")
    with pytest.raises(KeyError), blame("--data x"):
        raise KeyError("caption")


PRINTS = r"""
import click
from ds_cmli.common import run_command, say
run_command(click.Command("prints", callback=lambda: say("a name that is no text: \udcff")))
"""


@pytest.mark.parametrize("streams, code", [("", 0), (">&-", 0), ("> /dev/full", 1)])
def test_what_cannot_be_written_is_an_error_and_a_closed_stream_is_none(streams, code, tmp_path):
    shell = f"{shlex.join([sys.executable, '-c', PRINTS])} {streams}"
    environment = clean_environment() | {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and bool(done.stderr) == bool(code), done.stderr


def test_a_file_is_tried_and_left_as_it_was(tmp_path):
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("kept")
    for path in (new, old):
        check_writable(str(path))
    assert not new.exists() and old.read_text() == "kept"
    for path in (tmp_path / "none" / "x.json", old / "x.json", tmp_path):
        with pytest.raises(UserError, match=f"^cannot write '{path}': "):
            check_writable(str(path))


def test_a_thread_that_still_runs_changes_no_exit_code_and_loses_no_line():
    script = """
import atexit, sys, threading, time
from ds_cmli.common import leave
atexit.register(lambda: print("said goodbye"))
threading.Thread(target=time.sleep, args=(600,)).start()
sys.stdout.write("not flushed; ")
leave(85)
"""
    done = python("-c", script, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (85, "not flushed; said goodbye\n", "")
