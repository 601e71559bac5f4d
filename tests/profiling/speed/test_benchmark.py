import json
import os
import subprocess
import sys

import pytest

from ds_cmli.cmli.chunked import kernels
from ds_cmli.cmli.peak_memory import cmli_peak_bytes
from profiling.speed.baselines import DTYPES, D, M, N
from profiling.speed.cmli import breakdown, own_peak
from tests.conftest import run


@pytest.mark.slow
def test_benchmark_writes_what_it_measures(tmp_path):
    file = tmp_path / "rows.json"
    options = ["--batch", "4", "--setting", "captions", "--repeats", "1", "--no-memory"]
    done = run(*options, "--json", str(file), script="profiling.speed.cmli")
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(file.read_text())
    keys = {"name", "setting", "dtype", "B", "forward_s", "step_s", "floor_s", "peak_extra_bytes"}
    assert all(keys <= row.keys() for row in rows)
    timed = {(row["name"], row["dtype"]): row for row in rows if row["step_s"]}
    for contender in [("naive autograd", "fp32"), ("chunked", "fp32"), ("chunked", "bf16"), ("chunked", "fp16")]:
        assert timed[contender]["step_s"] > 0
        assert timed[contender]["floor_s"] > 0
    assert any(row["name"] == "triton" and "not run" in row["note"] for row in rows if "note" in row)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_extra_memory_is_what_the_op_is_known_to_take(dtype):
    I, J = 6, 8  # noqa: E741
    known = cmli_peak_bytes(I, J, N, M, D, DTYPES[dtype], text_lengths=[62] * J).extra
    result = own_peak("chunked", "full", dtype, I, J, "cpu")
    assert 0 <= known - result <= 2 * 4 * I * J  # in backward the gradients of the scores are given


@pytest.mark.slow
def test_the_step_beside_a_plain_loop():
    done = run("--preset", "tiny", "--repeats", "1", "--json", script="profiling.speed.step")
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(done.stdout)
    assert content["ratio"] > 0 and content["ratio_checkpointing"] > 0
    assert content["ratio"] == round(content["trainer_s"] / content["plain_s"], 4)  # of one repetition


def test_where_a_step_goes_adds_up_on_a_busy_machine():
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(os.cpu_count() or 1)]
    try:
        parts = breakdown("captions", 8)
    finally:
        for process in busy:
            process.kill()
            process.wait()
    step = parts.pop("step")
    assert all(0 <= seconds <= step for seconds in parts.values())
    assert sum(parts.values()) == pytest.approx(step)
    kinds = ("scores", "gradients") if kernels.load() else ("maxima", "gathers")
    assert all(parts[kind] > 0 for kind in kinds)
