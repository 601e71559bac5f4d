"""python -m tests.fake_cuda.run GPU RANKS ANSWER SCRIPT ARGUMENTS: two steps of a script on a GPU that is not there.

RANKS is 0 without a launcher. ANSWER is a file of JSON: the peaks in bytes, those of each phase, and the streams.
"""

import json
import os
import runpy
import sys
from functools import partial
from pathlib import Path

from ds_cmli.fake_cuda import guard

guard.load()

from ds_cmli.fake_cuda import program  # noqa: E402
from ds_cmli.fake_cuda.answer import Room, on_device, with_cublas  # noqa: E402
from ds_cmli.fake_cuda.steps import CATEGORIES, StepRecorder  # noqa: E402
from ds_cmli.fake_cuda.world import World  # noqa: E402
from ds_cmli.memory_model import gpus  # noqa: E402
from ds_cmli.memory_model.blocks import live_at_peak, peaks_of_phases  # noqa: E402


def main(name: str, ranks: int, answer: str) -> None:
    gpu = gpus.find(name)
    recorder = StepRecorder(gpu.limits, 2)
    script = partial(runpy.run_path, sys.argv[0], run_name="__main__")
    program.run(script, recorder, gpu, World(ranks or None))
    workspaces = gpu.cublas_bytes(os.environ.get("CUBLAS_WORKSPACE_CONFIG"))
    events = with_cublas(recorder.events(), workspaces, recorder.given)
    replayed, device = on_device(events, Room(gpu.name), ranks or 1)
    totals = {kind: getattr(replayed, f"{kind}_peak") for kind in ("requested", "allocated", "reserved")}
    categories = dict.fromkeys(CATEGORIES, 0)
    for event in live_at_peak(events):
        categories[event.category] += event.bytes
    content = {"totals": {**totals, "device": device}, "categories": categories, "phases": peaks_of_phases(events)}
    streams = sorted({event.stream for event in events if event.bytes > 0})
    Path(answer).write_text(json.dumps({**content, "streams": streams}))


if __name__ == "__main__":
    _, name, ranks, answer, *sys.argv = sys.argv
    main(name, int(ranks), answer)
