"""The tests for a GPU, run by what this machine has: their bars, their limits in time, their tables and exit codes."""

import importlib.util
import json
import subprocess

import pytest
import torch

from ds_cmli.config.deepspeed_config import DeepSpeedConfig
from tests.gpu import op_check
from tests.gpu.conftest import run_setting
from tests.gpu.figures import (
    Figure,
    estimate_figures,
    exactness_figures,
    judge,
    prediction_figures,
    speed_figures,
)
from tests.gpu.settings import SETTINGS, Setting
from tests.ranks import ROOT, clean_environment, python

CPU = torch.device("cpu")
SCRIPT = ROOT / "profiling" / "gpu_check.py"


def script(*arguments: object, device: str = "cpu", timeout: float = 300) -> subprocess.CompletedProcess:
    env = clean_environment() | {"DS_CMLI_GPU_TESTS_DEVICE": device}
    return python(SCRIPT, *arguments, env=env, timeout=timeout)


def test_without_a_gpu_one_line_and_exit_code_2(tmp_path):
    done = script("--markdown", tmp_path / "x.md", device="cuda")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no GPU that torch can use here\n"
    assert not list(tmp_path.iterdir())


def test_at_least_20_settings_of_every_kind_all_different():
    assert len(SETTINGS) >= 20
    assert len({s.name for s in SETTINGS}) == len(SETTINGS)
    resolved = []
    for setting in SETTINGS:
        config, ds_config = setting.resolve()
        DeepSpeedConfig.of(ds_config)
        full = DeepSpeedConfig.of(ds_config).filled(config.optim, setting.world, 100)
        assert full["train_micro_batch_size_per_gpu"] == setting.batch
        assert config.student.image_weights == config.student.text_weights == config.teacher.weights == "random"
        resolved.append(json.dumps([config.to_dict(), full.raw()], sort_keys=True))
    assert len(set(resolved)) == len(SETTINGS)
    assert {s.preset for s in SETTINGS} == {"tiny", "demo", "paper"}
    assert {s.stage for s in SETTINGS} == {1, 2, 3}
    assert {s.precision for s in SETTINGS} == {"fp32", "bf16", "fp16"}
    assert any(s.offload for s in SETTINGS) and any(s.checkpointing for s in SETTINGS)
    assert any(s.accumulation > 1 for s in SETTINGS) and len({s.world for s in SETTINGS}) >= 4


def verdicts(figures: list[Figure]) -> list[bool | None]:
    return [figure.passed for figure in figures]


def test_bars_of_predictions():
    measured = {"requested": 1000, "allocated": 1000, "reserved": 1000, "device": 1000}
    predicted = {"requested": 1049, "allocated": 949, "reserved": 1099, "device": 500}
    model = {"allocations": 5, "at_recorded_address": 5, "unknown": 0, "error": -0.02}
    figures = {"predicted": {"totals": predicted}, "measured": {"totals": measured}, "allocator": model}
    assert verdicts(prediction_figures(figures)) == [True, False, True, None, False]
    # The CPU's allocator knows requested bytes only.
    del figures["allocator"]
    figures["measured"] = {"totals": {"requested": 1000}}
    assert [(f.name, f.passed) for f in prediction_figures(figures)] == [("requested, predicted/measured - 1", True)]


def test_bars_of_the_op():
    figures = {"scores": 2e-5, "gradients": 1e-3, "unequal_repeats": 0.0}
    assert verdicts(exactness_figures(figures, "fp32")) == [False, False, True]
    assert verdicts(exactness_figures(figures, "bf16")) == [False, True, True]
    figures = {"scores": float("nan"), "gradients": float("inf"), "unequal_repeats": 1.0}
    assert not any(verdicts(exactness_figures(figures, "bf16")))
    assert verdicts(speed_figures({"triton": 3.0, "torch": 9.0, "materialised": 4.0})) == [True, None]
    assert verdicts(speed_figures({"torch": 9.0, "materialised": 4.0})) == [False]


def test_bars_of_the_estimates():
    row = {"id": "E1", "implementation": "ours", "predicted_bytes": 10, "measured_bytes": 10, "measured_on": "a GPU"}
    rows = [row, {**row, "id": "E2", "measured_bytes": 11}, {**row, "id": "E3", "measured_bytes": None}]
    result = estimate_figures(rows)
    assert [(f.value, f.passed) for f in result] == [(0, True), (1, False), (1, False)]
    assert result[-1].note == "E3"


def test_every_figure_is_recorded_and_a_missed_bar_fails_the_test():
    recorded = []
    judge([Figure("good", 1, 2), Figure("only told", 9)], lambda name, value: recorded.append(value))
    with pytest.raises(AssertionError, match=r"bad is 3, its bar 2 \(why\)"):
        judge([Figure("bad", 3, 2, "why"), Figure("good", 1, 2)], lambda name, value: recorded.append(value))
    assert [(r["name"], r["passed"]) for r in recorded] == [
        ("good", True), ("only told", None), ("bad", False), ("good", True)
    ]  # fmt: skip


