import sys

import click

from ds_cmli.common.cli import json_on_stdout


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
