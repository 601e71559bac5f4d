"""Counts a training run's memory: `python -m tests.null_gpu.count_memory OPTIONS`.

The options are those of train.py. A line of JSON has the peaks of the first two steps by PyTorch's own allocator.
"""

import json

import torch

from ds_cmli import train
from ds_cmli.engine import TrainEngine

STEPS = 2


def main() -> None:
    done, step = 0, TrainEngine.step

    def counted(engine, *arguments, **options):
        nonlocal done
        if done == STEPS:
            stats = torch.cuda.memory_stats()
            kinds = ("requested", "allocated", "reserved")
            print(json.dumps({kind: stats[f"{kind}_bytes.all.peak"] for kind in kinds}), flush=True)
        done += 1
        return step(engine, *arguments, **options)

    TrainEngine.step = counted
    torch.backends.cuda.enable_cudnn_sdp(False)  # the null GPU has none
    train.main()


if __name__ == "__main__":
    main()
