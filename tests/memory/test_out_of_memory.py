"""Out of memory: a real process that meets its limit, alone and as one of two ranks."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from ds_cmli.memory import out_of_memory
from tests.ranks import ROOT, clean_environment, environments, start

ZERO2 = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 100_000}}
ROOM = 220  # MB: between what the setting needs with activation checkpointing and without


def run(folder: Path, limited: int, ranks: int = 1, ds_config: dict = ZERO2) -> subprocess.CompletedProcess:
    """Of several ranks: the first exit code, and everything that they wrote."""
    command = [str(ROOT / "tests" / "memory" / "run_out_of_memory.py"), str(folder), str(limited), str(ROOM)]
    command.append(json.dumps(ds_config))
    out, errors = folder / "out", folder / "errors"
    out.write_text("")
    errors.write_text("")
    every = environments(ranks) if ranks > 1 else [clean_environment()]
    programs = [start(command, env, out, errors) for env in every]
    codes = [program.wait(200) for program in programs]
    return subprocess.CompletedProcess(command, codes[0], out.read_text(), errors.read_text())


@pytest.mark.slow
def test_a_process_that_meets_its_limit_ends_with_one_message(tmp_path):
    done = run(tmp_path, 0)
    assert done.returncode == out_of_memory.EXIT_CODE == 2, done.stderr
    assert "Traceback" not in done.stderr and "trained" not in done.stdout
    lines = done.stderr.splitlines()
    assert re.fullmatch(r"error: out of memory: rank 0 asked for [\d,]+ B", lines[0])
    table = [re.fullmatch(r"  (.{24}) +([\d,]+) B", line) for line in lines[1:]]
    sizes = {row[1].strip(): int(row[2].replace(",", "")) for row in table}
    assert "parameters" in sizes and [*sizes.values()] == sorted(sizes.values(), reverse=True)
    # With less there is room.
    again = run(tmp_path, 0, ds_config={**ZERO2, "activation_checkpointing": {}})
    assert (again.returncode, again.stdout.splitlines()[-1]) == (0, "trained"), again.stderr


@pytest.mark.slow
def test_the_other_rank_ends_too(tmp_path):
    done = run(tmp_path, 1, ranks=2)
    assert done.returncode != 0
    assert "trained" not in done.stdout
    assert done.stderr.count("error: out of memory") == 1
    assert "error: out of memory: rank 1 asked for" in done.stderr


def test_the_message_names_what_to_run():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")
    sizes = {"parameters": 7, "gradients": 0, "activations and all else": 9}
    assert out_of_memory.message(error, sizes, "--fit 'A10G 24GB'", "--preset tiny").splitlines() == [
        "out of memory: rank 0 asked for 2,097,152 B",
        "  activations and all else                9 B",
        "  parameters                              7 B",
        "  what fits: ds-cmli-memory --preset tiny --world-size 1 --fit 'A10G 24GB'",
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("NVIDIA H100 NVL", "--fit 'H100 NVL 94GB'"),
        ("NVIDIA L40", "--fit 47810MB --gpu-memory 47810MB --sm 8.9"),
    ],
)
def test_the_advice_is_for_the_gpu_that_ran_out(monkeypatch, name, options):
    for function, value in {
        "mem_get_info": (10**9, 47_810_500_000),
        "get_device_name": name,
        "get_device_capability": (8, 9),
    }.items():
        monkeypatch.setattr(torch.cuda, function, lambda device, value=value: value)
    assert out_of_memory.fit_options(torch.device("cuda")) == options


@pytest.mark.parametrize(
    ("error", "asked"),
    [
        (RuntimeError("[enforce fail at alloc_cpu.cpp:120] err == 0. DefaultCPUAllocator: can't allocate memory: you "
                      "tried to allocate 4096 bytes. Error code 12 (Cannot allocate memory)"), 4096),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.50 MiB. GPU 0 has a total capacity of 22.06 "
                                "GiB of which 9.38 MiB is free."), 21495808),
        (MemoryError(), None),
        (OSError(12, "Cannot allocate memory"), None),
        (RuntimeError("CUDA error: out of memory"), None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), None),
    ],
)  # fmt: skip
def test_shortages_are_known_and_what_was_asked(error, asked):
    assert out_of_memory.is_shortage(error)
    first = out_of_memory.message(error, {}, "", "")
    assert first == "out of memory: rank 0" + (f" asked for {asked:,} B" if asked else "")


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), OSError(28, "No space left"), ValueError("memory")])
def test_other_errors_pass(error, tmp_path, alone):
    assert not out_of_memory.is_shortage(error)
    with (
        pytest.raises(type(error), match=str(error.args[-1])),
        out_of_memory.ending(tmp_path, torch.device("cpu")),
    ):
        raise error
    assert not list(tmp_path.iterdir())
