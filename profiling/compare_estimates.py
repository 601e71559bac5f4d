"""python profiling/compare_estimates.py [--only E1,E4] [--json FILE] [--markdown FILE]

The memory estimates E1 to E5 of Cares (2024): as written, corrected, predicted and measured; and a
whole training step, by category. Measurements run on a GPU if there is one, otherwise on the CPU,
where the whole step is predicted only. `profiling/predict.py` says what fits a GPU.
"""

if __name__ == "__main__" and not __package__:  # run by its path
    import by_path  # noqa: F401

import os

# Threads that wait for each other use up the CPU's time. torch reads this when it is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ds_cmli.commands import run_command
from ds_cmli.config.presets import PRESETS
from ds_cmli.errors import UserError
from ds_cmli.files import check_writable
from ds_cmli.memory_model import gpus

if TYPE_CHECKING:
    from profiling.memory.estimates import Setting

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
              help="Predict and measure a whole step of this one.", show_default=True)  # fmt: skip
@click.option("--gpu-memory", metavar="SIZE",
              help="Predict the whole step for a GPU of this size: 48GB.")  # fmt: skip
@click.option("--sm", metavar="N.N", help="The compute capability of that GPU: 8.9.")
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
    given_gpu = gpus.from_options(None, gpu_memory, sm)
    for name in (json_path, markdown_path):
        if name is not None:
            check_writable(name)
    from profiling.memory.estimates import Setting

    answers = Answers()
    compare(Setting(**sizes), ids, None if only else preset, given_gpu, answers)
    answers.print_tables()
    if json_path is not None:
        Path(json_path).write_text(json.dumps(answers.content, indent=2) + "\n")
    if markdown_path is not None:
        lines = [f"- {sentence}" for sentence in answers.sentences]
        title = "# Memory: the estimates and the truth"
        Path(markdown_path).write_text("\n".join([title, "", *lines, "", *answers.tables]))


class Answers:
    """The results: sentences, printed as they come; tables, printed later; the JSON's content."""

    def __init__(self) -> None:
        from rich.console import Console

        width = min(100, Console().width) if sys.stdout.isatty() else 100
        self.console = Console(width=width)
        self.sentences: list[str] = []
        self.tables: list[str] = []
        self.content: list[dict[str, Any]] = []

    def say(self, *sentences: str) -> None:
        for sentence in sentences:
            self.sentences.append(sentence)
            self.console.print(sentence, highlight=False)

    def print_tables(self) -> None:
        from rich.markdown import Markdown

        for table in self.tables:
            self.console.print("", Markdown(table))


def compare(
    setting: "Setting",
    ids: set[str],
    preset: str | None,
    given_gpu: gpus.Gpu | None,
    answers: Answers,
) -> None:
    """Answer the estimates `ids`, and the whole step of a preset; None: the estimates alone."""
    from ds_cmli.libraries import silence
    from profiling.memory.estimates import arithmetic, claims, question, sentences

    selected_claims = {id: claim for id, claim in claims(setting).items() if id in ids}
    answers.tables.append(arithmetic(selected_claims, setting))
    answers.say(question(selected_claims, setting), *sentences(selected_claims))
    silence()
    import torch

    from ds_cmli.fake_cuda.device import guard
    from ds_cmli.memory.progress import Progress
    from profiling.memory import measure, steps

    assumed_gpu = gpus.find(gpus.DEFAULT)
    present_gpu = None
    if torch.cuda.is_available():
        present_gpu = given_gpu or gpus.of_device(torch.cuda.get_device_properties(0))
    if "E4" in ids:
        steps.document_config(setting)  # raises for sizes that its models cannot have
    has_fake_gpu = True
    try:
        guard()
    except UserError as error:
        has_fake_gpu = False
        answers.say(f"Not predicted: {error}")
    # E1, E2, E3 and E5 are predicted for the device that measures them: a CPU, or this GPU.
    has_rows = has_fake_gpu or present_gpu is None
    has_document_steps = "E4" in ids and has_fake_gpu
    has_whole_step = preset is not None and has_fake_gpu
    variants = steps.VARIANTS[: steps.NUM_ANSWERING] if preset else steps.VARIANTS
    num_trials = measure.num_rows(setting, ids) if has_rows else 0
    num_trials += len(variants) * has_document_steps + has_whole_step
    progress = Progress(num_trials)
    if has_rows:
        rows = measure.rows(setting, ids, present_gpu, progress.begin)
        progress.end()
        if rows:
            answers.say(*measure.sentences(rows))
            answers.tables += measure.tables(rows)
            answers.content += [asdict(row) for row in rows]
    if has_document_steps:
        reports = steps.predict_document(setting, variants, assumed_gpu, progress.begin)
        progress.end()
        answers.say(steps.document_sentence(reports, assumed_gpu))
        answers.tables.append(steps.document_table(reports, assumed_gpu))
        for name, report in reports.items():
            answers.content.append({"id": "E4", "implementation": name} | report.to_dict())
    if has_whole_step and preset is not None:
        progress.begin(f"the whole step of {preset}")
        num_ranks = setting.P if preset == "paper" else 1
        gpu = present_gpu or given_gpu or assumed_gpu
        sentence, table = steps.whole_step(preset, num_ranks, gpu, present_gpu is not None)
        progress.end()
        answers.say(sentence)
        answers.tables.append(table)


if __name__ == "__main__":
    run_command(command)