@pytest.mark.slow
def test_a_setting_that_does_not_end_is_said():
    with pytest.raises(AssertionError, match="longer than 1 s"):
        run_setting(SETTINGS[0], "cpu", limit_s=1)
    with pytest.raises(AssertionError, match=r"exit code 1: .*--preset is 'unknown'"):
        run_setting(Setting("unknown", "unknown", 1), "cpu")


def test_the_op_on_the_cpu():
    result = op_check.exactness("fp32", CPU, "torch")
    assert all(verdicts(exactness_figures(result, "fp32")))
    result = op_check.speed("fp32", CPU, ["torch"], shape=(4, 8, 49, 16, 64), repeats=3)
    assert result["torch"] > 0 and result["materialised"] > 0


class Report:
    """What pytest tells of a test, as far as the tables read it."""

    def __init__(self, test: str, figures: list[Figure], failed: bool = False, message: str = ""):
        self.when, self.nodeid, self.failed, self.skipped = "call", f"file::{test}", failed, False
        self.user_properties = [("figure", figure.to_dict()) for figure in figures]
        crash = type("Crash", (), {"message": message})
        self.longrepr = type("Repr", (), {"reprcrash": crash}) if failed else None


def test_the_page(tmp_path):
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = module.Page("a GPU", tmp_path / "found.md")
    skipped = Report("test_two_gpus", [])
    skipped.when, skipped.skipped, skipped.longrepr = "setup", True, ("file", 1, "Skipped: there are no two GPUs")
    page.pytest_runtest_logreport(skipped)
    exact = exactness_figures({"scores": 1e-7, "gradients": 1e-6, "unequal_repeats": 0.0}, "fp32")
    page.pytest_runtest_logreport(Report("test_exactness[fp32]", exact))
    assert page.missed == 0
    slow = speed_figures({"triton": 5.0, "materialised": 4.0})
    page.pytest_runtest_logreport(Report("test_speed[bf16]", slow, failed=True))
    # A test that ends before it has a figure has missed its bars.
    page.pytest_runtest_logreport(Report("test_speed[fp32]", [], failed=True, message="longer than 60 s"))
    lines = (tmp_path / "found.md").read_text().splitlines()
    assert lines[0].startswith("# Checked on a GPU, 20") and lines[2] == "2 missed their bar."
    assert [line.count("skipped") for line in lines[6:]] == [1, 0, 0, 0, 0, 0]
    assert lines[-2] == (
        "| test_speed[bf16] | triton, time / materialised | 1.25 | 1 | **missed** | 5.00 ms, materialised 4.00 ms |"
    )
    assert lines[-1].startswith("| test_speed[fp32] | runs to its end |") and "longer than 60 s" in lines[-1]


def test_exactness_tells_a_wrong_backend(monkeypatch):
    real = op_check.cmli_scores

    def wrong(image, text, *masks, **options):
        s_i2t, s_t2i = real(image, text, *masks, **options)
        return s_i2t + 1e-4, s_t2i * 1.001

    monkeypatch.setattr(op_check, "SHAPES", op_check.SHAPES[1:2])
    right = op_check.exactness("fp32", CPU, "torch")
    assert right["scores"] < 1e-6 and right["gradients"] < 1e-6 and right["unequal_repeats"] == 0
    monkeypatch.setattr(op_check, "cmli_scores", wrong)
    result = op_check.exactness("fp32", CPU, "torch")
    assert result["scores"] >= 1e-4 and result["gradients"] > 1e-4
    monkeypatch.setattr(
        op_check, "cmli_scores", lambda *x, **_: (real(*x)[0] * torch.rand(()), real(*x)[1] * torch.nan)
    )
    result = op_check.exactness("fp32", CPU, "torch")
    assert result["scores"] == torch.inf and result["unequal_repeats"] > 0


@pytest.mark.parametrize("dtype", op_check.DTYPES)
def test_exact_inputs_are_exact_in_every_dtype(dtype):
    for masks in op_check.MASKS:
        image, text, token_mask, image_mask = op_check.case((3, 4, 9, 7, 256), op_check.DTYPES[dtype], masks, True, CPU)
        wide = op_check.case((3, 4, 9, 7, 256), torch.float64, masks, True, CPU)
        assert torch.equal(image.double(), wide[0]) and torch.equal(text.double(), wide[1])
        assert (image_mask is None) == (masks == "lengths")
        if masks == "holes":
            assert not token_mask[0].any() and not image_mask[-1].any()
