"""python -m tests.gpu.measure_setting DEVICE JSON: one setting predicted and measured; the last line is the result.

It needs a process of its own, as the measured peaks are those since the process began.
"""

import json
import sys
from typing import Any

from ds_cmli.common import quiet

quiet.silence()

import torch  # noqa: E402

from ds_cmli.config.schema import Config  # noqa: E402
from ds_cmli.memory.profile import record_history  # noqa: E402
from ds_cmli.memory.step_memory import Step, predicted, statistics  # noqa: E402
from ds_cmli.memory_model import gpus  # noqa: E402
from ds_cmli.memory_model.caching_allocator import CachingAllocator  # noqa: E402
from tests.gpu.settings import Setting  # noqa: E402


def measured(config: Config, ds_config: dict[str, Any], world: int) -> dict[str, Any]:
    """Peaks on this GPU, and the error of the allocator's model on the recorded requests."""
    record_history(10**7)
    Step(config, ds_config, world).take_twice()
    device = torch.device("cuda", torch.cuda.current_device())
    trace = torch.cuda.memory._snapshot()["device_traces"][device.index]
    return {"measured": {"totals": statistics(device)}, "allocator": modelled(trace)}


def modelled(trace: list[dict[str, Any]]) -> dict[str, float]:
    """The allocator's model on a history that is whole: from its first allocation on."""
    allocator, live, begins = CachingAllocator(), {}, {}
    reserved = peak = peak_of_model = allocations = at_address = unknown = segment = 0
    for before, entry in zip([None, *trace], trace, strict=False):
        action, address, size = entry["action"], entry["addr"], entry["size"]
        if action == "segment_alloc":
            reserved, segment = reserved + size, address
        elif action == "segment_free":
            reserved -= size
            if before["action"] != action:
                allocator.empty_cache()
        elif action == "alloc":
            block = live[address] = allocator.malloc(size, entry["stream"])
            # Where the device has put each of the model's segments.
            begin = begins.setdefault(block.segment.address, segment)
            allocations += 1
            at_address += address == begin + block.address - block.segment.address
        elif action == "free_completed":
            block = live.pop(address, None)
            unknown += block is None
            if block is not None:
                allocator.free(block)
        peak, peak_of_model = max(peak, reserved), max(peak_of_model, allocator.reserved)
    model = {"allocations": allocations, "at_recorded_address": at_address, "unknown": unknown}
    return {**model, "error": peak_of_model / peak - 1}


def measure_setting(setting: dict[str, Any]) -> dict[str, Any]:
    wanted = Setting(**setting)
    config, ds_config = wanted.resolve()
    out = measured(config, ds_config, wanted.world)
    gpu = gpus.present(torch.cuda.get_device_name())
    return {"predicted": predicted(Step(config, ds_config, wanted.world), gpu).to_dict(), **out}


if __name__ == "__main__":
    _, setting = sys.argv[1:]
    print("\n" + json.dumps(measure_setting(json.loads(setting))), flush=True)
