"""GPUs that cannot run the all-pairs kernels, with the Triton that PyTorch for GPUs brings."""

import pytest

from tests.make import pairs
from tests.null_gpu.processes import run

pytestmark = pytest.mark.null_gpu
REASON = {
    "t4": "the kernels need compute capability 8.0 or later, this GPU has 7.5",
    "b200": "does not compile the kernels for compute capability 10.0",
}


def test_training_starts_there_with_one_line(null_gpu, tmp_path):
    json = tmp_path / "ds.json"
    json.write_text('{"fp16": {"enabled": true}, "zero_optimization": {"stage": 2}}')
    options = ("--preset", "tiny", "--steps", 2, "--output-dir", tmp_path / "run", "--deepspeed_config", json,
               "--data", pairs(tmp_path / "pairs"), "--set", "run.match_maps=0")  # fmt: skip
    done = run(null_gpu("b200"), "ds_cmli/train.py", *options)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if REASON["b200"] in line]
    assert len(lines) == 1 and "take PyTorch's operators, which are slower" in lines[0], done.stdout + done.stderr
    assert "step 2/2" in done.stdout


def test_triton_that_does_not_run_is_refused(null_gpu, tmp_path):
    options = ("--preset", "tiny", "--output-dir", tmp_path / "run", "--set", "loss.cmli_backend=triton")
    done = run(null_gpu("b200"), "ds_cmli/train.py", *options)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert "loss.cmli_backend is 'triton', which does not run (Triton 3" in line and REASON["b200"] in line


TRIED = """
import torch
from ds_cmli.cmli import CMLILoss

torch.set_default_device("cuda")
loss = CMLILoss()
loss(torch.randn(4, 9, 32, requires_grad=True), torch.randn(4, 6, 32), torch.ones(4, 6, dtype=torch.bool)).backward()
"""


def test_the_loss_alone_warns(null_gpu, tmp_path):
    (tmp_path / "tried.py").write_text(TRIED)
    done = run(null_gpu("t4"), tmp_path / "tried.py")
    assert done.returncode == 0, done.stderr
    assert f"CMLI runs without kernels, and slower: {REASON['t4']}" in done.stderr


def test_the_kernels_compile_with_that_triton(null_gpu):
    file = "tests/cmli/test_triton_compile.py"
    options = ("-q", "-p", "no:cacheprovider", "-k", "are_known")
    done = run(null_gpu(), "-m", "pytest", *options, file, timeout=900)
    assert done.returncode == 0, done.stdout[-3000:]
