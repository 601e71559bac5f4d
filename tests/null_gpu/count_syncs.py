"""Counts a training run's CPU-GPU syncs and kernel launches: `python -m tests.null_gpu.count_syncs OPTIONS`.

The options are those of train.py. A line of JSON says what each of the steps `FIRST` to `LAST` does, on average, from
its beginning to the next one's.
"""

import collections
import ctypes
import json
import sys
import traceback
import warnings

import torch

from ds_cmli import train
from ds_cmli.engine import TrainEngine

FIRST, LAST = 3, 6
PASSED_ON = ("/torch/", "warnings.py", __file__)  # frames that say nothing about the place


def launches() -> int:
    library = ctypes.CDLL("libcudart.so.13")
    return sum(
        ctypes.c_long.in_dll(library, f"nullgpu_{kind}").value for kind in ("launches", "driver_launches", "gemms")
    )


class Counter:
    def __init__(self):
        self.step, self.launches = 0, 0
        self.places: collections.Counter[str] = collections.Counter()

    def note(self, *_, **__) -> None:
        """Count a sync here."""
        frames = [f for f in traceback.extract_stack() if not any(part in f.filename for part in PASSED_ON)]
        self.places[f"{'/'.join(frames[-1].filename.split('/')[-3:])}:{frames[-1].lineno}"] += 1

    def begin(self) -> None:
        torch.cuda.set_sync_debug_mode("warn")
        warnings.filterwarnings("always")
        warnings.showwarning = lambda message, *_: "called a synchronizing" in str(message) and self.note()
        # PyTorch's debug mode does not see this one.
        wait = torch.cuda.synchronize
        torch.cuda.synchronize = lambda *device: (self.note(), wait(*device))[1]
        self.launches = launches()

    def end(self) -> None:
        torch.cuda.set_sync_debug_mode("default")
        steps = LAST - FIRST + 1
        places = {place: count / steps for place, count in self.places.items()}
        print(json.dumps({"launches": (launches() - self.launches) // steps, "syncs": places}), flush=True)

    def before_step(self) -> None:
        self.step += 1
        if self.step == FIRST:
            self.begin()
        if self.step == LAST + 1:
            self.end()


def main() -> None:
    counter, step = Counter(), TrainEngine.step

    def counted(engine, *arguments, **options):
        counter.before_step()
        return step(engine, *arguments, **options)

    TrainEngine.step = counted
    sys.argv[1:1] = ["--preset", "tiny", "--steps", str(LAST + 1), "--set", "run.log_every=100"]
    train.main()


if __name__ == "__main__":
    main()
