import sys

import click
import pytest

from ds_cmli.common.cli import exit_code, json_on_stdout


def test_json_stands_alone_on_stdout(capsys):
    with json_on_stdout() as print_json:
        print("3 of 5 keys missing")
        click.echo("a table")
        print_json({"ratio": 1.5})
    captured = capsys.readouterr()
    assert captured.out == '{"ratio": 1.5}\n'
    assert captured.err == "3 of 5 keys missing\na table\n"
    with json_on_stdout(alone=False):
        print("a table", file=sys.stdout)
    assert capsys.readouterr().out == "a table\n"


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ("--steps 3 --steps 5", "--steps is given 2 times ('3', '5'): keep one"),
        ("--steps=3 --steps 3", "--steps is given 2 times ('3', '3'): keep one"),
        ("-k 1 --number=2 -k3", "-k is given 3 times ('1', '2', '3'): keep one"),
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
    told = capsys.readouterr()
    assert told.err == (f"error: {line}\n" if line else "") and (told.out == "taken\n") == (line is None)
