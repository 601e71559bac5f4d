"""python profiling/gpu_check.py [--json FILE] [--markdown FILE] [--beside FILE ...]

What only a GPU can show, in ten minutes, the most valuable first: a prediction and a
measurement, the all-pairs op against fp64, the demo in fp16 stopped and gone on with, two GPUs where
there are two, every setting of tests/gpu/settings.py, the document's estimates, the clock. It runs
`pytest -m gpu` and writes each figure with its bar as soon as it is there, so that a run that is
cut off keeps what it has. What a test may take is counted in the CPU's time, so that a machine that others use too is slow
and no more. `--beside` adds the figures of earlier ones, as of a CPU
(DS_CMLI_GPU_TESTS_DEVICE=cpu) or of a null GPU, and lists what differs. Exit code: 1 where a bar is
missed, 2 without a GPU.
"""

if __name__ == "__main__" and not __package__:  # run by its path
    import by_path  # noqa: F401

import json
import math
import os
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import click
import torch

from ds_cmli.common.cli import run_command
from ds_cmli.common.errors import UserError
from profiling.scripts import ROOT, Table

Figures = dict[str, Any]  # as this script writes them
DIFFERS = 0.005  # from which difference on a figure counts as different


class Tables:
    """A pytest plugin that gathers the figures which tests record, and writes both files after
    each test.

    Args:
        device: the name of the GPU.
        end: when the last test may begin, by the monotonic clock.
        earlier: what earlier runs have written.
    """

    def __init__(
        self,
        device: str,
        end: float,
        json_path: Path,
        markdown_path: Path,
        earlier: tuple[Figures, ...] = (),
    ):
        self.device, self.end, self.earlier = device, end, earlier
        self.json_path, self.markdown_path = json_path, markdown_path
        self.rows: list[dict[str, Any]] = []
        self.start = time.monotonic()
        self.skipped: dict[str, str] = {}  # test -> why
        self.selected = self.done = 0

    @property
    def missed(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["passed"] is False]

    def pytest_collection_finish(self, session: Any) -> None:
        self.selected = len(session.items)

    def pytest_runtest_setup(self, item: Any) -> None:
        import pytest

        if time.monotonic() > self.end:
            pytest.skip("no time left")

    def pytest_runtest_logreport(self, report: Any) -> None:
        test = report.nodeid.split("::", 1)[1]
        if report.skipped:
            self.skipped[test] = str(report.longrepr[2]).removeprefix("Skipped: ")
        elif report.when != "call" and not report.failed:
            return
        self.done += not report.skipped
        figures = [value for name, value in report.user_properties if name == "figure"]
        if report.failed and all(figure["passed"] is not False for figure in figures):
            reason = ""
            if report.longrepr:
                reason = str(report.longrepr.reprcrash.message).splitlines()[0]
            unknown = {"value": None, "bar": None}
            figures.append({"name": "runs to its end", **unknown, "note": reason, "passed": False})
        self.rows += [{"test": test, **figure} for figure in figures]
        click.echo(f"\n{self.count()} after {time.monotonic() - self.start:.0f} s: {test}")
        _replace(self.json_path, json.dumps({**self.heading(), "rows": self.rows}, indent=2) + "\n")
        _replace(self.markdown_path, self.markdown())

    def count(self) -> str:
        tests = f"{self.done} of {self.selected} tests, {len(self.rows)} figures"
        return f"{tests}, {len(self.missed)} missed their bar"

    def heading(self) -> dict[str, Any]:
        return {
            "device": self.device,
            "date": str(date.today()),
            "torch": torch.__version__,
            "tests": self.selected,
            "done": self.done,
            "passed": bool(self.rows) and not self.missed,
        }

    def markdown(self) -> str:
        lines = [f"# Checked on {self.device}, {date.today()}, PyTorch {torch.__version__}", ""]
        lines += [f"{self.count()}.", ""]
        for test, reason in self.skipped.items():
            lines.append(f"- {test}: {reason}")
        for earlier in self.earlier:
            differing, both = self._differing(earlier)
            head = f"## Beside {earlier['device']}, {earlier['date']}"
            lines += ["", head, "", f"{len(differing)} of {both} figures differ.", ""]
            lines += differing
        rows = []
        for row in [*self.missed, *(row for row in self.rows if row["passed"] is not False)]:
            verdict = {True: "met", False: "**missed**", None: "no bar"}[row["passed"]]
            numbers = _number(row["value"]), _number(row["bar"])
            rows.append([row["test"], row["name"], *numbers, verdict, row["note"]])
        columns = ["test", "figure", "value", "bar", "", ""]
        return "\n".join([*lines, "", Table("Every figure", columns, rows).markdown()])

    def _differing(self, earlier: Figures) -> tuple[list[str], int]:
        """Lines about the figures that differ from an earlier run's, and how many both have."""
        theirs = {(row["test"], row["name"]): row["value"] for row in earlier["rows"]}
        lines, both = [], 0
        for row in self.rows:
            value, other = row["value"], theirs.get((row["test"], row["name"]))
            if value is None or other is None:
                continue
            both += 1
            if not abs(value - other) <= DIFFERS:  # NaN differs
                change = f"{_number(value)}, there {_number(other)}"
                lines.append(f"- {row['test']}, {row['name']}: {change}")
        return lines, both


def _replace(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if math.isfinite(value) and value == int(value) else f"{value:.3g}"


def _earlier(path: str) -> Figures:
    try:
        return json.loads(Path(path).read_text())
    except ValueError:
        raise UserError(f"--beside is {path!r}: give a --json of this script") from None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--json", "json_path", default="gpu_check.json", show_default=True, help="The figures."
)
@click.option(
    "--markdown", "markdown_path", default="gpu_check.md", show_default=True, help="A page."
)
@click.option("--beside", "earlier", multiple=True, help="An earlier --json, to compare with.")
@click.option("--only", default="", help="Tests that this expression of pytest's -k selects.")
@click.option("--minutes", type=float, default=9, show_default=True, help="None begins later.")
def command(
    json_path: str, markdown_path: str, earlier: tuple[str, ...], only: str, minutes: float
) -> None:
    device = os.environ.get("DS_CMLI_GPU_TESTS_DEVICE", "cuda")
    if device == "cuda" and not torch.cuda.is_available():
        why = "no GPU that torch can use here: run this where torch.cuda.is_available()"
        click.echo(f"error: {why}", err=True)
        sys.exit(2)
    import pytest

    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    if "NULLGPU" in os.environ:
        name = f"a null GPU ({name})"
    end, paths = time.monotonic() + 60 * minutes, (Path(json_path), Path(markdown_path))
    tables = Tables(name, end, *paths, tuple(map(_earlier, earlier)))
    arguments = ["-q", "-m", "gpu", "-k", only, str(ROOT / "tests" / "gpu")]
    code = pytest.main(arguments, plugins=[tables])
    if code == pytest.ExitCode.NO_TESTS_COLLECTED:
        click.echo(f"error: --only is {only!r}: no test has that in its name", err=True)
        sys.exit(2)
    count = f"{len(tables.rows)} figures on {name}, {len(tables.missed)} missed"
    click.echo(f"{count}: {json_path}, {markdown_path}")
    sys.exit(1 if tables.missed or code or not tables.rows else 0)


if __name__ == "__main__":
    run_command(command)
