"""What `fits` tells beside what PyTorch's own allocator counts on a null GPU, for the same loop."""

import json
import subprocess
import sys

import pytest

from tests.fits.test_fits import LOOP, fits

pytestmark = pytest.mark.null_gpu
COUNTED = """
import json, runpy, sys, torch
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit:
    stats = torch.cuda.memory_stats()
    print(json.dumps({kind: stats[f"{kind}_bytes.all.peak"] for kind in ("requested", "allocated", "reserved")}))
"""


@pytest.mark.parametrize("switches", [("fp32",), ("fp16",), ("bf16", "fused"), ("bf16", "checkpoint")], ids=str)
def test_requested_is_equal_and_reserved_is_close(switches, null_gpu, tmp_path):
    done = fits("--gpu", "A100 80GB", "--json", "out.json", "--", LOOP, *switches, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads((tmp_path / "out.json").read_text())["totals"]
    command = [sys.executable, "-c", COUNTED, LOOP, *switches]
    done = subprocess.run(command, env=null_gpu("a100"), capture_output=True, text=True, timeout=300)
    counted = json.loads(done.stdout.splitlines()[-1])
    # The kernel of fp32's attention returns two numbers on the host, which count as the device's: 16 B in each layer.
    more = told["requested"] - counted["requested"]
    assert more == (3 * 16 if "fp32" in switches else 0)
    assert told["allocated"] == pytest.approx(counted["allocated"], rel=0.003)
    assert told["reserved"] == pytest.approx(counted["reserved"], rel=0.02)
