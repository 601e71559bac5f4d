"""Which backend runs where."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ds_cmli.cmli import backends, chunked
from ds_cmli.cmli.triton.library import required
from tests.conftest import ROOT

ON_GPU = SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(2, 4, 16))


@pytest.mark.parametrize(
    ("capability", "triton", "reason"),
    [
        ((7, 5), "3.9.0", "8.0 or later, this GPU has 7.5"),
        ((10, 0), "3.7.1", "Triton 3.7.1 does not compile .* 10.0"),
        ((10, 3), "3.4.0+git", r"Triton 3\.4\.0\+git does not"),
        ((10, 0), "3.10.0", None),
        ((8, 0), "3.4.0", None),
        ((12, 0), "3.7.1", None),
    ],
)
def test_gpus_that_do_not_run_the_kernels_are_known(capability, triton, reason):
    result = backends.unsuited(capability, triton)
    assert result is None if reason is None else re.search(reason, result)


def test_where_the_kernels_do_not_run_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(backends, "why_no_kernels", lambda *_: "no room")
    with pytest.warns(UserWarning, match="the slower chunked backend: no room"):
        assert backends.backend_of("auto", ON_GPU, ON_GPU) is chunked
    with pytest.raises(RuntimeError, match=r"'triton' cannot be used here \(no room\): use backend='chunked'"):
        backends.backend_of("triton", ON_GPU, ON_GPU)
    assert backends.backend_of("chunked", ON_GPU, ON_GPU) is chunked


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from ds_cmli.cmli import backends, cmli_scores, triton
from ds_cmli.cmli.inputs import Sides
from ds_cmli.cmli.without_data import Assumed, assuming
print(backends.why_not_on((8, 0)), "|", backends.why_not_on((10, 0)))
image, text = torch.ones(2, 3, 16), torch.ones(2, 4, 16)
try:
    cmli_scores(image, text, torch.ones(2, 4, dtype=torch.bool), backend="triton")
except RuntimeError as error:
    print(error)
with assuming(Assumed([4, 4], False, "cuda", ((8, 0), 163 * 1024))), FakeTensorMode():
    sides = Sides(torch.empty(2, 3, 16), torch.empty(2, 4, 16), torch.empty(2, 4, dtype=torch.bool), None)
    print(*(list(out.shape) for out in triton.forward(sides, 1 << 20, True)))
"""


@pytest.mark.parametrize("pytorch, triton", [
    ("2.8.0", "3.7.1"), ("2.13.0+cpu", "3.7.1"), ("2.14.1", "3.8.0"), ("2.15.0+cu132", "3.9.0"), ("3.0.0a0", "3.9.0"),
])  # fmt: skip
def test_the_triton_that_a_pytorch_requires(pytorch, triton):
    assert required(pytorch) == triton


def test_predictions_need_no_triton_and_kernels_do():
    """Without a Triton the version is assumed that the CUDA build of PyTorch requires."""
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    known, refused, shapes = done.stdout.splitlines()
    assert shapes == "[2, 2] [2, 2] [2, 2, 3] [2, 2, 4]"
    version = required(torch.__version__)
    assert ("None | None" in known) == (version == "3.9.0") != (f"Triton {version} does not compile" in known)
    assert refused == "backend='triton' runs on CUDA tensors, not on cpu: use backend='chunked'"
