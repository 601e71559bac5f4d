"""On the null GPU: a step beside its prediction; and the trainer's groups, profile, end without memory, and stop."""

import json
import re

import pytest

from ds_cmli.memory.step_memory import predicted
from ds_cmli.memory_model import gpus
from tests import make
from tests.checkpoint.runs import stop_and_resume
from tests.gpu.settings import DETERMINISTIC, TORCH, Setting
from tests.null_gpu.build import stand_in
from tests.ranks import python

pytestmark = pytest.mark.null_gpu
GPU = "A100 80GB"
FEW = {"student": {"layers": 3}, "teacher": {"block": 2}}


def finished(env: dict[str, str], *words: str) -> str:
    done = python(*stand_in(*words), env=env, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def training(folder, **options) -> list[str]:
    """Return the words of the smallest training of four steps, on 24 pairs beside `folder`."""
    fixed = {"--steps": 4, "--log-every": 1, "--output-dir": folder, "--micro-batch": 8}
    return ["ds_cmli/train.py", *make.small({"--data": make.pairs(folder.parent / "pairs"), **fixed, **options})]


@pytest.mark.parametrize(
    ("gpu", "setting"),
    [
        ("T4", Setting("fallback", "demo", 32, precision="fp16", overrides=TORCH | FEW)),
        ("A100 80GB", Setting("cached", "demo", 64, 8, 1, accumulation=2, checkpointing=True, overrides=FEW)),
        ("H100 80GB", Setting("checkpointing", "demo", 64, 2, checkpointing=True, overrides=FEW)),
        ("H100 80GB", Setting("gathered", "demo", 64, 8, 3, overrides=FEW)),
        ("H100 80GB", Setting("deterministic", "demo", 8, overrides=FEW | DETERMINISTIC)),
    ],
)
def test_a_step_takes_what_is_predicted(null_gpu, gpu, setting):
    counted = json.loads(finished(null_gpu(gpu), *setting.arguments()).splitlines()[-1])
    totals = predicted(setting.step(), gpus.find(gpu)).totals
    assert totals["requested"] == pytest.approx(counted["requested"], rel=0.005)
    assert totals["reserved"] == pytest.approx(counted["reserved"], rel=0.02)


def test_the_memory_and_the_communicators_of_its_first_steps_are_those_of_its_prediction(null_gpu, tmp_path):
    words = training(tmp_path / "run", **{"--profile-memory": 2})
    output = finished(null_gpu(GPU) | {"NCCL_DEBUG": "INFO"}, *words)
    assert output.count("Init COMPLETE") == 2, "communicators"
    content = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert content["measurement"]["source"] == "measured: NVIDIA A100-SXM4-80GB"
    totals = content["differences"]["totals"]
    categories = content["differences"]["categories"]
    assert 0.99 < totals["requested"]["ratio"] < 1.01
    assert 0.98 < totals["reserved"]["ratio"] < 1.02
    assert {categories[name]["bytes"] for name in ("parameters", "optimizer states", "teacher")} == {0}


def test_out_of_memory_is_one_message_with_a_snapshot_and_a_command(null_gpu, tmp_path):
    env = null_gpu(GPU)
    env["NULLGPU"] = env["NULLGPU"].rpartition(";")[0] + ";200000000"  # bytes
    done = python(*stand_in(*training(tmp_path / "run", **{"--micro-batch": 16})), env=env, timeout=600)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout + done.stderr
    message = done.stderr[done.stderr.index("error: out of memory: rank 0 asked for") :]
    assert re.search(r"\n  parameters +[\d,]+ B\n", message)
    snapshot = tmp_path / "run" / "out_of_memory-rank0.pickle"
    assert snapshot.stat().st_size > 1000 and str(snapshot) in message
    assert re.search(f"what fits: ds-cmli-memory --preset tiny .+ --world-size 1 --fit '{GPU}'\n", message)


def test_a_stopped_training_goes_on_to_the_bit(null_gpu, tmp_path):
    words = make.small({"--data": make.pairs(tmp_path / "pairs"), "--micro-batch": 8})
    stop_and_resume(tmp_path, stand_in("ds_cmli/train.py", *words), null_gpu(GPU))
