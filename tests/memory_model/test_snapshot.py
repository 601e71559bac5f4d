"""A prediction written as a snapshot, read by PyTorch's own tools for snapshots of CUDA's allocator."""

import pickle
import re

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


def test_a_snapshot_has_the_replays_state_and_history_and_pytorchs_tools_read_it(tmp_path):
    snapshot.write(EVENTS, tmp_path / "predicted.pickle")
    loaded = pickle.loads((tmp_path / "predicted.pickle").read_bytes())
    segments, trace = loaded["segments"], loaded["device_traces"][0]
    sums = [sum(s[f"{name}_size"] for s in segments) for name in ("requested", "allocated", "total")]
    assert sums == [8 * M + 700, 8 * M + 1024, 54 * M]  # 20 + 32 + 2
    assert all(sum(b["size"] for b in s["blocks"]) == s["total_size"] for s in segments)
    live = peak = 0
    for entry in trace:
        live += {"alloc": 1, "free_completed": -1}.get(entry["action"], 0) * entry["size"]
        peak = max(peak, live)
    assert (peak, live) == (38 * M + 1, 8 * M + 700)
    assert [e["category"] for e in trace if e["action"] == "alloc"] == [e.category for e in EVENTS if e.bytes > 0]

    lines = viz.segments(loaded, format_flamegraph=str).splitlines() + viz.memory(loaded, str).splitlines()
    stacks = [line for line in lines if ";active_allocated;" in line and "gradients" in line]
    assert len(stacks) == 2
    assert all(re.search(r"backward.*gradients.*aten.mul.Tensor 5242880$", line) for line in stacks)
    assert "segments: 3\ntotal_reserved: 54.0MiB\ntotal_allocated: 8.0MiB" in viz.segsum(loaded)
    assert "cudaMalloc(" in viz.trace(loaded) and "Active Memory Timeline" in viz.trace_plot(loaded)
