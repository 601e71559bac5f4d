"""python profiling/compare_estimates.py [--only E1,E4] [--json FILE] [--markdown FILE]

The memory estimates E1 to E5 of Cares (2024): as written, corrected, predicted and measured; and a
whole training step, by category. On a GPU where there is one, otherwise on the CPU, which takes no
whole step. `profiling/predict.py` says what fits a GPU.
"""

if __name__ == "__main__" and not __package__:  # run by its path
    import by_path  # noqa: F401

import os

# Threads that wait for each other use up the CPU's time. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from ds_cmli.commands import run_command
from ds_cmli.config.presets import PRESETS
from ds_cmli.errors import UserError
from ds_cmli.files import check_writable
from ds_cmli.memory_model import gpus

IDS = ("E1", "E2", "E3", "E4", "E5")
SIZE = click.IntRange(1)
POSITIONS = click.IntRange(3)  # [CLS], [SEP] and a word


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--B", "B", type=SIZE, default=256, show_default=True, help="Pairs per rank.")
@click.option("--P", "P", type=SIZE, default=2, show_default=True, help="Ranks.")
@click.option("--N", "N", type=SIZE, default=196, show_default=True, help="Image patches.")
@click.option("--M", "M", type=POSITIONS, default=64, show_default=True, help="Text positions.")
@click.option("--H", "H", type=SIZE, default=768, show_default=True, help="Hidden size.")
@click.option("--D", "D", type=SIZE, default=256, show_default=True, help="Embedding size.")
@click.option("--only", metavar="E1,E3", help="These rows, without a preset's step.")
@click.option("--preset", type=click.Choice(tuple(PRESETS)), default="demo",
              help="Whose whole step is predicted and measured.", show_default=True)  # fmt: skip
@click.option("--gpu-memory", metavar="SIZE",
              help="Of this machine's GPU where it is not listed: 48GB.")  # fmt: skip
@click.option("--sm", metavar="N.N", help="Its compute capability: 8.9.")
@click.option("--json", "json_path", metavar="FILE", help="The rows, one object each.")
@click.option("--markdown", "markdown_path", metavar="FILE", help="The tables.")
def command(only, preset, gpu_memory, sm, json_path, markdown_path, **sizes) -> None:
    """Compare the memory estimates E1 to E5 of Cares (2024) with what is predicted and what is
    measured.

    With no options: the setting of that document, and the whole training step of the preset "demo".
    """
    ids = {part.strip().upper() for part in (only or ",".join(IDS)).split(",")}
    if not ids <= set(IDS):
        raise UserError(f"--only is {only!r}: give some of {', '.join(IDS)}")
    given_gpu = gpus.chosen(None, gpu_memory, sm)
    for name in (json_path, markdown_path):
        if name is not None:
            check_writable(name)
    from rich.console import Console
    from rich.markdown import Markdown

    from ds_cmli.libraries import silence
    from profiling.memory.estimates import Setting, arithmetic, claims, question, sentences

    setting = Setting(**sizes)
    selected = {id: claim for id, claim in claims(setting).items() if id in ids}
    console = Console(width=min(100, Console().width) if sys.stdout.isatty() else 100)
    printed: list[str] = []
    tables = [arithmetic(selected, setting)]
    content: list[dict[str, Any]] = []

    def say(*lines: str) -> None:
        for line in lines:
            printed.append(line)
            console.print(line, highlight=False)

    say(question(selected, setting), *sentences(selected))
    silence()
    import torch

    from ds_cmli.fake_cuda.device import guard
    from ds_cmli.memory import step_memory
    from ds_cmli.memory.progress import Progress
    from profiling.memory import measure, steps

    assumed_gpu = gpus.find(gpus.DEFAULT)
    present_gpu = None
    if torch.cuda.is_available():
        present_gpu = given_gpu or step_memory.present_gpu(torch.device("cuda", 0))
    if "E4" in ids:
        steps.document_config(setting)  # raises for sizes that its models cannot have
    try:
        predicts = guard() is not None
    except UserError as error:  # the estimates and, on a CPU, the measurements need no compiler
        predicts = False
        say(f"Not predicted: {error}")
    measures = predicts or present_gpu is None
    variants = steps.VARIANTS if only else steps.VARIANTS[: steps.ANSWERING]
    num_trials = measure.num_rows(setting, ids) if measures else 0
    if predicts:
        num_trials += len(variants) * ("E4" in ids) + (only is None)
    progress = Progress(num_trials)
    if measures:
        rows = measure.rows(setting, ids, present_gpu, progress.begin)
        progress.end()
        if rows:
            say(*measure.sentences(rows))
            tables += measure.tables(rows)
            content += [asdict(row) for row in rows]
    if "E4" in ids and predicts:
        reports = steps.predict_document(setting, variants, assumed_gpu, progress.begin)
        progress.end()
        say(steps.document_sentence(reports, assumed_gpu))
        tables.append(steps.document_table(reports, assumed_gpu))
        for name, report in reports.items():
            content.append({"id": "E4", "implementation": name} | report.to_dict())
    if only is None and predicts:
        progress.begin(f"the whole step of {preset}")
        num_ranks = setting.P if preset == "paper" else 1
        gpu = present_gpu or given_gpu or assumed_gpu
        sentence, table = steps.whole_step(preset, num_ranks, gpu, present_gpu is not None)
        progress.end()
        say(sentence)
        tables.append(table)
    for table in tables:
        console.print("", Markdown(table))
    if json_path is not None:
        Path(json_path).write_text(json.dumps(content, indent=2) + "\n")
    if markdown_path is not None:
        lines = [f"- {line}" for line in printed]
        page = "\n".join(["# Memory: the estimates and the truth", "", *lines, "", *tables])
        Path(markdown_path).write_text(page)


if __name__ == "__main__":
    run_command(command)
