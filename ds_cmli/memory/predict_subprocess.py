"""Runs predictions in a separate process.

They must not touch the GPU during a training run. The process reads requests as
lines of JSON and answers each with one line.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ds_cmli.common import quiet
from ds_cmli.common.errors import UserError
from ds_cmli.common.json_text import JsonObject, Section
from ds_cmli.config import plugins
from ds_cmli.config.schema import Config
from ds_cmli.distributed.launchers import environment_without_rank


def without_gpu() -> dict[str, str]:
    """The environment variables that a predicting process needs from its start on."""
    # The number of threads is this process's: libraries' workspaces on the CPU depend on it.
    return {
        "CUDA_VISIBLE_DEVICES": "",
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
    }


@dataclass(frozen=True)
class Request:
    config: Config
    ds_config: Section  # with or without "auto" values
    world_size: int
    target: str = "cuda"  # or "cpu"
    gpu: str = ""  # as `gpus.find` takes it; "" on a CPU
    texts: Sequence[Any] | None = None  # as in `predict`

    def to_dict(self) -> JsonObject:
        values = dict(vars(self))
        return values | {"config": self.config.to_dict(), "ds_config": dict(self.ds_config)}


@dataclass(frozen=True)
class PredictionAnswer:
    report: JsonObject | None  # from `Report.to_dict`; None: the prediction failed
    failed: str = ""  # the reason, if there is no report


class Predictor:
    """The predicting process: `send` requests, and `receive` the answers in the same order.

    It is killed `timeout_s` seconds after its start.
    """

    def __init__(self, timeout_s: float = 120):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "ds_cmli.memory.predict_subprocess", *plugins.imported],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=environment_without_rank(**without_gpu()),
            text=True,
        )
        self.timer = threading.Timer(timeout_s, self.process.kill)
        self.timer.daemon = True
        self.timer.start()

    def send(self, request: Request) -> None:
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended, which `receive` will report
            self.process.stdin.write(json.dumps(request.to_dict()) + "\n")
            self.process.stdin.flush()

    def receive(self) -> PredictionAnswer:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            code = self.process.wait()
            return PredictionAnswer(None, f"the predicting process ended with exit code {code}")
        return PredictionAnswer(**json.loads(line))

    def ask(self, request: Request) -> PredictionAnswer:
        self.send(request)
        return self.receive()

    def close(self) -> None:
        """End the process, whether it has answered or not."""
        self.timer.cancel()
        self.process.kill()
        with suppress(BrokenPipeError):
            self.process.communicate()

    def __enter__(self) -> "Predictor":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def answer(request: JsonObject) -> PredictionAnswer:
    from ds_cmli.memory.predict import Options, predict

    try:
        config = Config.from_dict(request["config"])
        prediction = predict(
            config,
            request["ds_config"],
            request["world_size"],
            target=request["target"],
            **({} if request["target"] == "cpu" else {"gpu": request["gpu"]}),
            options=Options(texts=request["texts"]),
        )
        return PredictionAnswer(prediction.report.to_dict())
    except Exception as error:  # after any error the next request must still be answered
        why = " ".join(str(error).split())
        if not isinstance(error, UserError):
            why = f"{type(error).__name__}: {why[:300]}"
        return PredictionAnswer(None, why)


def main() -> None:
    quiet.silence()
    # Only the answers go to the process's stdout; what libraries print there goes to stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    with quiet.without_trackers():
        for name in sys.argv[1:]:
            plugins.load(name)
        for line in sys.stdin:
            answers.write(json.dumps(asdict(answer(json.loads(line)))) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
