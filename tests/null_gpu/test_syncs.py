"""A step of training asks the GPU at most three times, and launches its kernels meanwhile."""

import json
from pathlib import Path

import pytest

from tests.null_gpu.processes import run

pytestmark = pytest.mark.null_gpu
PRECISIONS = ("fp16", "bf16", "fp32")
SETTINGS = [(stage, precision, 1) for stage in (1, 2, 3) for precision in PRECISIONS] + [(2, "bf16", 2), (3, "bf16", 2)]
IN_CI = (2, "fp16", 2)


def counted(environment: dict[str, str], folder: Path, content: dict, *settings: str) -> dict:
    """What `count_syncs` prints of a run with this DeepSpeed JSON and `settings`."""
    file = folder / "ds.json"
    file.write_text(json.dumps(content))
    options = ["--output-dir", folder / "run", "--deepspeed_config", file]
    for setting in settings:
        options += ["--set", setting]
    done = run(environment, "-m", "tests.null_gpu.count_syncs", *options)
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"launches"')]
    assert lines, done.stdout + done.stderr
    return json.loads(lines[0])


@pytest.mark.parametrize(
    ("stage", "precision", "accumulation"),
    [IN_CI, *(pytest.param(*setting, marks=pytest.mark.soak) for setting in SETTINGS)],
)
def test_a_step_waits_at_most_three_times(null_gpu, tmp_path, stage, precision, accumulation):
    # A null GPU's memory is the machine's, and DeepSpeed's default buckets would fill it.
    zero = {"stage": stage, "reduce_bucket_size": 10**6}
    content = {"zero_optimization": zero, "gradient_accumulation_steps": accumulation}
    for name in ("fp16", "bf16"):
        content[name] = {"enabled": name == precision}
    syncs = counted(null_gpu(), tmp_path, content)["syncs"]
    if stage == 3:
        # One rank alone waits for the parameters that it keeps, at the end of a step.
        syncs = {place: count for place, count in syncs.items() if "partition_parameters.py" not in place}
    # The kernels are tried once for longer texts.
    syncs = {place: count for place, count in syncs.items() if "cmli/backends.py" not in place}
    assert 0 < sum(syncs.values()) <= 3, syncs


@pytest.mark.soak
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        ("loss.cmli_cut=1e-3",),
        ("optim.cache_on_host=true",),
        ("loss.cmli_cut=1e-3", "optim.cache_on_host=true"),
        ('loss.weights={"cmli_sigmoid":1.0}',),
    ],
)
def test_no_setting_makes_a_step_wait_more_often(null_gpu, tmp_path, accumulation, settings):
    content = {"zero_optimization": {"stage": 2, "reduce_bucket_size": 10**6}, "bf16": {"enabled": True}}
    content["gradient_accumulation_steps"] = accumulation
    syncs = counted(null_gpu(), tmp_path, content, *settings)["syncs"]
    syncs = {place: count for place, count in syncs.items() if "cmli/backends.py" not in place}
    assert 0 < sum(syncs.values()) <= 3, syncs
