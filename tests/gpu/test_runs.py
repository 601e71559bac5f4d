"""Training on a GPU: stopped and gone on with, and on two GPUs against one."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ds_cmli.common.errors import UserError
from ds_cmli.config.presets import load_preset
from ds_cmli.data import assets
from ds_cmli.faults import preemption
from tests.distributed.gradients import gradients
from tests.gpu.figures import Figure, judge
from tests.make import pairs
from tests.metrics_file import metrics
from tests.ranks import ROOT, clean_environment, wait_for

STEPS, LIMIT_S = 30, 300
GRADIENTS_BAR = 1e-4  # of the largest gradient of a parameter, in fp32


class Data(NamedTuple):
    preset: str
    source: str  # of pairs
    note: str


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    """The preset `demo` with its assets; where they cannot be had, and on a null GPU, `tiny` on squares."""
    source = tmp_path_factory.mktemp("data") / "pairs"
    if "NULLGPU" in os.environ:
        return Data("tiny", pairs(source, count=300), "the preset tiny")
    try:
        for name in assets.used(load_preset("demo", {})):
            assets.fetch(name)
        return Data("demo", "demo", "the preset demo")
    except UserError as error:
        return Data("tiny", pairs(source, count=300), f"the preset tiny, as the demo's assets are missing: {error}")


def started(data: Data, folder: Path) -> subprocess.Popen:
    """A run in fp16, with the same bits each time."""
    command = [sys.executable, str(ROOT / "ds_cmli" / "train.py"), "--preset", data.preset, "--data", data.source]
    command += ["--deepspeed_config", str(ROOT / "ds_configs" / "zero2.json"), "--deterministic"]
    command += ["--steps", str(STEPS), "--log-every", "1", "--output-dir", str(folder)]
    with (folder.parent / "output").open("a") as output:
        return subprocess.Popen(command, env=clean_environment(), cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def compared(run: Path) -> list[dict]:
    """The lines of metrics.jsonl; on a null GPU without ranks, which follow from scores that no kernel has computed."""
    lines = metrics(run)
    if "NULLGPU" in os.environ:
        lines = [{name: line[name] for name in line if not name.startswith("eval/")} for line in lines]
    return lines


def test_stopped_and_gone_on_with(device, data, record_property, tmp_path):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    codes = [started(data, whole).wait(LIMIT_S)]
    run, lines = started(data, stopped), stopped / "metrics.jsonl"
    wait_for(lambda: lines.exists() and lines.read_text().count('{"step": ') >= STEPS // 5, run, tmp_path / "output")
    run.send_signal(signal.SIGTERM)
    codes += [run.wait(LIMIT_S), started(data, stopped).wait(LIMIT_S)]
    assert codes == [0, preemption.EXIT_CODE, 0], (codes, (tmp_path / "output").read_text()[-2000:])
    entry, expected = compared(stopped), compared(whole)
    weights = [folder / "model.safetensors" for folder in (stopped, whole)]
    different = len(entry) != len(expected) or sum(a != b for a, b in zip(entry, expected, strict=False))
    last = next(line for line in reversed(expected) if "loss" in line)
    judge(
        [
            Figure("lines of metrics.jsonl that differ", int(different), 0, f"{data.note}, {len(expected)} lines"),
            Figure("files of weights that differ", int(weights[0].read_bytes() != weights[1].read_bytes()), 0),
        ],
        record_property,
    )
    judge([Figure("loss of the last step", last["loss"], None, data.note)], record_property, kernels=True)


def test_two_gpus_give_the_gradients_of_one(device, data, record_property):
    if device != "cuda" or torch.cuda.device_count() < 2:
        pytest.skip("there are no two GPUs")
    two = gradients(4, 2, 1, data.source, world_size=2)
    one = gradients(8, 2, 1, data.source)
    errors = []
    for name, gradient in one["gradients"][0].items():
        difference = (two["gradients"][0][name] - gradient).abs().max()
        errors.append((difference / gradient.abs().max().clamp_min(1e-30)).item())
    losses = (two["losses"] - one["losses"]).abs().max().item()
    judge(
        [
            Figure("gradients of 2 ranks over NCCL, largest error / largest", max(errors), GRADIENTS_BAR),
            Figure(f"losses of {STEPS} steps, largest difference", losses, GRADIENTS_BAR),
        ],
        record_property,
        kernels=True,
    )
