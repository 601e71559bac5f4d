"""python -m tests.null_gpu.measure_settings --card a100 [--only NAME]: settings of tests/gpu/settings.py on a null GPU.

Each is predicted, and measured by PyTorch's own allocator; one line for each shows the measured peaks, the errors of
the prediction, and that of the model of the allocator on the recorded requests. `--json FILE` keeps everything.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PREDICTION_S = 3600  # for all settings
CARDS = {
    "a100": "A100 80GB",
    "3090": "RTX 3090",
    "4090": "RTX 4090",
    "h100": "H100",
    "b200": "B200",
    "5090": "RTX 5090",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", default="a100", choices=CARDS)
    parser.add_argument("--only", default="", help="part of the names of settings")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)  # the environment has been set
    arguments = parser.parse_args()
    if arguments.inside:
        return measure_all(arguments)
    from tests.null_gpu.build import build
    from tests.null_gpu.environment import environment

    command = [sys.executable, "-m", "tests.null_gpu.measure_settings", *sys.argv[1:], "--inside"]
    return subprocess.run(command, env=environment(build(), arguments.card)).returncode


def measure_all(arguments: argparse.Namespace) -> int:
    from ds_cmli.common import quiet

    quiet.silence()
    # Imported before the processes divide, in each of which CUDA must begin anew.
    from ds_cmli.memory import predict_subprocess
    from tests.gpu.measure_setting import measured
    from tests.gpu.settings import PAPER, SETTINGS

    by_name, failed = {}, 0
    with predict_subprocess.Predictor(PREDICTION_S) as predictor:
        for setting in [*SETTINGS, *PAPER]:
            if arguments.only not in setting.name:
                continue
            started = time.monotonic()
            config, ds_config = setting.resolve()
            gpu = CARDS[arguments.card]
            predictor.send(predict_subprocess.Request(config, ds_config, setting.world, gpu=gpu))
            result = in_a_child(lambda: measured(config, ds_config, setting.world))  # noqa: B023
            answer = predictor.receive()
            if answer.report is None or result is None:
                failed += 1
                print(f"{setting.name:42s} failed {answer.failed}", flush=True)
                continue
            result["predicted"] = answer.report
            by_name[setting.name] = result
            print(f"{row(setting.name, result)} {time.monotonic() - started:4.0f} s", flush=True)
            if arguments.json:
                arguments.json.write_text(json.dumps(by_name))
    return 1 if failed else 0


def in_a_child(function: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """The result of `function` in a process of its own; None if it fails."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        try:
            with os.fdopen(writing, "w") as out:
                json.dump(function(), out)
            os._exit(0)
        finally:
            import traceback

            traceback.print_exc()
            os._exit(1)
    os.close(writing)
    with os.fdopen(reading) as results:
        text = results.read()
    _, status = os.waitpid(child, 0)
    return json.loads(text) if status == 0 else None


def row(name: str, result: dict[str, Any]) -> str:
    predicted, real = result["predicted"]["totals"], result["measured"]["totals"]
    cells = []
    for total in ("requested", "allocated", "reserved"):
        error = 100 * (predicted[total] / real[total] - 1)
        cells.append(f"{total[:3]} {real[total] / 1e6:8.1f} MB {error:+6.2f}%")
    model = result["allocator"]
    same = f"{model['at_recorded_address']}/{model['allocations']}"
    return f"{name:42s} {'  '.join(cells)}  model {100 * model['error']:+.2f}% {same}"


if __name__ == "__main__":
    sys.exit(main())
