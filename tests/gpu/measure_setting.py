"""python -m tests.gpu.measure_setting DEVICE JSON: one setting predicted and measured; the last line is the result.

It needs a process of its own, as the measured peaks are those since the process began.
"""

import json
import sys
from typing import Any

from ds_cmli.common import quiet

quiet.silence()

import torch  # noqa: E402

from ds_cmli import engine  # noqa: E402
from ds_cmli.allocator import gpus  # noqa: E402
from ds_cmli.allocator.history import replay_history  # noqa: E402
from ds_cmli.config.deepspeed_config import DeepSpeedConfig  # noqa: E402
from ds_cmli.config.schema import Config  # noqa: E402
from ds_cmli.memory import measure, predict_subprocess  # noqa: E402
from profiling.memory import measure_cpu, measure_gpu  # noqa: E402
from tests.gpu.settings import Setting  # noqa: E402

LIMIT_S = 36_000  # for the prediction: `conftest.run_setting` limits both, by the CPU's time


def measured(config: Config, ds_config: dict[str, Any], world: int) -> dict[str, Any]:
    """Peaks on this GPU, and the error of the allocator's model on the recorded requests."""
    measure.record_history()
    totals = measure_gpu.peaks(config, ds_config, world)
    replayed = replay_history(torch.cuda.memory._snapshot(), torch.cuda.current_device())
    model = {
        "allocations": replayed.allocations,
        "at_recorded_address": replayed.at_recorded_address,
        "unknown": replayed.unknown,
        "error": replayed.reserved_peak_replayed / replayed.reserved_peak_recorded - 1,
    }
    return {"measured": {"totals": totals}, "allocator": model}


def measure_setting(device: str, setting: dict[str, Any]) -> dict[str, Any]:
    wanted = Setting(**setting)
    config, ds_config = wanted.resolve()
    gpu = gpus.listed_name(torch.cuda.get_device_name()) if device == "cuda" else ""
    filled = engine.filled(config, DeepSpeedConfig.of(ds_config), wanted.world, 100)
    config, _ = engine.with_backend(config, filled, torch.device(device, 0))
    # The prediction runs meanwhile, on the CPU.
    with predict_subprocess.Predictor(LIMIT_S) as predictor:
        predictor.send(predict_subprocess.Request(config, ds_config, wanted.world, device, gpu=gpu))
        if device == "cuda":
            out = measured(config, ds_config, wanted.world)
        else:
            out = {"measured": {"totals": measure_cpu.measure(config, ds_config, wanted.world).totals}}
        answer = predictor.receive()
    if answer.report is None:
        raise RuntimeError(f"no prediction: {answer.failed}")
    return {"predicted": answer.report, **out}


if __name__ == "__main__":
    device, setting = sys.argv[1:]
    print("\n" + json.dumps(measure_setting(device, json.loads(setting))), flush=True)
