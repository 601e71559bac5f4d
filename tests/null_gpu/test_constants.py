"""What `memory_model/gpus.py` says of each card is what PyTorch finds of it on the null GPU."""

import json

import pytest

from ds_cmli.memory_model import gpus
from tests.null_gpu.processes import run

pytestmark = pytest.mark.null_gpu
ASKED = """
import json, os, torch
of = torch.cuda.get_device_properties(0)
held = lambda: torch.cuda.memory_stats()["requested_bytes.all.current"]
x = torch.empty(64, 64, device="cuda", requires_grad=True)
y, before = torch.empty(64, 64, device="cuda"), held()
forward = x @ x
workspaces = held() - before - forward.nbytes
gradient, before = torch.empty_like(forward), held()
forward.backward(gradient)
workspaces += held() - before - x.grad.nbytes
kinds = (of.multi_processor_count, of.max_threads_per_multi_processor, of.shared_memory_per_block_optin)
print(json.dumps([of.name, [of.major, of.minor], *kinds, of.total_memory, workspaces]), flush=True)
os._exit(0)  # before the thread of backward ends, which can abort a busy process
"""


@pytest.mark.parametrize("name", [name for name in gpus.GPUS if "5090" in name])
def test_constants(null_gpu, tmp_path, name):
    """The 40 GB of an A100 are all in which it differs from that of 80 GB."""
    (tmp_path / "asked.py").write_text(ASKED)
    gpu, limits = gpus.find(name), gpus.find(name).limits
    env = null_gpu(name.lower().removeprefix("rtx ").split()[0])
    done = run(env | ({"NULLGPU_MEMORY": str(gpu.total.bytes)} if "40GB" in name else {}), tmp_path / "asked.py")
    assert done.returncode == 0, done.stderr
    called, capability, *others = json.loads(done.stdout)
    expected = [limits.multiprocessors, limits.threads, limits.shared, gpu.total.bytes, gpu.cublas_bytes()]
    assert tuple(capability) == limits.capability and others == expected
    assert gpus.present(called).name in (name, "A100 80GB")
