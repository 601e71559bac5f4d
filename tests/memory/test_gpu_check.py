"""The checks for a GPU, run by what this machine has: their bars, their limits in time, their files and exit codes."""

import json
import subprocess
import sys
import time

import pytest
import torch

from ds_cmli.config import deepspeed_json
from ds_cmli.memory import gpu_check, gpu_task, op_check
from ds_cmli.memory.gpu_check import Check, Outcome
from ds_cmli.memory.gpu_settings import SETTINGS
from tests.conftest import ROOT, clean_environment

CPU = torch.device("cpu")


def script(*arguments: object, timeout: float = 300) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "profiling" / "gpu_check.py"), *map(str, arguments)]
    return subprocess.run(command, env=clean_environment(), capture_output=True, text=True, timeout=timeout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_and_exit_code_2(tmp_path):
    done = script("--json", tmp_path / "x.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: no GPU that torch can use here: run this where torch.cuda.is_available()\n"
    assert not list(tmp_path.iterdir())


def test_at_least_20_settings_of_every_kind_all_different():
    assert len(SETTINGS) >= 20
    assert len({s.name for s in SETTINGS}) == len(SETTINGS)
    resolved = []
    for setting in SETTINGS:
        config, ds_config = setting.resolve()
        deepspeed_json.check(ds_config)
        full = deepspeed_json.resolve(ds_config, config.optim, setting.world, 100)
        assert full["train_micro_batch_size_per_gpu"] == setting.batch
        assert config.student.image_weights == config.student.text_weights == config.teacher.weights == "random"
        resolved.append(json.dumps([config.to_dict(), full], sort_keys=True))
    assert len(set(resolved)) == len(SETTINGS)
    assert {s.preset for s in SETTINGS} == {"tiny", "demo", "paper"}
    assert {s.stage for s in SETTINGS} == {0, 1, 2, 3}
    assert {s.precision for s in SETTINGS} == {"fp32", "bf16", "fp16"}
    assert any(s.offload for s in SETTINGS) and any(s.checkpointing for s in SETTINGS)
    assert any(s.accumulation > 1 for s in SETTINGS) and len({s.world for s in SETTINGS}) >= 4
    # The lonely ones one after the other, the rest four at a time: under 8 minutes, if each takes half its limit.
    checks = gpu_check.checks()
    assert {c.kind for c in checks} == set(gpu_task.KINDS)
    assert sum(c.limit_s if c.alone else c.limit_s / 4 for c in checks) / 2 < 8 * 60 * 1.5


def check(kind: str, limit_s: int = 60, **task) -> Check:
    return Check(f"a {kind} check", kind, task, limit_s)


def verdicts(outcome: Outcome) -> dict[str, bool | None]:
    return {row.figure: row.passed for row in gpu_check.rows(outcome)}


def test_bars_of_predictions():
    measured = {"requested": 1000, "allocated": 1000, "reserved": 1000, "device": 1000}
    predicted = {"requested": 1049, "allocated": 949, "reserved": 1099, "device": 500}
    model = {"allocations": 5, "at_recorded_address": 5, "unknown": 0, "error": -0.02}
    found = {"predicted": {"totals": predicted}, "measured": {"totals": measured}, "allocator": model}
    assert list(verdicts(Outcome(check("prediction"), found)).values()) == [True, False, True, None, False]
    # The CPU's allocator knows requested bytes only.
    del found["allocator"]
    found["measured"] = {"totals": {"requested": 1000}}
    assert verdicts(Outcome(check("prediction"), found)) == {"requested, predicted/measured - 1": True}


def test_bars_of_the_op():
    found = {"scores": 2e-5, "gradients": 1e-3, "unequal_repeats": 0.0}
    assert list(verdicts(Outcome(check("exactness", dtype="fp32"), found)).values()) == [False, False, True]
    assert list(verdicts(Outcome(check("exactness", dtype="bf16"), found)).values()) == [False, True, True]
    found = {"scores": float("nan"), "gradients": float("inf"), "unequal_repeats": 1.0}
    assert not any(verdicts(Outcome(check("exactness", dtype="bf16"), found)).values())
    found = {"triton": 3.0, "chunked": 9.0, "materialised": 4.0}
    assert list(verdicts(Outcome(check("speed", backends=["triton", "chunked"]), found)).values()) == [True, None]
    assert list(verdicts(Outcome(check("speed", backends=["chunked"]), found)).values()) == [False]


def test_bars_of_the_estimates():
    row = {"id": "E1", "implementation": "ours", "predicted_bytes": 10, "measured_bytes": 10, "measured_on": "a GPU"}
    rows = [row, {**row, "id": "E2", "measured_bytes": 11}, {**row, "id": "E3", "measured_bytes": None}]
    found = gpu_check.rows(Outcome(check("estimates"), {"rows": rows}))
    assert [(r.value, r.passed) for r in found] == [(0, True), (1, False), (1, False)]
    assert found[-1].note == "E3"


def test_a_check_that_fails_has_missed_its_bars():
    (row,) = gpu_check.rows(Outcome(check("speed"), failed="longer than 60 s"))
    assert (row.passed, row.note) == (False, "longer than 60 s")


def test_real_checks_on_the_cpu():
    seen = []
    todo = [
        Check("exact", "exactness", {"dtype": "fp32", "backend": "chunked"}, 120),
        Check("unknown", "exactness", {"dtype": "fp8", "backend": "chunked"}, 120),
        Check("hurried", "exactness", {"dtype": "fp64", "backend": "chunked"}, 1),
        Check("fast", "speed", {"dtype": "fp32", "backends": ["chunked"]}, 120, alone=True),
    ]
    outcomes = gpu_check.run(todo, 200, 2, "cpu", seen.append)
    assert [o.check.name for o in outcomes] == ["exact", "unknown", "hurried", "fast"]
    assert sorted(o.check.name for o in seen) == sorted(o.check.name for o in outcomes)
    exact, unknown, hurried, fast = outcomes
    assert all(row.passed for row in gpu_check.rows(exact))
    assert unknown.failed == "exit code 1: KeyError: 'fp8'"
    assert hurried.failed == "longer than 1 s"
    assert fast.found["chunked"] > 0 and fast.found["materialised"] > 0


def test_what_no_time_is_left_for_is_said():
    start = time.monotonic()
    outcomes = gpu_check.run([check("exactness", dtype="fp32", backend="chunked")], 0.5, 1, "cpu", lambda o: None)
    assert [o.failed for o in outcomes] == ["no time left"]
    assert time.monotonic() - start < 1


def test_the_files(tmp_path):
    outcomes = [
        Outcome(check("exactness", dtype="fp32"), {"scores": 1e-7, "gradients": 1e-6, "unequal_repeats": 0.0}),
        Outcome(check("speed", backends=["triton"]), {"triton": 5.0, "materialised": 4.0}),
    ]
    paths = tmp_path / "found.json", tmp_path / "found.md"
    gpu_check.write(outcomes[:1], "a GPU", *paths)
    assert json.loads(paths[0].read_text())["passed"] is True
    gpu_check.write(outcomes, "a GPU", *paths)
    content = json.loads(paths[0].read_text())
    assert (content["device"], content["passed"], len(content["rows"])) == ("a GPU", False, 4)
    lines = paths[1].read_text().splitlines()
    assert lines[:3] == ["# Checked on a GPU", "", "2 checks, 4 figures, 1 missed their bar."]
    # What missed its bar comes first.
    assert lines[6] == (
        "| a speed check | triton, time / materialised | 1.25 | 1 | **missed** | 5.00 ms, materialised 4.00 ms |"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["found.json", "found.md"]


def test_the_whole_script_on_the_cpu(tmp_path):
    paths = tmp_path / "found.json", tmp_path / "found.md"
    where = ("--device", "cpu", "--json", paths[0], "--markdown", paths[1])
    done = script(*where, "--only", "tiny", "--jobs", 1)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(paths[0].read_text())
    (row,) = content["rows"]
    assert row["passed"] and abs(row["value"]) < 0.005
    (outcome,) = content["checks"]
    assert (
        outcome["found"]["predicted"]["categories"]["teacher"] == outcome["found"]["measured"]["categories"]["teacher"]
    )

    done = script(*where, "--only", "tiny", "--minutes", 0.01)
    assert done.returncode == 1
    assert json.loads(paths[0].read_text())["passed"] is False
    done = script(*where, "--only", "nothing")
    assert (done.returncode, done.stderr) == (2, "error: --only is 'nothing': no check has that in its name\n")


def test_exactness_tells_a_wrong_backend(monkeypatch):
    real = op_check.cmli_scores

    def wrong(image, text, *masks, **options):
        s_i2t, s_t2i = real(image, text, *masks, **options)
        return s_i2t + 1e-4, s_t2i * 1.001

    monkeypatch.setattr(op_check, "SHAPES", op_check.SHAPES[1:2])
    right = op_check.exactness("fp32", CPU, "chunked")
    assert right["scores"] < 1e-6 and right["gradients"] < 1e-6 and right["unequal_repeats"] == 0
    monkeypatch.setattr(op_check, "cmli_scores", wrong)
    found = op_check.exactness("fp32", CPU, "chunked")
    assert found["scores"] >= 1e-4 and found["gradients"] > 1e-4
    monkeypatch.setattr(
        op_check, "cmli_scores", lambda *x, **_: (real(*x)[0] * torch.rand(()), real(*x)[1] * torch.nan)
    )
    found = op_check.exactness("fp32", CPU, "chunked")
    assert found["scores"] == torch.inf and found["unequal_repeats"] > 0


@pytest.mark.parametrize("dtype", op_check.DTYPES)
def test_exact_inputs_are_exact_in_every_dtype(dtype):
    for masks in op_check.MASKS:
        image, text, text_mask, image_mask = op_check.case((3, 4, 9, 7, 256), op_check.DTYPES[dtype], masks, True, CPU)
        wide = op_check.case((3, 4, 9, 7, 256), torch.float64, masks, True, CPU)
        assert torch.equal(image.double(), wide[0]) and torch.equal(text.double(), wide[1])
        assert (image_mask is None) == (masks == "lengths")
        if masks == "holes":
            assert not text_mask[0].any() and not image_mask[-1].any()
