"""python profiling/compare_estimates.py [--json FILE] [--markdown FILE]

The document's memory estimates E1 to E5 and the truth: its arithmetic computed, what each way to
compute the same thing really stores, predicted and measured to the byte, and the whole training
step. On a GPU where there is one, otherwise on the CPU. Each way is measured at the document's own
setting; in forward alone, or with fewer pairs, only if memory or three minutes do not suffice, which
the first lines say. `profiling/predict.py` checks what fits a GPU.
"""

if __name__ == "__main__" and not __package__:  # run by its path
    import by_path  # noqa: F401

import os
import sys
from pathlib import Path

# Threads that wait for each other use up the CPU's time; nothing here needs more than one. Before
# torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
from collections.abc import Callable
from typing import Any

import click

from ds_cmli.common.cli import GroupedCommand, check_writable, option, run_command
from ds_cmli.common.errors import UserError, nearest
from ds_cmli.config.presets import PRESETS
from ds_cmli.memory_model import gpus

IDS = ("E1", "E2", "E3", "E4", "E5")


@click.command(cls=GroupedCommand, context_settings={"help_option_names": ["-h", "--help"]})
@option("Setting", "--B", "B", type=int, default=256, show_default=True, help="Pairs per rank.")
@option("Setting", "--P", "P", type=int, default=2, show_default=True, help="Ranks.")
@option("Setting", "--N", "N", type=int, default=196, show_default=True, help="Image patches.")
@option("Setting", "--M", "M", type=int, default=64, show_default=True, help="Text positions.")
@option("Setting", "--H", "H", type=int, default=768, show_default=True, help="Hidden size.")
@option("Setting", "--D", "D", type=int, default=256, show_default=True, help="Embedding size.")
@option("What is compared", "--only", metavar="E1,E3", help="These rows, without a preset's step.")
@option("What is compared", "--preset", default="demo", show_default=True,
        help=f"Whose whole step is predicted and measured: {', '.join(PRESETS)}.")  # fmt: skip
@option("What is compared", "--gpu-memory", metavar="SIZE",
        help="Of this machine's GPU where it is not listed: 48GB.")  # fmt: skip
@option("What is compared", "--sm", metavar="N.N", help="Its compute capability: 8.9.")
@option("Output", "--json", "json_path", metavar="FILE", help="The rows, one object each.")
@option("Output", "--markdown", "markdown_path", metavar="FILE", help="The tables.")
@option("Output", "--plot", "plot_folder", default="runs/estimates", show_default=True, metavar="FOLDER",
        help="Charts, as PNG files, where matplotlib is installed.")  # fmt: skip
def command(
    only: str | None,
    preset: str,
    gpu_memory: str | None,
    sm: str | None,
    json_path: str | None,
    markdown_path: str | None,
    plot_folder: str,
    **sizes: int,
) -> None:
    """Compare the source document's memory estimates E1 to E5 with what is predicted and what is
    measured.

    With no options: the document's setting, and the whole training step of the preset "demo".
    `--only E4` predicts the document's step in every way to compute the loss. What fits a GPU is
    asked of profiling/predict.py.
    """
    if preset not in PRESETS:
        raise UserError(f"--preset is {preset!r}: {nearest(preset, PRESETS)}")
    ids = parse_only(only)
    given = gpus.chosen(None, gpu_memory, sm)
    for name in (json_path, markdown_path):
        if name is not None:
            check_writable(name)
    from rich.console import Console

    from ds_cmli.common import quiet
    from profiling.memory.document.estimates import Setting, claims, sentences

    setting = Setting(**sizes)
    every = {id: claim for id, claim in claims(setting).items() if id in ids}
    console = Console(width=min(100, Console().width) if sys.stdout.isatty() else 100)
    summary = sentences(every.values())
    for sentence in summary:
        console.print(sentence, highlight=False)

    quiet.silence()
    import torch

    from profiling.memory.document import compare, steps, tables
    from profiling.scripts import Table

    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = gpus.DEFAULT
    if device == "cuda":
        gpu = (given or gpus.present(torch.cuda.get_device_name())).name
    rows = compare.predicted_rows(setting, ids, device)
    document: list[compare.Row] = []
    ours, step = None, None
    with console.status("") as status:

        def show(doing: str) -> Callable[[compare.Row], None]:
            return lambda row: status.update(f"{doing} {row.id} {row.implementation}")

        compare.measure(rows, setting, device, show("measuring"))
        if "E4" in ids:
            variants = steps.FIRST_VARIANTS if only is None else steps.VARIANTS
            document, ours = steps.document_rows(setting, variants, say=show("predicting"))
        if only is None:
            status.update(f"the whole step of {preset}")
            step = steps.whole_step(preset, setting.P if preset == "paper" else 1, device, gpu)
    judged = tables.sentences_found(rows, document, step)
    for sentence in judged:
        console.print(sentence, highlight=False)
    console.print()
    summary += judged

    shown: list[Table] = [tables.arithmetic_table(every.values(), setting)]
    if rows:
        shown += tables.rows_tables(rows, every)
    if document:
        shown.append(tables.document_table(document, tables.remember_document(document)))
    if step is not None:
        shown.append(tables.whole_step_table(step))
    for table in shown:
        table.show(console)

    if json_path is not None:
        content = [row.to_dict() for row in [*rows, *document]]
        Path(json_path).write_text(json.dumps(content, indent=2) + "\n")
    if markdown_path is not None:
        heading = "\n".join(["# Memory: the estimates and the truth", "", *summary, "", ""])
        Path(markdown_path).write_text(heading + "\n".join(t.markdown() for t in shown))
    console.print(plot(Path(plot_folder), ours, step), highlight=False)


def parse_only(only: str | None) -> set[str]:
    """`"E1,E3"` -> `{"E1", "E3"}`; None: all."""
    if only is None:
        return set(IDS)
    ids = {part.strip().upper() for part in only.split(",") if part.strip()}
    unknown = sorted(ids - set(IDS))
    if unknown or not ids:
        raise UserError(f"--only is {only!r}: give some of {', '.join(IDS)}")
    return ids


def plot(folder: Path, ours: Any, step: Any) -> str:
    """Draw what there is; the line that says what was drawn."""
    from ds_cmli.common import plots
    from profiling.memory.document import charts

    if not plots.installed():
        return "no charts: matplotlib is not installed; pip install matplotlib"
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    if ours is not None:
        drawn.append("timeline-document.png")
        of = ours.setting
        title = f"Predicted: a step of {of['micro_batch']} pairs on each of {of['world_size']} GPUs, rank {of['rank']}"
        charts.timeline(ours.events, title, folder / drawn[-1])
    if step is not None:
        drawn.append(f"timeline-{step.preset}.png")
        charts.timeline(
            step.prediction.events, f"A step of preset {step.preset}, predicted", folder / drawn[-1]
        )
    return f"charts in {folder}: {', '.join(drawn) or 'none'}"


def main() -> None:
    run_command(command)


if __name__ == "__main__":
    main()
