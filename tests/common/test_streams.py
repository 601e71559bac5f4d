"""A command whose stdout or stderr is closed, full or read by nobody: lost results are told."""

import subprocess
import sys

import pytest

from tests.conftest import ROOT, clean_environment

PRINTS = """
import click, os, sys
from ds_cmli.common.cli import run_command
@click.command()
def command():
    open({file!r}, "w").write("whole")
    for i in range(20000):
        print("a line", i)
    print("a warning", file=sys.stderr)
    os.close(os.open({file!r} + ".more", os.O_CREAT | os.O_WRONLY))
    open({file!r}, "a").write(" and done")
run_command(command, prints_results={results})
"""


@pytest.mark.parametrize("results", [True, False])
@pytest.mark.parametrize("streams, lost", [
    ("> /dev/full", True), (">&-", False), ("| head -1 > /dev/null", False), ("2>&-", False), ("2> /dev/full", False),
    ("<&- >&- 2>&-", False), ("> /dev/full 2>&1", True),
])  # fmt: skip
def test_what_a_command_does_is_done(streams, lost, results, tmp_path):
    file = tmp_path / "file"
    script = tmp_path / "script.py"
    script.write_text(PRINTS.format(file=str(file), results=results))
    shell = f"set -o pipefail; {sys.executable} {script} {streams}"
    environment = clean_environment() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(["bash", "-c", shell], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == (1 if lost and results else 0), done.stderr
    assert file.read_text() == "whole and done"
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    if streams == "> /dev/full":
        word = "error" if results else "warning"
        assert done.stderr.endswith(f"{word}: stdout cannot be written: No space left on device\n")
