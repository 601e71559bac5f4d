"""python profiling/gpu_check.py [--markdown FILE] [--only NAME]

Run it once if you have a GPU: it writes a section for docs/memory.md of what `pytest -m gpu` finds
there, after each test. The GPU need not be listed in ds_cmli/memory_model/gpus.py. Exit code: 1 if a
bar is missed, 2 without a GPU.
"""

if __name__ == "__main__" and not __package__:  # run by its path
    import by_path  # noqa: F401

import sys
from datetime import date
from pathlib import Path
from typing import Any

import click
import pytest
import torch

from profiling.memory.estimates import table


class Page:
    """A pytest plugin that writes the figures which tests record, beside their bars."""

    def __init__(self, device: str, path: Path):
        self.device = device
        self.path = path
        self.rows: list[list[str]] = []
        self.missed = 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid.split("::", 1)[1].removeprefix("test_").replace("_", " ")
        figures = [value for name, value in report.user_properties if name == "figure"]
        if report.skipped:
            self.rows.append([test, "", "", "", "skipped", str(report.longrepr[2])])
        elif report.failed and all(figure["passed"] is not False for figure in figures):
            reason = report.longreprtext.splitlines()[-1]
            self.rows.append([test, "runs to its end", "", "", "**missed**", reason])
        if report.when == "call":
            for figure in figures:
                verdict = {True: "met", False: "**missed**", None: "no bar"}[figure["passed"]]
                bar = "" if figure["bar"] is None else f"{figure['bar']:.4g}"
                value = f"{figure['value']:,.6g}"
                self.rows.append([test, figure["name"], value, bar, verdict, figure["note"]])
        self.missed = sum("**missed**" in row for row in self.rows)
        self.path.write_text(self.section())

    def section(self) -> str:
        summary = f"{len(self.rows)} figures, {self.missed} missed their bar."
        rows = table(["test", "figure", "value", "bar", "", ""], self.rows)
        heading = f"### On a {self.device}"
        return f"{heading}\n\n{date.today()}, PyTorch {torch.__version__}: {summary}\n\n{rows}\n"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--markdown", default="gpu_check.md", show_default=True, help="The section.")
@click.option("--only", default="", help="Tests that this expression of pytest's -k selects.")
def command(markdown: str, only: str) -> None:
    if not torch.cuda.is_available():
        click.echo("error: no GPU that torch can use here", err=True)
        sys.exit(2)
    name = torch.cuda.get_device_name()
    page = Page(name, Path(markdown))
    tests = str(Path(__file__).resolve().parents[1] / "tests" / "gpu")
    code = pytest.main(["-q", "-m", "gpu", "-k", only, tests], plugins=[page])
    click.echo(f"{len(page.rows)} figures on {name}, {page.missed} missed: {markdown}")
    sys.exit(1 if page.missed or code else 0)


if __name__ == "__main__":
    command()
