"""What ds-cmli-memory prints of a report: its sentences, tables and progress."""

import io
import re
from importlib.metadata import version

from rich.console import Console

from ds_cmli.memory.command import fit_sentence, sentence, triton_line
from ds_cmli.memory.largest_batch import LargestBatch, trials_left
from ds_cmli.memory.progress import Progress
from ds_cmli.memory.report import CATEGORIES, PHASES, Report, show
from ds_cmli.memory_model import gpus

A100 = gpus.find("A100 80GB")


def report(stage: int = 2, source: str = "predicted", device: int = 24 * 10**9) -> Report:
    setting = {"world_size": 8, "rank": 0, "micro_batch": 64, "zero_stage": stage, "checkpointing": True}
    setting |= {"losses": ["global", "cmli"]}
    totals = {"requested": 20 * 10**9, "reserved": 22 * 10**9, "device": device}
    return Report(setting, source, dict.fromkeys(CATEGORIES, 0), dict.fromkeys(PHASES, 0), totals)


def shown(printed: Report) -> str:
    console = Console(file=io.StringIO(), width=200)
    show(printed, console)
    return console.file.getvalue()


def test_what_zero_3_may_reserve_beyond_its_prediction_is_in_every_answer():
    margin = "with ZeRO-3 up to 5% more"
    found = LargestBatch(64, report(stage=3), {64: 24 * 10**9, 65: 26 * 10**9})
    answer = "fits in 25.00 GB with micro-batch 64; 65 needs 26.00 GB"
    assert fit_sentence(found, 25 * 10**9) == f"{answer}; {margin} may be reserved"
    assert f"needs 24.00 GB ({margin}) and fits on a A100 80GB" in sentence(report(stage=3), A100)
    assert f"taken from the device by the allocator; {margin}" in shown(report(stage=3))
    assert "checkpointing on, losses global + cmli" in shown(report()) and "20,000,000,000" in shown(report())
    for other in (report(stage=2), report(stage=3, source="measured: NVIDIA A100")):
        assert margin not in sentence(other, A100) and margin not in shown(other)
        assert fit_sentence(LargestBatch(64, other, found.tried), 25 * 10**9) == answer


def test_a_blackwell_gpu_is_predicted_with_a_line_on_this_machines_triton():
    triton = version("triton")
    assert triton_line(gpus.find("B200")).startswith(f"B200 180GB: predicted with this machine's Triton {triton}: ")


def test_progress_without_a_terminal_is_a_line_before_each_trial(capsys):
    unknown, known = Progress(), Progress(num_trials=2)
    unknown.begin("micro-batch 1", 8)
    unknown.begin("micro-batch 64", 7)
    known.begin("E1 ours")
    known.end()
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "trial 1: micro-batch 1"
    assert re.fullmatch(r"trial 2: micro-batch 64; about \d+ s left", second)
    assert third == "trial 1 of 2: E1 ours"
    assert [trials_left(sizes, 100) for sizes in ({}, {1: 10, 64: 50, 128: 200}, {99: 99, 100: 101})] == [8, 6, 1]
