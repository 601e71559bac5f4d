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
    done = run(null_gpu(gpu), *setting.arguments())
    assert done.returncode == 0, done.stdout + done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    totals = predicted(setting.step(), gpus.find(gpu)).totals
    assert totals["requested"] == pytest.approx(counted["requested"], rel=0.005)
    assert totals["reserved"] == pytest.approx(counted["reserved"], rel=0.02)
