"""Builds the null GPU, and starts processes with it: `python -m tests.null_gpu.build` prints its folder.

PyTorch's wheel for CUDA is fetched into the cache of ds-cmli, and csrc/ compiled into one library that carries the
names of all those of NVIDIA that it asks for. Needs pip, gcc and binutils.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from filelock import FileLock

from ds_cmli.files import cache_folder
from ds_cmli.memory_model import gpus
from tests.ranks import ROOT, clean_environment

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements.txt"
SOURCES = sorted((HERE / "csrc").glob("*.[ch]"))
NVIDIA = re.compile("__cuda|cu[A-Z]|cu(da|blas|dnn|sparse|fft|file|rand|solver|pti)|nv(rtc|shmem|tx|ml)|p?nccl")


def build() -> Path:
    """Return the null GPU's folder: `site` (PyTorch and Triton), `headers`, and `lib-SUM` for each state of csrc/."""
    version = f"{sys.version_info.major}{sys.version_info.minor}"
    folder = cache_folder() / f"null-gpu-{_sum([REQUIREMENTS])}-cp{version}"
    if (folder / "headers").exists() and library(folder).exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not (folder / "headers").exists():
            _fetch(folder)
        if not library(folder).exists():
            _compile(folder)
    return folder


def library(folder: Path) -> Path:
    return folder / f"lib-{_sum([Path(__file__), *SOURCES])}" / "libnullgpu.so"


def _sum(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]


def _run(command: list, **more) -> str:
    return subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, **more).stdout


def _fetch(folder: Path) -> None:
    """Download the wheels and unpack them: PyTorch without the libraries of NVIDIA, which would come before ours."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix="null-gpu-") as temporary:
        wheels, site, headers = (Path(temporary) / name for name in ("wheels", "site", "headers"))
        options = ["--no-deps", "--only-binary", ":all:", "--require-hashes", "--no-cache-dir", "-r", REQUIREMENTS]
        _run([sys.executable, "-m", "pip", "download", "-q", "-d", wheels, *options])
        for wheel in wheels.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(headers if wheel.name.startswith("nvidia") else site)
            wheel.unlink()
        for program in (site / "triton" / "backends" / "nvidia" / "bin").glob("*"):
            program.chmod(0o755)  # ptxas
        folder.mkdir(exist_ok=True)
        for part in (site, headers):  # the headers last: they say that all is there
            shutil.rmtree(folder / part.name, ignore_errors=True)
            part.rename(folder / part.name)


def _compile(folder: Path) -> None:
    """Compile the C files, and a function that returns 0 for whatever else PyTorch asks of NVIDIA's libraries."""
    users = [*(folder / "site/torch/lib").glob("*.so*"), *(folder / "site/torch").glob("_C*.so")]
    missing = _symbols(users, "--undefined-only") - _symbols(users, "--defined-only")
    include = next((folder / "headers").rglob("cuda_runtime_api.h")).parent
    target = library(folder).parent
    with tempfile.TemporaryDirectory(dir=folder, prefix="lib-") as temporary:
        work = Path(temporary)
        made = work / "lib"
        made.mkdir()
        options = ["-std=gnu11", "-fPIC", "-O1", "-w", f"-I{include}"]
        _run(["gcc", *options, "-fvisibility=hidden", "-c", *HERE.glob("csrc/*.c")], cwd=work)
        ours = _symbols(list(work.glob("*.o")), "--defined-only", dynamic=False)
        other_functions = sorted(name for name in missing - ours if NVIDIA.match(name))
        (work / "others.c").write_text("".join(f"int {name}() {{ return 0; }}\n" for name in other_functions))
        _run(["gcc", *options, "-fno-builtin", "-c", "others.c"], cwd=work)
        libraries = ["-ldl", "-lpthread", "-lm"]
        _run(["gcc", "-shared", "-o", made / "libnullgpu.so", *work.glob("*.o"), *libraries])
        library_names = re.findall(r"NEEDED.*\[(lib(?:cu|nv|nccl).+)\]", _run(["readelf", "-d", *users]))
        for name in {"libcuda.so", "libcuda.so.1", *library_names}:
            (made / name).symlink_to("libnullgpu.so")
        made.chmod(0o755)
        made.rename(target)


def _symbols(files: list[Path], which: str, dynamic: bool = True) -> set[str]:
    out = _run(["nm", *(["-D"] if dynamic else []), which, *files])
    return {line.split()[-1].split("@")[0] for line in out.splitlines() if line and not line.endswith(":")}


def environment(folder: Path, gpu: str = "A100 80GB") -> dict[str, str]:
    """Return the environment of a process with the null GPU in `folder`, as the one that `gpus.find` calls `gpu`."""
    lib = str(library(folder).parent)
    card = gpus.find(gpu)
    name = f"NVIDIA {card.reported_names[0]}"
    sizes = *card.capability, card.multiprocessors, card.max_threads, card.shared_bytes, card.total_bytes
    path = [str(folder / "site"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    device_variables = ("CUDA_VISIBLE_DEVICES", "DS_ACCELERATOR")
    return {name: value for name, value in clean_environment().items() if name not in device_variables} | {
        "NULLGPU": ";".join(map(str, (name, *sizes))),
        "LD_LIBRARY_PATH": lib,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "OMP_NUM_THREADS": "1",
        "TORCH_CUDNN_V8_API_DISABLED": "1",  # convolutions through the interface that csrc/libraries.c answers
        "TRITON_LIBCUDA_PATH": lib,
        "TRITON_CACHE_DIR": str(folder / "triton"),
    }


def stand_in(*command: object) -> list[str]:
    """Return the arguments of Python that run what stands behind `python`, under `stand_in.py`."""
    return ["-m", "tests.null_gpu.stand_in", *map(str, command)]


if __name__ == "__main__":
    print(build())
