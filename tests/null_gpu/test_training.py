"""The trainer itself on the null GPU: its groups, its profile of memory, out of memory, and a stop."""

import json
import re
import shlex

import pytest

from tests import make
from tests.gpu.test_gpu import stop_and_resume
from tests.null_gpu.build import run, stand_in

pytestmark = pytest.mark.null_gpu
GPU = "A100 80GB"


def arguments(folder, **options) -> list[str]:
    """The smallest training of four steps, on 24 pairs beside `folder`."""
    data = make.pairs(folder.parent / "pairs")
    fixed = {"--data": data, "--steps": 4, "--log-every": 1, "--output-dir": folder, "--micro-batch": 8}
    return ["ds_cmli/train.py", *make.small(fixed | options)]


def with_memory(env: dict[str, str], size: int) -> dict[str, str]:
    """The environment of the same GPU with so many bytes."""
    described, _, _ = env["NULLGPU"].rpartition(";")
    return env | {"NULLGPU": f"{described};{size}"}


def test_as_many_communicators_are_made_as_are_predicted(null_gpu, tmp_path):
    done = run(null_gpu(GPU) | {"NCCL_DEBUG": "INFO"}, *arguments(tmp_path / "run"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("Init COMPLETE") == 2


def test_the_memory_of_its_first_steps_is_that_of_its_prediction(null_gpu, tmp_path):
    words = arguments(tmp_path / "run", **{"--profile-memory": 2})
    done = run(null_gpu(GPU), *words)
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert content["measurement"]["source"] == "measured: NVIDIA A100-SXM4-80GB"
    totals, categories = content["differences"]["totals"], content["differences"]["categories"]
    assert 0.99 < totals["requested"]["ratio"] < 1.01
    assert 0.98 < totals["reserved"]["ratio"] < 1.02
    assert {categories[name]["bytes"] for name in ("parameters", "optimizer states", "teacher")} == {0}


def test_out_of_memory_is_one_message_with_a_snapshot_and_a_command(null_gpu, tmp_path):
    env = with_memory(null_gpu(GPU), 200_000_000)
    done = run(env, *arguments(tmp_path / "run", **{"--micro-batch": 16}))
    assert done.returncode == 2, done.stdout + done.stderr
    message = done.stderr[done.stderr.index("error: out of memory: rank 0 asked for") :]
    assert "Traceback" not in done.stderr
    assert re.search(r"\n  parameters +[\d,]+ B\n", message)
    snapshot = tmp_path / "run" / "out_of_memory-rank0.pickle"
    assert snapshot.stat().st_size > 1000 and str(snapshot) in message
    (command,) = re.findall("what fits: ds-cmli-memory (.+)", message)
    words = shlex.split(command)
    assert words[:2] == ["--preset", "tiny"] and words[-4:] == ["--world-size", "1", "--fit", GPU]


def test_a_stopped_training_goes_on_to_the_bit(null_gpu, tmp_path):
    words = make.small({"--data": make.pairs(tmp_path / "pairs"), "--micro-batch": 8})
    stop_and_resume(tmp_path, stand_in("ds_cmli/train.py", *words), null_gpu(GPU))
