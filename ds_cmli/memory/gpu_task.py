"""python -m ds_cmli.memory.gpu_task KIND DEVICE JSON: one check of `gpu_check.py`; the last line is its result."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ds_cmli.common import quiet

quiet.silence()

import torch  # noqa: E402

COMPARE = Path(__file__).resolve().parents[2] / "profiling" / "compare_estimates.py"


def prediction(device: str, setting: dict[str, Any]) -> dict[str, Any]:
    from ds_cmli.memory import apart, cards, measure, measure_cuda, recorded
    from ds_cmli.memory.gpu_settings import Setting

    wanted = Setting(**setting)
    config, ds_config = wanted.resolve()
    card = cards.known(torch.cuda.get_device_name()) if device == "cuda" else ""
    # Predicted meanwhile, on the CPU.
    with apart.Predictor() as predictor:
        predictor.send(apart.Request(config, ds_config, wanted.world, device, card))
        if device == "cuda":
            measure_cuda.record_history()
        measured = measure.measure(config, ds_config, wanted.world, device)
        answer = predictor.receive()
    if answer.report is None:
        raise RuntimeError(f"no prediction: {answer.failed}")
    out: dict[str, Any] = {"predicted": answer.report, "measured": measured.to_dict()}
    if device == "cuda":
        compared = recorded.replay_trace(torch.cuda.memory._snapshot(), torch.cuda.current_device())
        out["allocator"] = {
            "allocations": compared.allocations,
            "at_recorded_address": compared.at_recorded_address,
            "unknown": compared.unknown,
            "error": compared.reserved_error,
        }
    return out


def exactness(device: str, dtype: str, backend: str) -> dict[str, float]:
    from ds_cmli.memory import op_check

    return op_check.exactness(dtype, torch.device(device), backend)


def speed(device: str, dtype: str, backends: list[str]) -> dict[str, float]:
    from ds_cmli.memory import op_check

    if device == "cuda":
        return op_check.speed(dtype, torch.device(device), backends)
    return op_check.speed(dtype, torch.device(device), backends, shape=(4, 8, 49, 16, 64), repeats=3)


def estimates(device: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, str(COMPARE), "--only", "E1,E2,E3,E5", "--json", str(path)]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=folder)
        return {"rows": json.loads(path.read_text())}


KINDS = {"prediction": prediction, "exactness": exactness, "speed": speed, "estimates": estimates}

if __name__ == "__main__":
    kind, device, task = sys.argv[1:]
    result = KINDS[kind](device, **json.loads(task))  # type: ignore[operator]
    print("\n" + json.dumps(result), flush=True)
