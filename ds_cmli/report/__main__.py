"""`python -m ds_cmli.report RUN [RUN ...]` writes curves, results, memory and settings of runs as
one HTML file.
"""

import click

from ds_cmli.common.cli import check_writable, run_command


@click.command()
@click.argument("runs", nargs=-1, required=True, metavar="RUN [RUN ...]")
@click.option("--output", default="report.html", show_default=True, help="The file to write.")
def command(runs: tuple[str, ...], output: str) -> None:
    """Write one page about runs; those that differ by their seed alone count as one, with standard
    errors.
    """
    check_writable(output)
    from ds_cmli.report import page
    from ds_cmli.report.runs import read_all

    page.write(read_all(runs), output)
    click.echo(f"report of {len(runs)} run{'s' if len(runs) > 1 else ''}: {output}")


if __name__ == "__main__":
    run_command(command)
