"""`pytest -m gpu`: what only a GPU can show. Without a GPU these tests skip.

With DS_CMLI_GPU_TESTS_DEVICE=cpu they run on the CPU, which shows that the tests themselves work.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.conftest import ROOT, clean_environment
from tests.gpu.settings import Setting

LIMIT_S = 120  # for one setting


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in item.path.as_posix() and item.path.name != "test_harness.py":
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> str:
    name = os.environ.get("DS_CMLI_GPU_TESTS_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use here")
    return name


@pytest.fixture(scope="session")
def backend(device) -> str:
    return "triton" if device == "cuda" else "chunked"


@pytest.fixture(scope="session")
def measured_settings(device, request):
    """Setting's name -> future of its prediction and measurement; the selected settings run several at a time."""
    selected = [item.callspec.params["setting"] for item in request.session.items if "setting" in _parameters(item)]
    with ThreadPoolExecutor(most_jobs(device)) as pool:
        yield {setting.name: pool.submit(run_setting, setting, device) for setting in selected}
        pool.shutdown(cancel_futures=True)


def _parameters(item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def run_setting(setting: Setting, device: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Predict and measure in a process of its own; raises `AssertionError` with the reason where that fails."""
    command = [sys.executable, "-m", "tests.gpu.measure_setting", device, json.dumps(setting.to_dict())]
    allocator = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # its old name and its new one
    environment = {k: v for k, v in clean_environment().items() if k not in allocator}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, env=environment, cwd=ROOT)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"longer than {limit_s:.0f} s") from None
    lines = done.stdout.strip().splitlines()
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    assert done.returncode == 0 and lines, f"exit code {done.returncode}: {last[:300]}"
    return json.loads(lines[-1])


def most_jobs(device: str) -> int:
    """Two cores for each job, one to measure and one to predict, and 8 GB of the GPU's memory; at most 6 jobs."""
    by_memory = torch.cuda.get_device_properties(0).total_memory // 2**33 if device == "cuda" else 6
    return max(1, min(6, (os.cpu_count() or 1) // 2, by_memory))
