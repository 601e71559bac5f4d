"""Compiled programs: Inductor's own buffers, or eager mode and a margin."""

import json
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from ds_cmli.allocator import gpus
from ds_cmli.fits.compiled import L2_MIB, AsEager, impossible
from ds_cmli.fits.steps import StepRecorder
from tests.fits.test_fits import fits, script

GPU = ("--gpu", "A100 80GB", "--json", "out.json", "--")
NETWORK = """
import sys, torch
from torch import nn
layers = nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 2048), nn.ReLU(), nn.Linear(2048, 10)
model = nn.Sequential(*layers).cuda()
compiled = torch.compile(model)
optimizer = torch.optim.Adam(model.parameters())
for step in range(3):
    loss = nn.functional.cross_entropy(compiled(torch.randn(256, 512, device="cuda")),
                                       torch.randint(10, (256,), device="cuda"))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
"""


def test_only_compiled_code_that_runs_counts():
    """A library that compiles when it is imported is no compiled program."""
    recorder = StepRecorder(None, 2)
    compile = AsEager(recorder, "no Triton")
    layer, twice = nn.Linear(2, 2), compile(dynamic=True)(lambda x: 2 * x)
    assert compile(layer) is layer and not recorder.compiled and not recorder.inexact
    assert twice(3) == 6 and recorder.compiled
    [line] = recorder.inexact
    assert line == "torch.compile ran as eager mode, which may take more or less: no Triton"
    recorder.compiled = False
    layer(torch.zeros(1, 2))
    assert recorder.compiled


def test_every_gpu_has_a_cache():
    assert {gpus.find(name).capability for name in gpus.all_gpus()} <= L2_MIB.keys()


def test_why_inductor_is_not_followed(monkeypatch):
    monkeypatch.setattr("ds_cmli.fits.compiled.find_spec", lambda _: None)
    assert impossible() == "install triton to follow it"
    monkeypatch.setattr("ds_cmli.fits.compiled.OLDEST", "99")
    assert impossible() == f"torch is {torch.__version__}, and 99 or a later one is needed to follow it"


@pytest.mark.slow
def test_a_network_takes_what_inductor_plans(tmp_path):
    """As PyTorch's own allocator counts on the null GPU, with nothing in Inductor's caches."""
    done = fits(*GPU, script(tmp_path, NETWORK), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    totals, as_eager = json.loads((tmp_path / "out.json").read_text())["totals"], "ran as eager mode"
    if find_spec("triton") is None:
        assert "ran as eager mode, which may take more or less: install triton" in done.stdout
    else:
        assert as_eager not in done.stdout
        assert (totals["requested"], totals["reserved"]) == (122_388_684, 144_703_488)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Inductor is not followed without Triton")
def test_a_compiled_network_of_several_ranks_runs_with_a_line(tmp_path):
    """Dynamo meets what follows the program there, and compiles none of it."""
    joined = 'torch.distributed.init_process_group("nccl")\nmodel = nn.parallel.DistributedDataParallel(model)\n'
    program = script(tmp_path, NETWORK.replace("compiled =", joined + "compiled ="))
    done = fits("--world-size", "2", *GPU, program, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "torch.compile divided no graph by DDP's buckets, which may take more or less" in done.stdout
    # PyTorch's own allocator counts 174,063,616 on the null GPU.
    assert json.loads((tmp_path / "out.json").read_text())["totals"]["reserved"] >= 174_063_616
