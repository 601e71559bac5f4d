"""How commands end: options given twice, and streams that are closed, full or read by nobody."""

import subprocess
import sys

import click
import pytest

from ds_cmli.common.cli import check_writable, exit_code
from ds_cmli.common.errors import UserError
from tests.ranks import ROOT, clean_environment


@pytest.mark.parametrize("name", ["train.py", "evaluate/__main__.py"])
def test_a_script_of_another_checkout_than_the_package(name, tmp_path, monkeypatch, capsys):
    script = tmp_path / "ds_cmli" / name
    for file in (script, tmp_path / "ds_cmli" / "common" / "cli.py"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    command = click.command()(lambda: click.echo("runs"))
    monkeypatch.setattr("sys.argv", [name])
    for path, code in ((ROOT / "ds_cmli" / name, 0), (script, 2)):
        monkeypatch.setattr(sys.modules["__main__"], "__file__", str(path), raising=False)
        assert exit_code(command) == code
    captured = capsys.readouterr()
    assert captured.out == "runs\n"
    line = f"error: {script} would run the package of another checkout, {ROOT}: set PYTHONPATH={tmp_path}, or "
    assert captured.err == f"{line}pip install -e {tmp_path}\n"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("--steps 3 --steps 5", "--steps is given 2 times: keep one"),
        ("--steps=3 --steps 3", "--steps is given 2 times: keep one"),
        ("-k 1 --number=2 -k3", "-k is given 3 times: keep one"),
        ("--maps --no-maps", "--maps and --no-maps contradict each other: keep one"),
        ("--data a --data b --dry-run --dry-run --maps --maps", None),
        ("--data a -- --steps", None),
    ],
)
def test_an_option_that_is_given_twice(given, line, monkeypatch, capsys):
    @click.command()
    @click.argument("rest", nargs=-1)
    @click.option("--steps")
    @click.option("-k", "--number", type=int)
    @click.option("--data", multiple=True)
    @click.option("--dry-run", is_flag=True)
    @click.option("--maps/--no-maps", default=None)
    def command(**given):
        click.echo("taken")

    monkeypatch.setattr(sys, "argv", ["command", *given.split()])
    assert exit_code(command) == (2 if line else 0)
    printed = capsys.readouterr()
    assert printed.err == (f"error: {line}\n" if line else "") and (printed.out == "taken\n") == (line is None)


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


def test_a_file_is_tried_and_left_as_it_was(tmp_path):
    """Neither an empty file is left, where what was to be written fails, nor one that was there lost."""
    new, old, link = tmp_path / "new.json", tmp_path / "old.json", tmp_path / "link.json"
    old.write_text("kept")
    link.symlink_to(tmp_path / "absent.json")
    for path in (new, old, link):
        check_writable(str(path))
    assert not new.exists() and old.read_text() == "kept" and link.is_symlink()
    with pytest.raises(UserError, match=r"cannot write '.*/none/x\.json': No such file"):
        check_writable(str(tmp_path / "none" / "x.json"))
