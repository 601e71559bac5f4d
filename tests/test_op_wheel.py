"""The wheel ds-cmli-op, and the op as a kernel of the Hub: each is built, and run without the package."""

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT, clean_environment

pytestmark = pytest.mark.slow

# The libraries that `pip install torch` brings, and those of fits; what is not named is not there.
BROUGHT = ("torch", "torchgen", "functorch", "filelock", "typing_extensions", "sympy", "mpmath", "networkx", "jinja2")
BROUGHT += ("markupsafe", "fsspec", "click", "packaging", "tomli")
RUN = """
import ds_cmli, torch
from ds_cmli.cmli import maxsim
from ds_cmli.common import provenance

queries, documents = (torch.arange(float(n)).sin().reshape(2, -1, 4).requires_grad_() for n in (24, 40))
scores = maxsim(queries, documents)
torch.testing.assert_close(scores, torch.einsum("qid,cjd->qcij", queries, documents).amax(3).sum(2))
scores.sum().backward()
print(ds_cmli.__file__, provenance.version())
"""
PROGRAM = """
import torch

model = torch.nn.Linear(1024, 1024, device="cuda")
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for _ in range(3):
    model(torch.randn(8, 1024, device="cuda")).sum().backward()
    optimizer.step()
"""


def build(source, target):
    """Build the wheel of a folder, and return it."""
    command = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-q", "-w", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = target.glob("*.whl")
    return wheel


class Environment:
    """A virtual environment whose other libraries are this one's, by links."""

    def __init__(self, folder):
        venv.create(folder, with_pip=False)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")
        self.variables = clean_environment() | {"DS_CMLI_CACHE": str(folder / "cache")}
        for name in BROUGHT:
            for folder in map(Path, sys.path):
                for pattern in (name, f"{name}.py", f"{name}-*.dist-info"):
                    for place in folder.glob(pattern):
                        if not (self.site / place.name).exists():
                            os.symlink(place, self.site / place.name)

    def pip(self, *words):
        command = [sys.executable, "-m", "pip", "--python", str(self.python), "--disable-pip-version-check", *words]
        subprocess.run([*command, "-q"], check=True, env=self.variables)

    def run(self, *words):
        done = subprocess.run([*map(str, words)], cwd="/", env=self.variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """The wheels of ds-cmli-op and ds-cmli, built from copies of the sources."""
    folder = tmp_path_factory.mktemp("wheels")
    source = folder / "source"
    for name in ("ds_cmli", "ds_configs", "op"):
        ignored = shutil.ignore_patterns("__pycache__", "build", "*.egg-info")
        shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    return build(source / "op", folder / "op"), build(source, folder / "whole")


def test_the_wheel_runs_with_torch_alone_and_beside_the_other(wheels, tmp_path):
    own, whole = wheels
    (tmp_path / "program.py").write_text(PROGRAM)
    environment = Environment(tmp_path / "venv")
    environment.pip("install", "--no-deps", str(own))
    assert environment.run(environment.python, "-c", RUN).split() == [
        str(environment.site / "ds_cmli_op" / "ds_cmli" / "__init__.py"),
        "0.1.0",
    ]
    command = environment.python.parent / "ds-cmli-fits"
    answer = environment.run(command, "--gpu", "T4 16GB", "--", tmp_path / "program.py")
    assert answer.startswith("2 steps of program.py fit on T4 16GB")
    (record,) = environment.site.glob("ds_cmli_op-*/RECORD")
    parts = {line.split(",")[0] for line in record.read_text().splitlines()}
    for name in ("py.typed", "allocator/gpus.json", "cmli/chunked/kernels.cpp", "cmli/chunked/vectors.h"):
        assert f"ds_cmli_op/ds_cmli/{name}" in parts
    assert any(part.endswith("licenses/LICENSE") for part in parts)

    environment.pip("install", "--no-deps", str(whole))
    (record,) = environment.site.glob("ds_cmli-*/RECORD")
    assert not parts & {line.split(",")[0] for line in record.read_text().splitlines()}
    there = str(environment.site / "ds_cmli" / "__init__.py")
    assert environment.run(environment.python, "-c", RUN).split() == [there, "0.1.0"]
    environment.pip("uninstall", "-y", "ds-cmli")
    assert "ds_cmli_op" in environment.run(environment.python, "-c", RUN)


def test_the_hub_kernel_is_loaded_and_equals_the_reference(tmp_path):
    """By the library's own loader, without this package: C++ kernels, and Triton's in its interpreter."""
    pytest.importorskip("kernels")
    folder = tmp_path / "kernel"
    subprocess.run([sys.executable, "op/hub_kernel.py", str(folder)], cwd=ROOT, check=True)
    script = f"""
import sys
sys.modules["ds_cmli"] = None  # its import is an error
import torch
from pathlib import Path
from kernels import get_local_kernel
from kernels._rust import Digest, DigestAlgorithm, Metadata

folder = Path({str(folder)!r})
for backend in ("cpu", "cuda"):
    variant = folder / "build" / f"torch-{{backend}}"
    metadata = Metadata.read_from_file(variant / "metadata.json")
    metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
kernel = get_local_kernel(folder, backend="cpu")
torch.manual_seed(0)
image, text = torch.randn(3, 7, 16), torch.randn(3, 5, 16)
mask = torch.arange(5) < torch.tensor([[5], [3], [1]])
results = {{}}
for backend in ("reference", "chunked", "triton"):
    sides = [side.clone().requires_grad_() for side in (image, text)]
    scores = kernel.cmli_scores(*sides, mask, backend=backend)
    sum(score.square().sum() for score in scores).backward()
    results[backend] = [*scores, *(side.grad for side in sides)]
for backend in ("chunked", "triton"):
    torch.testing.assert_close(results[backend], results["reference"], rtol=1e-4, atol=1e-4)
print(*kernel.__all__)
"""
    variables = clean_environment() | {"HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", script], cwd="/", env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"CMLILoss", "cmli_scores", "maxsim"} <= set(done.stdout.split())
