"""Exceptions of libraries as one line, and how commands print, report a mistake and end."""

import shlex
import subprocess
import sys

import click
import pytest
import torch

from ds_cmli.commands import exit_code, prints
from ds_cmli.errors import UserError, blame
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


@pytest.mark.parametrize("module", ["evaluate", "export", "visualize"])
def test_a_module_that_is_a_command_prints_its_help(module):
    done = python("-m", f"ds_cmli.{module}", "--help")
    assert done.returncode == 0 and done.stdout.startswith("Usage: "), done.stderr


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, True),
        ({"SLURM_PROCID": "1"}, False),
        ({"SLURM_PROCID": "0"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
    ],
)
def test_one_process_prints_for_all_ranks(variables, expected, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert prints() is expected


PRINTS = r"""
import click
from ds_cmli.commands import print_line, run_command
run_command(click.Command("prints", callback=lambda: print_line("a name that is no text: \udcff")))
"""


@pytest.mark.parametrize("streams, code", [("", 0), (">&-", 0), ("> /dev/full", 1)])
def test_what_cannot_be_written_is_an_error_and_a_closed_stream_is_none(streams, code, tmp_path):
    shell = f"{shlex.join([sys.executable, '-c', PRINTS])} {streams}"
    environment = clean_environment() | {"PYTHONPATH": str(ROOT), "LC_ALL": "C.UTF-8"}
    done = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == code and bool(done.stderr) == bool(code), done.stderr


def test_a_thread_that_still_runs_changes_no_exit_code_and_loses_no_line():
    script = """
import atexit, sys, threading, time
from ds_cmli.commands import leave
atexit.register(lambda: print("said goodbye"))
threading.Thread(target=time.sleep, args=(600,)).start()
sys.stdout.write("not flushed; ")
leave(85)
"""
    done = python("-c", script, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (85, "not flushed; said goodbye\n", "")


def test_what_a_library_raises_is_blamed_on_what_was_given(monkeypatch):
    with pytest.raises(UserError, match=r"^--data x: KeyError: 'caption'$"), blame("--data x"):
        raise KeyError("caption")
    with pytest.raises(torch.OutOfMemoryError), blame("DeepSpeed refuses the configuration"):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setenv("DS_CMLI_TRACEBACK", "1")
    with pytest.raises(KeyError), blame("--data x"):
        raise KeyError("caption")
