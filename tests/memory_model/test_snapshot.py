"""A prediction written as a snapshot, read by PyTorch's own tools for snapshots of CUDA's allocator."""

import base64
import json
import pickle
import re
import subprocess
import sys

import pytest
from torch.cuda import _memory_viz as viz

from ds_cmli.memory_model import snapshot
from ds_cmli.memory_model.caching_allocator import Event

M = 1 << 20
EVENTS = [
    Event(1, 3 * M, "parameters", "init"),
    Event(2, 30 * M + 1, "activations student", "forward", "aten.mm.default"),
    Event(3, 1000, "data", "forward"),
    Event(3, -1000, "data", "forward"),
    Event(4, 5 * M, "gradients", "backward", "aten.mul.Tensor"),
    Event(2, -30 * M - 1, "activations student", "backward"),
    Event(5, 700, "temporaries", "optimizer", "aten.sqrt.default"),
]


@pytest.fixture
def written(tmp_path):
    path = tmp_path / "predicted.pickle"
    return path, snapshot.write(EVENTS, path)


def test_totals_agree_with_the_replay(written):
    path, replayed = written
    loaded = pickle.loads(path.read_bytes())
    requested, allocated, reserved = replayed.timeline[-1]
    assert sum(s["total_size"] for s in loaded["segments"]) == reserved == 54 * M  # 20 + 32 + 2
    assert sum(s["allocated_size"] for s in loaded["segments"]) == allocated == 8 * M + 1024
    assert sum(s["requested_size"] for s in loaded["segments"]) == requested == 8 * M + 700
    blocks = [block for segment in loaded["segments"] for block in segment["blocks"]]
    assert sum(b["requested_size"] for b in blocks if b["state"] == "active_allocated") == requested
    for segment in loaded["segments"]:
        assert sum(b["size"] for b in segment["blocks"]) == segment["total_size"]


def test_the_history_adds_up_to_the_peak(written):
    path, replayed = written
    live = peak = reserved = 0
    for entry in pickle.loads(path.read_bytes())["device_traces"][0]:
        live += {"alloc": 1, "free_completed": -1}.get(entry["action"], 0) * entry["size"]
        reserved += entry["size"] * (entry["action"] == "segment_alloc")
        peak = max(peak, live)
    assert (peak, live, reserved) == (38 * M + 1, 8 * M + 700, 54 * M)
    assert peak == replayed.requested_peak


def test_pytorchs_tools_read_it(written):
    loaded = pickle.loads(written[0].read_bytes())
    lines = viz.segments(loaded, format_flamegraph=str).splitlines() + viz.memory(loaded, str).splitlines()
    stacks = [line for line in lines if ";active_allocated;" in line and "gradients" in line]
    assert len(stacks) == 2
    assert all(re.search(r"backward.*gradients.*aten.mul.Tensor 5242880$", line) for line in stacks)
    assert "segments: 3\ntotal_reserved: 54.0MiB\ntotal_allocated: 8.0MiB" in viz.segsum(loaded)
    assert "cudaMalloc(" in viz.trace(loaded)
    assert viz.compare([], loaded["segments"], str).count("only_after") >= 3


@pytest.mark.parametrize(
    ("plot", "kind"),
    [
        (viz.trace_plot, "Active Memory Timeline"),
        (lambda data: viz.trace_plot(data, plot_segments=True), "Active Cached Memory Timeline"),
        (lambda data: viz.trace_plot(data, filter_freed=True), "Active Memory Timeline"),
        (viz.segment_plot, "Allocator State History"),
    ],
)
def test_the_viewers_page_holds_it(written, plot, kind):
    page = plot(pickle.loads(written[0].read_bytes()))
    assert kind in page
    held = pickle.loads(base64.b64decode(json.loads(re.search(r"local_files = (\[.*\])", page)[1])[0]["base64"]))
    assert [s["total_size"] for s in held["segments"]] == [20 * M, 32 * M, 2 * M]


def test_pytorchs_command_reads_it(written, tmp_path):
    for action in ("stats", "trace"):
        command = [sys.executable, "-m", "torch.cuda._memory_viz", action, str(written[0])]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert "54.0MiB" in done.stdout or "cudaMalloc" in done.stdout


def test_categories_for_the_viewers_colours(written):
    allocs = [e for e in pickle.loads(written[0].read_bytes())["device_traces"][0] if e["action"] == "alloc"]
    assert [e["category"] for e in allocs] == [e.category for e in EVENTS if e.bytes > 0]
