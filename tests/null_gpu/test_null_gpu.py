"""The null GPU itself, and the trainer's step on it beside what is predicted."""

import json

import pytest

from ds_cmli.memory.step_memory import predicted
from ds_cmli.memory_model import gpus
from tests.gpu.settings import TORCH, Setting
from tests.null_gpu.build import run

pytestmark = pytest.mark.null_gpu
FEW = {"student": {"layers": 3}, "teacher": {"block": 2}}
SEEN = """
import json, torch
from torch.cuda import Stream, empty_cache

def reused():  # a block that another stream may still read: at once, and after a wait for it
    side, used = Stream(), torch.ones(1 << 20, device="cuda")
    address = used.data_ptr()
    used.record_stream(side)
    with torch.cuda.stream(side):
        used.mul_(2)
        event = side.record_event()
    del used
    first = event.query(), torch.empty(1 << 20, device="cuda").data_ptr() == address
    side.synchronize()
    return [*first, event.query(), torch.empty(1 << 20, device="cuda").data_ptr() == address]

def too_much():
    try:
        torch.empty(torch.cuda.mem_get_info()[1] + 1, dtype=torch.uint8, device="cuda")
    except torch.cuda.OutOfMemoryError:
        return True

x, noise = torch.tensor([[3, 0, 5], [1, 1, 1]], device="cuda"), torch.full((3,), torch.inf, device="cuda")
mask = torch.arange(3, device="cuda") < x.sum(1, keepdim=True) - 6
mask[0, 2] = False
print(json.dumps([torch.cuda.get_device_name(), torch.cuda.get_device_capability(), reused(), too_much(),
    x.argsort(1, descending=True).tolist(), int(x.amax()), mask.tolist(), bool(mask.any()), x.add_(1)[0].tolist(),
    noise.isfinite().all().item(), torch.linalg.vector_norm(noise).item(), torch.cat([x[0], x[:, 0]]).tolist()]))
"""


def last_line(done):
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_what_a_program_sees(null_gpu, tmp_path):
    (tmp_path / "seen.py").write_text(SEEN)
    assert last_line(run(null_gpu("RTX 4090"), tmp_path / "seen.py")) == [
        "NVIDIA GeForce RTX 4090", [8, 9], [False, False, True, True], True,
        [[2, 0, 1], [0, 1, 2]], 5, [[True, True, False], [False, False, False]], True, [4, 1, 6],
        True, 0, [4, 1, 6, 4, 2],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("gpu", "setting"),
    [
        ("T4", Setting("fallback", "demo", 32, precision="fp16", overrides=TORCH | FEW)),
        ("A100 80GB", Setting("cached", "demo", 64, 8, 1, accumulation=2, checkpointing=True, overrides=FEW)),
        ("H100 80GB", Setting("checkpointing", "demo", 64, 2, checkpointing=True, overrides=FEW)),
        ("H100 80GB", Setting("gathered", "demo", 64, 8, 3, overrides=FEW)),
    ],
)
def test_a_step_takes_what_is_predicted(null_gpu, gpu, setting):
    counted = last_line(run(null_gpu(gpu), *setting.arguments()))
    totals = predicted(setting.step(), gpus.find(gpu)).totals
    print(gpu, setting.name, counted, totals)
    assert totals["requested"] == pytest.approx(counted["requested"], rel=0.005)
    assert 0.98 * counted["reserved"] <= totals["reserved"] <= 1.1 * counted["reserved"]


def test_a_step_is_recorded_on_the_gpus_own_thread_of_backward(null_gpu):
    setting = Setting("recorded", "tiny", 8, precision="fp32")
    report = last_line(run(null_gpu("A100 80GB"), *setting.arguments("recorded")))
    expected = predicted(setting.step(), gpus.find("A100 80GB"))
    assert report["source"].startswith("measured: NVIDIA A100")
    assert report["totals"]["requested"] == pytest.approx(expected.totals["requested"], rel=0.005)
    for name in ("parameters", "optimizer states", "activations student"):
        assert report["categories"][name] == pytest.approx(expected.categories[name], rel=0.01), name
