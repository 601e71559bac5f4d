import atexit
import contextlib
import gc
import importlib.util
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from ds_cmli import hardware
from ds_cmli.libraries import importing
from tests.ranks import ALONE, ROOT

# A process that trains keeps its freed memory. One that runs hundreds of tests would grow by that until the system
# refuses to fork it. Engines take the function from here, when they are first imported.
hardware.keep_freed_memory = lambda: None
os.environ.setdefault("OMP_NUM_THREADS", "1")
# More would be processes that import torch before they compile anything.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
# Under nohup, or in a shell's background, the tests' processes would inherit ignored signals.
for ignored in (signal.SIGHUP, signal.SIGINT):
    if signal.getsignal(ignored) == signal.SIG_IGN:
        signal.signal(ignored, signal.default_int_handler if ignored == signal.SIGINT else signal.SIG_DFL)
# The longest files first, so that no process waits long for the last one: those with slow tests, then quick ones.
LONGEST = ["features_together", "null_gpu", "watchdog", "prediction", "mistakes"]
LONGEST += ["start", "preemption", "readme", "train"]
ZERO1: dict = {"zero_optimization": {"stage": 1}}  # the least of a DeepSpeed JSON


def pytest_configure(config):
    """Hide GPUs from all tests but those of `-m gpu`: the others compare what CPUs compute, partly to the bit."""
    if config.option.markexpr != "gpu":
        # DeepSpeed's launcher sets the first variable by itself. The second one reaches the processes that it starts.
        os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")
    starts_workers = config.getoption("numprocesses", None) and not hasattr(config, "workerinput")
    if starts_workers and not Path(importlib.util.find_spec("deepspeed").cached).exists():
        # Import the libraries once in a new environment: otherwise each worker compiles the same 5,000 modules.
        imports = "import torch, deepspeed, transformers, timm, torch.utils.tensorboard, tests.drive_train"
        subprocess.run([sys.executable, "-c", imports], cwd=ROOT, capture_output=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call():
    """Release the engines that a test builds. Those of its fixtures stay."""
    if "deepspeed" not in sys.modules:
        return (yield)
    from tests.drive_train import released

    with released():
        return (yield)


def keep_what_is_imported() -> None:
    """Freeze the objects of the libraries, which stay to the end: the garbage collector need not look through them."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # triton would report what is left then as leaked


def pytest_collection_modifyitems(items):
    names = [f"test_{name}.py" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Import what the files of tests import without garbage collection and trackers, as a training does."""
    with importing():
        return (yield)


@pytest.fixture(autouse=True)
def what_a_test_imports_stays_as_well():
    num_modules = len(sys.modules)
    yield
    if len(sys.modules) > num_modules + 100:
        keep_what_is_imported()


@pytest.fixture(scope="session")
def demo():
    """The demo's pictures, fetched once for the whole session."""
    from ds_cmli.data import assets

    assets.fetch("pictures")


@pytest.fixture(scope="module")
def device():
    """This process as the only rank of a process group."""
    from ds_cmli.distributed import process_group

    yield process_group.init()
    process_group.shutdown()


@pytest.fixture(scope="module")
def data(demo):
    """The data of the preset `tiny`."""
    from tests import make

    return make.data_of(make.config())


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> list[str]:
    """`--data` with 60 training pairs and three held out: an epoch ends within a test, and evaluation is quick."""
    from tests.make import pairs

    return ["--data", pairs(tmp_path_factory.mktemp("data") / "pairs", count=63)]


def pretend_fp16(patch: pytest.MonkeyPatch) -> None:
    """Have the device said to have fp16, so that nothing falls back to bf16."""
    from deepspeed.accelerator import get_accelerator

    from ds_cmli import engine

    patch.setattr(get_accelerator(), "is_fp16_supported", lambda: True)
    patch.setattr(get_accelerator(), "supported_dtypes", lambda: [torch.float, torch.bfloat16, torch.half])
    patch.setattr(engine, "adapt_to_device", lambda ds_config: ds_config)


@pytest.fixture
def fp16_device(monkeypatch):
    pretend_fp16(monkeypatch)


@pytest.fixture(scope="session")
def null_gpu():
    """A function `(gpu="A100 80GB")` that gives the environment of a process with a null GPU, for tests with the
    marker `null_gpu`."""
    from tests.null_gpu.build import build, environment

    return partial(environment, build())


@pytest.fixture
def alone(monkeypatch):
    """The environment of a training of one process."""
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)


@contextlib.contextmanager
def same_process():
    """Undo what commands leave in a process: launchers' variables, a process group, ZeRO-3's linear function."""
    environment = dict(os.environ)
    had_group = dist.is_initialized()
    linear = F.linear
    try:
        yield
    finally:
        F.linear = linear
        if dict(os.environ) != environment:
            os.environ.clear()
            os.environ.update(environment)
        if dist.is_initialized() and not had_group:
            dist.destroy_process_group()


@pytest.fixture(autouse=True, scope="module")
def process_of_a_file():
    with same_process():
        yield


@pytest.fixture(autouse=True)
def process_of_a_test():
    with same_process():
        yield
