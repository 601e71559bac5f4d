"""The trainer's step on the null GPU beside what is predicted."""

import json

import pytest

from ds_cmli.memory.step_memory import predicted
from ds_cmli.memory_model import gpus
from tests.gpu.settings import TORCH, Setting
from tests.null_gpu.build import run

pytestmark = pytest.mark.null_gpu
DETERMINISTIC = {"run": {"deterministic": True}, "data": {"image_size": 518}}
FEW = {"student": {"layers": 3}, "teacher": {"block": 2}}


def last_line(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


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
    counted = last_line(run(null_gpu(gpu), *setting.arguments()))
    totals = predicted(setting.step(), gpus.find(gpu)).totals
    print(gpu, setting.name, counted, totals)
    assert totals["requested"] == pytest.approx(counted["requested"], rel=0.005)
    assert totals["reserved"] == pytest.approx(counted["reserved"], rel=0.02)


def test_a_step_is_recorded_on_the_gpus_own_thread_of_backward(null_gpu):
    setting = Setting("recorded", "tiny", 8, precision="fp32")
    report = last_line(run(null_gpu("A100 80GB"), *setting.arguments("recorded")))
    expected = predicted(setting.step(), gpus.find("A100 80GB"))
    assert report["source"].startswith("measured: NVIDIA A100")
    assert report["totals"]["requested"] == pytest.approx(expected.totals["requested"], rel=0.005)
    for name in ("parameters", "optimizer states", "activations student"):
        assert report["categories"][name] == pytest.approx(expected.categories[name], rel=0.01), name
