"""`pytest -m gpu`: what only a GPU can show. `profiling/gpu_check.py` makes a page of the figures."""

import json
import re

import pytest
import torch

from ds_cmli.cmli import cmli_scores
from ds_cmli.memory.step_memory import predicted
from ds_cmli.memory_model import gpus
from tests import make
from tests.checkpoint.runs import stop_and_resume
from tests.cmli.cases import DTYPES, case, check, with_gradients
from tests.gpu.settings import SETTINGS
from tests.ranks import clean_environment, launcher, python

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use here under `pytest -m gpu`"),
]
GPU = torch.device("cuda", 0)


@pytest.fixture
def judge(record_property):
    """A function that records figures, (name, value, bar or None, note), and fails if one is above its bar."""

    def judged(*figures: tuple[str, float, float | None, str]) -> None:
        missed = []
        for name, value, bar, note in figures:
            passed = None if bar is None else abs(value) <= bar  # NaN is within no bar
            record_property("figure", {"name": name, "value": value, "bar": bar, "note": note, "passed": passed})
            if passed is False:
                missed.append(f"{name} is {value:.4g}, its bar {bar:.4g} ({note})")
        assert not missed, "; ".join(missed)

    return judged


def on_gpu(*arguments):
    moved = (None if x is None else x.cuda() for x in arguments)
    return [s.cpu() for s in cmli_scores(*moved, backend="triton")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_equals_the_fp64_reference_and_itself(dtype, judge):
    different = []
    changed = []
    for seed in range(40):
        random_case = case(seed, dtype=dtype)
        try:
            check(on_gpu, random_case)
        except AssertionError:
            different.append(seed)
        first, second = ([x.nan_to_num() for x in with_gradients(on_gpu, random_case)] for _ in range(2))
        if not all(map(torch.equal, first, second)):
            changed.append(seed)
    judge(
        ("random cases beside the fp64 reference", len(different), 0, f"of 40; seeds {different}"),
        ("random cases whose second run has other bits", len(changed), 0, f"seeds {changed}"),
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_step_takes_what_is_predicted(setting, judge):
    """Requested within 1%, and reserved at most 2% low; the context and NCCL's buffers are assumed and have no bar."""
    done = python("-m", *setting.arguments(), timeout=600)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    expected = predicted(setting.step(), gpus.of_device(torch.cuda.get_device_properties(GPU))).totals
    figures = []
    for name, size in measured.items():
        difference = expected[name] / size - 1
        note = f"{expected[name]:,} B predicted, {size:,} B measured"
        bar = 0.01 if name == "requested" else None
        figures.append((f"{name}, predicted/measured - 1", difference, bar, note))
        if name == "reserved":
            figures.append(("reserved, predicted too low by", max(-difference, 0.0), 0.02, note))
    if "device" not in measured:
        figures.append(("device, measured", float("nan"), None, "NVML does not report this process's bytes"))
    judge(*figures)


CONTEXT = """
import torch
from ds_cmli.memory.step_memory import gpu_bytes
device = torch.device("cuda", 0)
torch.ones(1, device=device).sum().item()
occupied = gpu_bytes(device)
print(-1 if occupied is None else occupied - torch.cuda.memory_reserved(device))
"""


def test_what_a_gpu_has_and_what_its_context_takes(judge):
    gpu = gpus.of_device(torch.cuda.get_device_properties(GPU))
    _, total = torch.cuda.mem_get_info()
    done = python("-c", CONTEXT)
    assert done.returncode == 0, done.stderr
    context = int(done.stdout.split()[-1])
    note = f"{gpu.context_bytes:,} B in the table, assumed"
    if context < 0:
        note = "NVML does not report this process's bytes, as in some containers"
    judge(
        ("total bytes", total, None, f"{gpu.total_bytes:,} B in the table"),
        ("context, bytes", context if context >= 0 else float("nan"), None, note),
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU here: two make communicators")
def test_two_gpus_make_the_communicators_that_are_predicted(judge, tmp_path):
    words = make.small({"--data": make.pairs(tmp_path / "pairs"), "--steps": 2, "--output-dir": tmp_path / "run"})
    env = clean_environment() | {"NCCL_DEBUG": "INFO"}
    done = python("ds_cmli/train.py", *words, launcher=launcher("torchrun", 2), env=env, timeout=600)
    assert done.returncode == 0, done.stderr
    made = len(re.findall(r" rank 0 nranks 2 .*Init COMPLETE", done.stdout + done.stderr))
    judge(("NCCL communicators beside 2 predicted", made - 2, 0, f"{made} made by rank 0"))


def test_speed_of_the_op_and_of_a_step(judge):
    """Medians; the op's loss stands beside what else computes it, so that a ratio can be read."""
    op = python("-m", "profiling.speed.op", "--images", 128, "--texts", 128, "--dtype", "bf16", timeout=600)
    assert op.returncode == 0, op.stderr
    setting, *rows = op.stdout.splitlines()
    times = [re.fullmatch(r"\s+(.+?)\s+([\d.]+|nan) ms\s+([\d.]+|nan) MB", row).groups() for row in rows]
    judge(*((f"op: {name}, ms", float(ms), None, f"{mb} MB; {setting}") for name, ms, mb in times))
    step = python("-m", "profiling.speed.step", "--preset", "demo", timeout=600)
    assert step.returncode == 0, step.stderr
    line = step.stdout.splitlines()[-1]
    judge(("step: trainer / plain loop", float(re.search(r"ratio ([\d.]+)", line)[1]), None, line))


def test_the_estimates_largest_allocations_are_the_predicted_ones(judge, tmp_path):
    path = tmp_path / "rows.json"
    done = python("profiling/compare_estimates.py", "--only", "E1,E2,E3,E5", "--json", path, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [row for row in json.loads(path.read_text()) if row["measured_bytes"] is not None]
    assert {"E1", "E2", "E3"} <= {row["id"] for row in rows}
    names = [f"{row['id']} {row['implementation']}, measured - predicted bytes" for row in rows]
    away = [row["measured_bytes"] - row["predicted_bytes"] for row in rows]
    notes = [f"{row['measured_bytes']:,} B on {row['measured_on']}" for row in rows]
    judge(*((name, value, 0, note) for name, value, note in zip(names, away, notes, strict=True)))


def test_a_stopped_training_goes_on_to_the_bit(tmp_path):
    words = ["--preset", "tiny", "--deterministic", "--data", make.pairs(tmp_path / "pairs", 300)]
    stop_and_resume(tmp_path, ["ds_cmli/train.py", *words], clean_environment())
