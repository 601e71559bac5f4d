"""python profiling/gpu_check.py [--json FILE] [--markdown FILE]

The tables of what only a GPU can show: runs `pytest -m gpu` and writes each figure beside its bar,
with the date and the name of the GPU. It predicts and measures memory for every setting of
tests/gpu/settings.py, replays the recorded allocator histories, and checks the all-pairs op against
fp64 and the clock, and the document's estimates. It takes under 8 minutes on one GPU; the files are
whole at any moment. Exit code: 1 where a bar is missed, 2 without a GPU.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # run by its path: not this folder, but the repository is searched first
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import json
import math
import os
import time
from datetime import date
from typing import Any

import click
import torch

from ds_cmli.common.cli import run_command

ROOT = Path(__file__).resolve().parent.parent


class Tables:
    """A pytest plugin that gathers the figures which tests record, and writes both files after
    each test.
    """

    def __init__(self, device: str, end: float, json_path: Path, markdown_path: Path):
        self.device, self.end, self.json_path, self.markdown_path = (
            device,
            end,
            json_path,
            markdown_path,
        )
        self.rows: list[dict[str, Any]] = []

    @property
    def missed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["passed"] is False]

    def pytest_runtest_setup(self, item: Any) -> None:
        assert time.monotonic() < self.end, "no time left"

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and not report.failed:
            return
        test = report.nodeid.split("::", 1)[1]
        figures = [value for name, value in report.user_properties if name == "figure"]
        if report.failed and all(figure["passed"] is not False for figure in figures):
            reason = (
                str(report.longrepr.reprcrash.message).splitlines()[0] if report.longrepr else ""
            )
            figures.append(
                {
                    "name": "runs to its end",
                    "value": None,
                    "bar": None,
                    "note": reason,
                    "passed": False,
                }
            )
        self.rows += [{"test": test, **figure} for figure in figures]
        _replace(self.json_path, json.dumps({**self.heading(), "rows": self.rows}, indent=2) + "\n")
        _replace(self.markdown_path, self.markdown())

    def heading(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "date": str(date.today()),
            "passed": bool(self.rows) and not self.missed,
        }

    def markdown(self) -> str:
        lines = [f"# Checked on {self.device}, {date.today()}", ""]
        lines += [f"{len(self.rows)} figures, {len(self.missed)} missed their bar.", ""]
        lines += ["| test | figure | value | bar | | |", "|---|---|---|---|---|---|"]
        for row in [*self.missed, *(row for row in self.rows if row["passed"] is not False)]:
            verdict = {True: "met", False: "**missed**", None: "no bar"}[row["passed"]]
            cells = [
                row["test"],
                row["name"],
                _number(row["value"]),
                _number(row["bar"]),
                verdict,
                row["note"],
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines) + "\n"


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(text)
    beside.replace(path)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if math.isfinite(value) and value == int(value) else f"{value:.3g}"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--json", "json_path", default="gpu_check.json", show_default=True, help="Every figure."
)
@click.option(
    "--markdown",
    "markdown_path",
    default="gpu_check.md",
    show_default=True,
    help="The figures as a table.",
)
@click.option(
    "--only",
    default="",
    help="Tests that this expression of pytest's -k selects, for instance 'op'.",
)
@click.option(
    "--minutes",
    type=float,
    default=7.5,
    show_default=True,
    help="Tests not begun by then are missed.",
)
def command(json_path: str, markdown_path: str, only: str, minutes: float) -> None:
    device = os.environ.get("DS_CMLI_GPU_TESTS_DEVICE", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        click.echo(
            "error: no GPU that torch can use here: run this where torch.cuda.is_available()",
            err=True,
        )
        sys.exit(2)
    import pytest

    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    tables = Tables(name, time.monotonic() + 60 * minutes, Path(json_path), Path(markdown_path))
    code = pytest.main(
        ["-q", "-m", "gpu", "-k", only, str(ROOT / "tests" / "gpu")], plugins=[tables]
    )
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        click.echo(f"error: --only is {only!r}: no test has that in its name", err=True)
        sys.exit(2)
    click.echo(
        f"{len(tables.rows)} figures on {name}, {len(tables.missed)} missed: {json_path}, {markdown_path}"
    )
    sys.exit(1 if tables.missed or code else 0)


if __name__ == "__main__":
    run_command(command)
