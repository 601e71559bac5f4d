"""python profiling/compare_estimates.py [--json FILE] [--markdown FILE]

The document's memory estimates E1 to E5 beside the truth: its arithmetic computed, what each way to compute the same
thing really stores, predicted and measured to the byte, and the whole training step. On a GPU where there is one,
otherwise on the CPU, within five minutes; what does not fit in memory or time stays predicted.
"""

import sys

# Run by its path, this folder comes first on sys.path and would hide packages named like its scripts.
sys.path[:] = [p for p in sys.path if p != __file__.rsplit("/", 1)[0]]

import json  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import click  # noqa: E402

from ds_cmli.common.cli import GroupedCommand, check_writable, option, run_command  # noqa: E402
from ds_cmli.common.errors import UserError, nearest  # noqa: E402
from ds_cmli.config.presets import PRESETS  # noqa: E402

ALL_SECONDS = 260  # of everything; what comes last is measured in what is left, or stays predicted
IDS = ("E1", "E2", "E3", "E4", "E5")


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@option("Setting", "--B", "B", type=int, default=256, show_default=True, help="Pairs per rank.")
@option("Setting", "--P", "P", type=int, default=2, show_default=True, help="Ranks.")
@option("Setting", "--N", "N", type=int, default=196, show_default=True, help="Image patches.")
@option("Setting", "--M", "M", type=int, default=64, show_default=True, help="Text positions.")
@option("Setting", "--H", "H", type=int, default=768, show_default=True, help="Hidden size.")
@option("Setting", "--D", "D", type=int, default=256, show_default=True, help="Embedding dimension.")
@option("What is compared", "--only", metavar="E1,E3", help="These rows alone, without the whole step of a preset.")
@option("What is compared", "--preset", default="demo", show_default=True,
        help=f"Whose whole step is predicted and measured: {', '.join(PRESETS)}.")  # fmt: skip
@option("Output", "--json", "json_path", metavar="FILE", help="The rows, one object each.")
@option("Output", "--markdown", "markdown_path", metavar="FILE", help="The tables.")
@option("Output", "--plot", "plot_folder", default="runs/estimates", show_default=True, metavar="FOLDER",
        help="Charts, as PNG files, where matplotlib is installed.")  # fmt: skip
def command(
    only: str | None,
    preset: str,
    json_path: str | None,
    markdown_path: str | None,
    plot_folder: str,
    **sizes: int,
) -> None:
    """Put the source document's memory estimates E1 to E5 beside what is predicted and what is measured.

    With no options: the document's setting, and the whole training step of the preset "demo". Within five minutes on
    two CPU cores.
    """
    end = time.monotonic() + ALL_SECONDS
    if preset not in PRESETS:
        raise UserError(f"--preset is {preset!r}: {nearest(preset, PRESETS)}")
    ids = parse_only(only)
    for name in (json_path, markdown_path):
        if name is not None:
            check_writable(name)
    from ds_cmli.common import quiet

    quiet.silence()
    import torch
    from rich.console import Console

    from ds_cmli.common.tables import Table
    from ds_cmli.memory import compare, compare_tables
    from ds_cmli.memory.estimates import Setting, claims

    setting = Setting(**sizes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    console = Console(width=min(100, Console().width) if sys.stdout.isatty() else 100)
    every = {id: claim for id, claim in claims(setting).items() if id in ids}
    shown: list[Table] = []

    def show(*tables: Table) -> None:
        for table in tables:
            shown.append(table)
            table.show(console)

    rows = compare.predicted_rows(setting, ids, device)
    with console.status("") as status:
        compare.measure(rows, setting, device, lambda r: status.update(f"measuring {r.id} {r.implementation}"))
    summary = compare_tables.sentences(every.values(), rows)
    for sentence in summary:
        console.print(sentence, highlight=False)
    console.print()
    show(compare_tables.arithmetic_table(every.values(), setting))
    if rows:
        show(*compare_tables.rows_tables(rows, every))
    document: list[compare.Row] = []
    ours, step = None, None
    if "E4" in ids:
        with console.status("") as status:
            document, ours = compare.document_rows(
                setting, say=lambda r: status.update(f"predicting {r.id} {r.implementation}")
            )
        show(compare_tables.document_table(document, compare_tables.remember_document(document)))
    if only is None:
        with console.status(f"the whole step of {preset}"):
            step = compare.whole_step(
                preset, setting.P if preset == "paper" else 1, device, max(10.0, end - time.monotonic())
            )
        show(compare_tables.whole_step_table(step))

    if json_path is not None:
        Path(json_path).write_text(json.dumps([row.to_dict() for row in [*rows, *document]], indent=2) + "\n")
    if markdown_path is not None:
        heading = "# Memory: the estimates and the truth\n\n" + "".join(f"{sentence}\n" for sentence in summary) + "\n"
        Path(markdown_path).write_text(heading + "\n".join(t.markdown() for t in shown))
    console.print(plot(Path(plot_folder), rows, ours, step), highlight=False)


def parse_only(only: str | None) -> set[str]:
    """`"E1,E3"` -> `{"E1", "E3"}`; None: all."""
    if only is None:
        return set(IDS)
    ids = {part.strip().upper() for part in only.split(",") if part.strip()}
    unknown = sorted(ids - set(IDS))
    if unknown or not ids:
        raise UserError(f"--only is {only!r}: give some of {', '.join(IDS)}")
    return ids


def plot(folder: Path, rows: list, ours: Any, step: Any) -> str:
    """Draw what there is; the line that says what was drawn."""
    from ds_cmli.common import plots
    from ds_cmli.memory import charts

    if not plots.installed():
        return "no charts: matplotlib is not installed; pip install matplotlib"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if rows:
        drawn.append("estimates.png")
        charts.bars(rows, folder / drawn[-1])
    if ours is not None:
        drawn.append("timeline-document.png")
        title = "A training step at the document's sizes, predicted without a GPU: rank 0"
        charts.timeline(ours.events, title, folder / drawn[-1])
    if step is not None:
        drawn.append(f"timeline-{step.preset}.png")
        charts.timeline(step.prediction.events, f"A step of preset {step.preset}, predicted", folder / drawn[-1])
    return f"charts in {folder}: {', '.join(drawn)}"


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
