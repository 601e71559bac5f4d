"""What PyTorch's own allocator counts on a null GPU: `fits --engine null`, and `fits` without data beside it."""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.fits.test_fits import ADVERSARIAL, EVALUATED, LOOP, OPERATORS, PENALTY, RANKS, fits, fresh, script

pytestmark = pytest.mark.null_gpu
DEVICE = ("--gpu", "A100 80GB", "--json", "out.json")
TRAINED = """
import json, torch
layer = torch.nn.Linear(1024, 1024, bias=False).cuda()
optimizer = torch.optim.SGD(layer.parameters(), 1e-3, momentum=0.9)
optimizer.step()  # a schedule's trial
for step in range(3):
    layer(torch.randn(1024, 1024, device="cuda")).backward(torch.ones(1024, 1024, device="cuda"))
    stats = torch.cuda.memory_stats()
    print(json.dumps({kind: stats[f"{kind}_bytes.all.peak"] for kind in ("requested", "allocated", "reserved")}))
    optimizer.step()
    optimizer.zero_grad()
"""


def told(folder: Path, *arguments: str) -> dict[str, int]:
    done = fits(*DEVICE, *arguments, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((folder / "out.json").read_text())["totals"]


@pytest.mark.parametrize("switches", [("fp32",), ("fp16",), ("bf16", "fused"), ("bf16", "checkpoint")], ids=str)
def test_requested_is_equal_and_reserved_is_close(switches, null_gpu, tmp_path):
    without_data, counted = (told(tmp_path, "--engine", item, "--", LOOP, *switches) for item in ("fake", "null"))
    assert without_data["requested"] == counted["requested"]
    assert without_data["allocated"] == pytest.approx(counted["allocated"], rel=0.003)
    assert without_data["reserved"] == pytest.approx(counted["reserved"], rel=0.02)


@pytest.mark.parametrize(
    "options",
    [
        ("--losses", "global_sigmoid,flair", "--set", "data.captions=2", "--set", "data.split_sentences=true"),
        ("--losses", "cmli,regions", "--set", "data.regions=4"),
    ],
    ids=["flair", "regions"],
)
def test_our_own_trainer_with_zero_2(options, null_gpu, tmp_path):
    """DeepSpeed's steps before the first pass, one for each group of parameters, are not those asked for."""
    trainer = (str(ROOT / "ds_cmli" / "train.py"), "--preset", "tiny", "--set", "loss.cmli_backend=chunked")
    trainer += ("--deepspeed_config", str(ROOT / "ds_configs" / "zero2.json"), *options)
    without_data, counted = (
        told(tmp_path, "--engine", item, "--", *trainer, "--output-dir", str(tmp_path / item))
        for item in ("fake", "null")
    )
    assert without_data["requested"] == counted["requested"]
    assert without_data["reserved"] == pytest.approx(counted["reserved"], rel=0.02)


def test_what_does_not_fit_is_counted_without_a_limit(null_gpu, tmp_path):
    """Beside a context of 471,859,200 B, 480 MB leave less than a segment of 20 MiB."""
    limit = ("--limit", "480MB", "--json", "out.json", "--snapshot", "out.pickle")
    done = fits("--engine", "null", *limit, "--", script(tmp_path, TRAINED), cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    answer = json.loads((tmp_path / "out.json").read_text())
    printed = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(printed) == 2  # of the second run: the first one ended before
    by_itself, totals = json.loads(printed[-1]), answer["totals"]
    assert {kind: totals[kind] for kind in by_itself} == by_itself
    assert totals["device"] == totals["reserved"] + 471_859_200 and answer["fits"] == {"0.48 GB": False}
    assert "2 steps of program.py do not fit on 0.48 GB: they take 0." in done.stdout
    [history] = pickle.loads((tmp_path / "out.pickle").read_bytes())["device_traces"]
    assert sum(entry["action"] == "segment_alloc" for entry in history) > 1


RECORDER = """
#include <stdio.h>
#include <stdlib.h>
static int note(const char *name) {
  FILE *file = fopen(getenv("RECORDED"), "a");
  fprintf(file, "%s\\n", name);
  fclose(file);
  return ANSWER;
}
__attribute__((constructor)) static void loaded(void) { note("loaded"); }
int cuInit(unsigned flags) { return note("cuInit"); }
int nvmlInit_v2(void) { return note("nvmlInit_v2"); }
"""
COUNTING = """
import ctypes, runpy, sys, torch
sys.argv = sys.argv[1:]
assert torch.__version__.endswith("+cu130")
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    library = ctypes.CDLL("libcudart.so.13")
    for name in ("launches", "gemms", "mallocs", "h2d", "d2h", "stream_syncs", "device_syncs", "event_syncs"):
        print(name, ctypes.c_long.in_dll(library, f"nullgpu_{name}").value)
"""


@pytest.mark.parametrize(
    "answer, program",
    [
        (0, (LOOP, "bf16", "checkpoint")),
        (0, (RANKS, "ddp")),
        (0, (RANKS, "fsdp")),
        (100, (LOOP, "fp32")),
        (None, (LOOP, "fp16")),
    ],
    ids=["GPU", "GPU, DDP", "GPU, FSDP2", "driver alone", "no driver"],
)
def test_a_build_with_cuda_says_the_same_and_touches_no_gpu(answer, program, null_gpu, tmp_path):
    """A stand-in for the driver, and the null GPU for CUDA's runtime, note who calls them: nobody."""
    env, recorded = null_gpu("a100"), tmp_path / "recorded"
    if answer is not None:
        (tmp_path / "recorder.c").write_text(RECORDER)
        for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
            options = ["-shared", "-fPIC", f"-DANSWER={answer}", f"-Wl,-soname,{name}", "recorder.c", "-o", name]
            subprocess.run(["gcc", *options], cwd=tmp_path, check=True)
        env |= {"LD_LIBRARY_PATH": f"{tmp_path}:{env['LD_LIBRARY_PATH']}", "RECORDED": str(recorded)}
        calls = "import ctypes; print(ctypes.CDLL('libcuda.so.1').cuInit(0))"
        called = subprocess.run([sys.executable, "-c", calls], env=env, check=True, capture_output=True, text=True)
        assert int(called.stdout) == answer and recorded.read_text() == "loaded\ncuInit\n"
        recorded.unlink()
    ranks = ("--world-size", "2") if program[0] == RANKS else ()
    of_cpu_build = told(tmp_path, *ranks, "--", *program)
    asked = (*DEVICE, *ranks, "--", script(tmp_path, COUNTING), *program)
    done = fresh(*asked, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out.json").read_text())["totals"] == of_cpu_build
    counts = [line.split() for line in done.stdout.splitlines()[:8]]
    assert [int(count) for _, count in counts] == [0] * 8
    assert not recorded.exists() and "registration" not in done.stderr


def test_one_of_several_ranks(null_gpu, tmp_path):
    """DDP: NCCL's thread may still hold its first bucket of 4 MiB in the second backward pass."""
    world = ("--world-size", "2", "--rank", "1", "--", RANKS, "ddp")
    without_data, counted = (told(tmp_path, "--engine", item, *world) for item in ("fake", "null"))
    for kind in ("reserved", "device"):
        assert without_data[kind] == counted[kind]
    assert without_data["requested"] - counted["requested"] in (0, 4 << 20)


def test_a_mistake_is_the_programs_own(null_gpu, tmp_path):
    done = fits("--engine", "null", *DEVICE, "--", LOOP, "fp32", "mistake", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.endswith("KeyError: 'mine'\n") and "null_gpu" not in done.stderr


def test_packages_for_another_torch_are_refused(null_gpu, tmp_path):
    (tmp_path / "torch-2.12.0.dist-info").mkdir()
    (tmp_path / "torch-2.12.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch\nVersion: 2.12.0\n"
    )
    path = os.pathsep.join((str(ROOT), str(tmp_path)))
    done = fresh("--engine", "null", "--gpu", "T4", "--", LOOP, cwd=tmp_path, PYTHONPATH=path)
    assert done.returncode == 2
    assert done.stderr.startswith(
        "error: --engine null needs packages for one release of torch, and finds 2.12.0 and 2.13"
    )


ATTENTION = str(Path(OPERATORS).with_name("attention.py"))
CARDS = ("T4", "A100 80GB", "RTX 3090", "RTX 5090")  # others have cuDNN's attention


@pytest.mark.soak
@pytest.mark.parametrize("card", CARDS)
def test_attention_holds_as_much_at_most(card, null_gpu, tmp_path):
    """Each of 62 calls in three types, forward and backward; two numbers on the host count as the device's."""
    printed = []
    for engine in ("fake", "null"):
        done = fits(
            "--engine", engine, "--gpu", card, "--", str(Path(OPERATORS).with_name("attention.py")), cwd=tmp_path
        )
        printed += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    without_data, counted = printed
    assert len(counted) == 3 * 62
    low = {
        name: (lines, counted[name])
        for name, lines in without_data.items()
        if any(map(int.__lt__, lines, counted[name]))
    }
    assert not low
    equal = sum(taken == pytest.approx(counted[name], abs=24) for name, taken in without_data.items())
    print(f"{card}: {equal} of {len(counted)} equal within 24 B, the others above")


WARMED_UP = """
import torch
layers = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024) for _ in range(6)]).cuda()
optimizer = torch.optim.AdamW(layers.parameters(), 1e-3, capturable=True)
x, side = torch.randn(256, 1024, device="cuda"), torch.cuda.Stream()
side.wait_stream(torch.cuda.current_stream())
with torch.cuda.stream(side):
    for step in range(3):
        optimizer.zero_grad()
        layers(x).square().mean().backward()
        optimizer.step()
"""


SEVERAL_KINDS = """
import copy, torch
from torch.func import jvp
layer = torch.nn.Linear(512, 512).cuda()
optimizer = torch.optim.SGD(layer.parameters(), 1e-3, momentum=0.9)
codes = torch.randn(1024, 512, device="cuda")
for step in range(9):
    x = torch.randn(256, 512, device="cuda")
    torch.mv(codes, x[0])
    torch.nn.functional.one_hot(torch.cdist(x, codes).argmin(1), 1024).sum(0)
    codes[codes < 0] = 0.0
    out, tangent = jvp(layer, (x.view(4, 8, 8, 512),), (x.view(4, 8, 8, 512),))
    (out - tangent).square().mean().backward()
    optimizer.step()
    teacher = copy.deepcopy(layer)
    optimizer.zero_grad()
"""


@pytest.mark.parametrize(
    "text",
    [WARMED_UP, PENALTY, EVALUATED, SEVERAL_KINDS],
    ids=["warm-up", "penalty", "evaluated", "several"],
)
def test_a_program_takes_as_much(text, null_gpu, tmp_path):
    """A CUDA graph's warm-up takes cuBLAS' workspaces on its own stream; a penalty needs a gradient's gradient; an
    evaluation after the last step takes the most; a copy of a layer has no gradients, nor a derivative zeros."""
    program = script(tmp_path, text)
    without_data, counted = (told(tmp_path, "--engine", item, "--", program) for item in ("fake", "null"))
    assert without_data == counted


def test_an_optimizer_that_has_not_stepped_is_no_fit(null_gpu, tmp_path):
    done = fits("--engine", "null", *DEVICE, "--", script(tmp_path, ADVERSARIAL), "100", cwd=tmp_path)
    assert done.returncode == 3, done.stderr
    assert "22 steps of program.py fit on" in done.stdout and "but SGD did no step, and what that takes" in done.stdout
    assert json.loads((tmp_path / "out.json").read_text())["waited_for"] == ["SGD"]


def test_operators_hold_as_much_at_most(null_gpu, tmp_path):
    printed = []
    for engine in ("fake", "null"):
        done = fits("--engine", engine, "--gpu", "A100 80GB", "--", OPERATORS, cwd=tmp_path)
        printed += [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(printed) == 2
    without_data, counted = (item.pop("index by a mask") for item in printed)
    assert without_data == pytest.approx(counted, abs=1024)  # what cub holds to count a mask's places
    assert printed[0] == printed[1]
