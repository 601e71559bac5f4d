"""Scripts run on a GPU that is not there: a layer by hand, and our own trainer beside its own prediction."""

import json
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.fake_cuda import guard
from ds_cmli.fake_cuda.answer import KEEPS_WORKSPACES
from ds_cmli.memory.predict import predict
from tests.ranks import ROOT, clean_environment

GPU = "A100 80GB"
TRAINER = str(ROOT / "ds_cmli" / "train.py")
ZERO2 = ROOT / "ds_configs" / "zero2.json"


def fits(folder: Path, *script: str, ranks: int = 0) -> dict:
    """What `tests.fake_cuda.run` writes of a script and its arguments."""
    env = clean_environment() | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    env.pop("DS_ACCELERATOR", None)  # the tests' own; a program is on a GPU here
    command = [sys.executable, "-m", "tests.fake_cuda.run", GPU, str(ranks), "out.json", *script]
    done = subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "out.json").read_text())


def test_a_linear_layer_by_hand(tmp_path):
    """[1024, 1024] fp32 is 4 MiB: the weight, its gradient and SGD's momentum."""
    (tmp_path / "program.py").write_text(
        "import torch\n"
        "layer = torch.nn.Linear(1024, 1024, bias=False).cuda()\n"
        "optimizer = torch.optim.SGD(layer.parameters(), 1e-3, momentum=0.9, foreach=False)\n"
        "for step in range(9):\n"
        "    layer(torch.randn(1024, 1024, device='cuda')).backward(torch.ones(1024, 1024, device='cuda'))\n"
        "    optimizer.step()\n"
        "    optimizer.zero_grad(set_to_none=False)\n",
    )
    answer = fits(tmp_path, "program.py")
    size = 4 << 20
    sizes = answer["categories"]
    assert sizes["parameters"] == sizes["gradients"] == sizes["optimizer states"] == size
    # In the second backward pass: its gradient beside that of the first, cuBLAS' two workspaces of 8,519,680 B, and the
    # input, the output and the output's gradient. From PyTorch 2.15 on there is one workspace, during a product alone.
    kept, passing = (2 * 8_519_680, 0) if KEEPS_WORKSPACES else (0, 8_519_680)
    assert sizes["data"] == sizes["other"] == 0
    assert sizes["activations"] == 3 * size and sizes["temporaries"] == size + kept + passing
    assert answer["totals"]["requested"] == sum(sizes.values())
    # The output's gradient is made before backward.
    assert answer["phases"] == {
        "init": 2 * size,
        "forward": (5 if passing else 6) * size + kept + passing,
        "backward": 7 * size + kept + passing,
        "optimizer": 3 * size + kept,
        "afterwards": 4 * size + kept,  # the next step's input
    }
    assert answer["totals"]["reserved"] == (62_914_560 if kept else 41_943_040)


ON_A_STREAM = """
import torch

side, seen = torch.cuda.Stream(), []

class Noted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        seen.append(torch.cuda.current_stream().stream_id)
        return gradient.clone()

weight = torch.nn.Parameter(torch.zeros(1024, 1024, device="cuda"))
optimizer = torch.optim.SGD([weight], 1e-3)
for step in range(2):
    with torch.cuda.stream(side):
        moved = Noted.apply(weight)
    torch.cuda.current_stream().wait_stream(side)
    Noted.apply(moved).sum().backward()
    assert seen[-2:] == [0, side.stream_id], seen
    assert torch.cuda.current_stream().stream_id == 0
    optimizer.step()
    optimizer.zero_grad()
"""


def test_backward_runs_on_the_streams_of_forward(tmp_path):
    """The gradient that is made on a stream of its own is of that stream."""
    (tmp_path / "program.py").write_text(ON_A_STREAM)
    assert len(fits(tmp_path, "program.py")["streams"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2])
def test_our_own_trainer_takes_what_its_own_prediction_says(ranks, tmp_path):
    """But for the texts, which are not the longest ones in every batch. Several ranks meet by a store of their own."""
    options = ["--preset", "tiny", "--set", "loss.cmli_backend=torch", "--set", "run.match_maps=0"]
    options += ["--set", "student.layers=1", "--set", "teacher.block=0"]
    options += ["--deepspeed_config", str(ZERO2), "--output-dir", "run"]
    content = fits(tmp_path, TRAINER, *options, ranks=0 if ranks == 1 else ranks)["totals"]
    one_block = {"student": {"layers": 1}, "teacher": {"block": 0}}
    config = load_preset("tiny", {"loss": {"cmli_backend": "torch"}, **one_block})
    expected = predict(config, json.loads(ZERO2.read_text()), ranks, gpu=GPU).report.totals
    assert content["reserved"] == expected["reserved"] and content["device"] == expected["device"]
    assert 0 <= 1 - content["requested"] / expected["requested"] < 0.002


@pytest.mark.null_gpu
def test_our_own_trainer_takes_what_pytorchs_allocator_counts(null_gpu, tmp_path):
    """DeepSpeed's steps before the first pass, one for each group of parameters, are not those asked for."""
    from tests.null_gpu.processes import run

    options = ["--preset", "tiny", "--steps", "3", "--set", "loss.cmli_backend=torch"]
    options += ["--losses", "global_sigmoid,cmli", "--deepspeed_config", str(ZERO2)]
    without_data = fits(tmp_path, TRAINER, *options, "--output-dir", "fake")["totals"]
    done = run(null_gpu(), "-m", "tests.null_gpu.count_memory", *options, "--output-dir", tmp_path / "null")
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"requested"')]
    assert lines, done.stdout + done.stderr
    counted = json.loads(lines[0])
    assert without_data["requested"] == counted["requested"]
    assert without_data["reserved"] == pytest.approx(counted["reserved"], rel=0.02)


@pytest.mark.parametrize("installed", ["2.7.1+cu126", "1.13.1"])
def test_versions_of_torch_that_are_too_old(monkeypatch, installed):
    monkeypatch.setattr(guard, "version", lambda _: installed)
    with pytest.raises(UserError, match=re.escape(f"torch is {installed}: give 2.8 or a later one")):
        guard.library()


def test_a_version_of_torch_that_does_not_compile(monkeypatch, tmp_path):
    monkeypatch.setenv("DS_CMLI_CACHE", str(tmp_path))
    (tmp_path / "guard.cpp").write_text("unknown;")
    monkeypatch.setattr(guard, "SOURCE", tmp_path / "guard.cpp")
    with pytest.raises(UserError, match=rf"torch is {re.escape(version('torch'))}: .* cannot compile .*guard.cpp"):
        guard.library()


def test_a_library_that_cannot_be_loaded(monkeypatch, tmp_path):
    (tmp_path / "text.so").write_text("")  # as where the cache's file system takes no programs
    monkeypatch.setattr(guard.native, "library", lambda *_: tmp_path / "text.so")
    with pytest.raises(UserError, match=r"text\.so: file too short: set DS_CMLI_CACHE"):
        guard.load()
