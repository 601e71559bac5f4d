"""`pytest -m gpu`: what only a GPU can show. `profiling/gpu_check.py` makes a page of the figures."""

import json
import signal
from pathlib import Path

import pytest
import torch

from ds_cmli.cmli import cmli_scores
from ds_cmli.memory.step_memory import predicted
from ds_cmli.memory_model import gpus
from tests import make
from tests.cmli.cases import DTYPES, case, check, with_gradients
from tests.gpu.settings import SETTINGS
from tests.ranks import clean_environment, python, start, wait_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use here under `pytest -m gpu`"),
]


@pytest.fixture
def judge(record_property):
    """A function that records figures, (name, value, bar or None, note), and fails if one is above its bar."""

    def judged(*figures: tuple[str, float, float | None, str]) -> None:
        missed = []
        for name, value, bar, note in figures:
            passed = None if bar is None else abs(value) <= bar  # NaN is within no bar
            record_property("figure", {"name": name, "value": value, "bar": bar, "note": note, "passed": passed})
            missed += [f"{name} is {value:.4g}, its bar {bar:.4g} ({note})"] * (passed is False)
        assert not missed, "; ".join(missed)

    return judged


def on_gpu(*arguments):
    moved = (None if x is None else x.cuda() for x in arguments)
    return [s.cpu() for s in cmli_scores(*moved, backend="triton")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_op_equals_the_fp64_reference_and_itself(dtype, judge):
    different, changed = [], []
    for seed in range(40):
        of = case(seed, dtype=dtype)
        try:
            check(on_gpu, of)
        except AssertionError:
            different.append(seed)
        first, second = ([x.nan_to_num() for x in with_gradients(on_gpu, of)] for _ in range(2))
        if not all(map(torch.equal, first, second)):
            changed.append(seed)
    judge(
        ("random cases beside the fp64 reference", len(different), 0, f"of 40; seeds {different}"),
        ("random cases whose second run has other bits", len(changed), 0, f"seeds {changed}"),
    )


@pytest.mark.parametrize("setting", SETTINGS, ids=lambda setting: setting.name)
def test_a_step_takes_what_is_predicted(setting, judge):
    done = python("-m", *setting.arguments(), timeout=600)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    expected = predicted(setting.step(), gpus.find(torch.cuda.get_device_name())).totals
    figures = []
    # What lies beside the allocator rests on constants of the GPU that are assumed: it has no bar.
    for name, bar in {"requested": 0.05, "allocated": 0.05, "reserved": 0.10, "device": None}.items():
        if measured.get(name):
            note = f"{expected[name]:,} B predicted, {measured[name]:,} B measured"
            figures.append((f"{name}, predicted/measured - 1", expected[name] / measured[name] - 1, bar, note))
    judge(*figures)


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


def stop_and_resume(folder: Path, command: list, env: dict[str, str]) -> None:
    """Check that a training of 30 steps which is stopped and resumed ends with the weights of one that is not."""

    def started(run: Path):
        return start([*command, "--steps", "30", "--log-every", "1", "--output-dir", run], env, folder / "output")

    whole, stopped = folder / "whole", folder / "stopped"
    codes = [started(whole).wait(600)]
    training, metrics = started(stopped), stopped / "metrics.jsonl"
    wait_for(lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 3, training, folder / "output")
    training.send_signal(signal.SIGTERM)
    codes += [training.wait(600), started(stopped).wait(600)]
    assert codes == [0, 85, 0], (folder / "output").read_text()[-2000:]
    assert [line["step"] for line in make.lines(stopped)] == [*range(1, 31)]
    uninterrupted, resumed = map(make.weights, (whole, stopped))
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)


def test_a_stopped_training_goes_on_to_the_bit(tmp_path):
    words = ["--preset", "tiny", "--deterministic", "--data", make.pairs(tmp_path / "pairs", 300)]
    stop_and_resume(tmp_path, ["ds_cmli/train.py", *words], clean_environment())
