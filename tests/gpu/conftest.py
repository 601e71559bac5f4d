"""`pytest -m gpu`: what only a GPU can show. Without a GPU these tests skip.

With DS_CMLI_GPU_TESTS_DEVICE=cpu they run on the CPU, which shows that the tests themselves work. On a null GPU, where
they run too, what kernels compute has no bar.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
import torch

from tests.gpu.settings import Setting
from tests.ranks import ROOT, clean_environment

LIMIT_S = 600  # for one setting
# The most valuable first, as GPUs are lent for minutes.
ORDER = (
    "test_predicted_against_measured[demo]",
    "test_exactness",
    "test_stopped",
    "test_two_gpus",
    "test_predicted",
    "test_estimates",
    "test_speed",
)


def pytest_collection_modifyitems(items):
    for item in items:
        own = "test_harness.py"  # of these tests, without a GPU
        if "tests/gpu/" in item.path.as_posix() and item.path.name != own:
            item.add_marker(pytest.mark.gpu)

    def order(item) -> int:
        return next((number for number, name in enumerate(ORDER) if item.name.startswith(name)), -1)

    items.sort(key=order)


@pytest.fixture(scope="session")
def device() -> str:
    name = os.environ.get("DS_CMLI_GPU_TESTS_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use here")
    return name


@pytest.fixture(scope="session")
def backend(device) -> str:
    return "triton" if device == "cuda" else "torch"


@pytest.fixture(scope="session")
def measured(device, request):
    """A function that gives a setting's prediction and measurement.

    The first one that it is asked for runs alone, so that it is there soon; then the others, several at a time.
    """
    selected = [item.callspec.params["setting"] for item in request.session.items if "setting" in _parameters(item)]
    futures: dict[str, Future[dict[str, Any]]] = {}
    with ThreadPoolExecutor(most_jobs(device)) as pool:

        def result(setting: Setting) -> dict[str, Any]:
            for wanted in selected if futures else [setting]:
                if wanted.name not in futures:
                    futures[wanted.name] = pool.submit(run_setting, wanted, device)
            return futures[setting.name].result()

        yield result
        pool.shutdown(cancel_futures=True)


def _parameters(item) -> dict[str, Any]:
    return item.callspec.params if hasattr(item, "callspec") else {}


def run_setting(setting: Setting, device: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Predict and measure in a process of its own; raises `AssertionError` with the reason where that fails."""
    command = [sys.executable, "-m", "tests.gpu.measure_setting", device, json.dumps(setting.to_dict())]
    allocator = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")  # its old name and its new one
    environment = {k: v for k, v in clean_environment().items() if k not in allocator}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit_s)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"longer than {limit_s:.0f} s") from None
    lines = done.stdout.strip().splitlines()
    last = (done.stderr.strip().splitlines() or ["no output"])[-1]
    assert done.returncode == 0 and lines, f"exit code {done.returncode}: {last[:300]}"
    return json.loads(lines[-1])


def most_jobs(device: str) -> int:
    """Two cores for each job, one to measure and one to predict, and 6 GB of the GPU's memory; at most 6 jobs."""
    by_memory = torch.cuda.get_device_properties(0).total_memory // 6_000_000_000 if device == "cuda" else 6
    return max(1, min(6, (os.cpu_count() or 1) // 2, by_memory))
