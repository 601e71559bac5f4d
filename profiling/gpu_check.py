"""python profiling/gpu_check.py [--json FILE] [--markdown FILE]

Everything about memory and the all-pairs op that only a GPU can show, in under 8 minutes on one: prediction against
measurement for every setting of ds_cmli/memory/gpu_settings.py, the allocator's model against recorded histories, the
op against fp64 and against the clock, and the document's estimates. The files are whole at any moment. Exit code 1
where a bar is missed (ds_cmli/memory/gpu_check.py has the bars), 2 without a GPU.
"""

import sys

# Run by its path, this folder comes first on sys.path and would hide packages named like its scripts.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import os  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

import click  # noqa: E402
import torch  # noqa: E402

from ds_cmli.memory import gpu_check  # noqa: E402


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "json_path", default="gpu_check.json", show_default=True, help="Everything that was found.")
@click.option("--markdown", "markdown_path", default="gpu_check.md", show_default=True, help="The figures as a table.")
@click.option("--only", help="Checks whose name contains this, or of this kind, for instance 'prediction'.")
@click.option("--minutes", type=float, default=7.5, show_default=True, help="What has not ended by then is missed.")
@click.option("--jobs", type=int, help="Checks at a time.  [by cores, and 8 GB of the card's memory each; at most 6]")
@click.option("--device", default="cuda", hidden=True)  # "cpu": the same checks on what this machine has, for tests
def command(
    json_path: str, markdown_path: str, only: str | None, minutes: float, jobs: int | None, device: str
) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        click.echo("error: no GPU that torch can use here: run this where torch.cuda.is_available()", err=True)
        sys.exit(2)
    todo = gpu_check.checks("triton" if device == "cuda" else "chunked")
    todo = [check for check in todo if only is None or only in check.name or only == check.kind]
    if not todo:
        click.echo(f"error: --only is {only!r}: no check has that in its name", err=True)
        sys.exit(2)
    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU"
    outcomes: list[gpu_check.Outcome] = []
    start = time.monotonic()

    def report(outcome: gpu_check.Outcome) -> None:
        outcomes.append(outcome)
        gpu_check.write(outcomes, name, Path(json_path), Path(markdown_path))
        for row in gpu_check.rows(outcome):
            verdict = {True: "met   ", False: "MISSED", None: "      "}[row.passed]
            value = "" if row.value is None else f"{row.value:.4g}"
            click.echo(f"{verdict} {row.check}: {row.figure} {value} {row.note}")

    gpu_check.run(todo, 60 * minutes, jobs or most_jobs(device), device, report)
    found = [row for outcome in outcomes for row in gpu_check.rows(outcome)]
    missed = gpu_check.failed(found)
    click.echo(
        f"{len(found)} figures on {name} in {time.monotonic() - start:.0f} s, {len(missed)} missed: "
        f"{json_path}, {markdown_path}"
    )
    sys.exit(1 if missed else 0)


def most_jobs(device: str) -> int:
    """Two cores for each, one to measure and one to predict, and a share of the card that the largest setting fits."""
    by_memory = torch.cuda.get_device_properties(0).total_memory // 2**33 if device == "cuda" else 6
    return max(1, min(6, (os.cpu_count() or 1) // 2, by_memory))


if __name__ == "__main__":
    command()
