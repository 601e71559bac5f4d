"""Where a run's numbers go: metrics.jsonl, TensorBoard, and the terminal. Rank 0 writes, the others do nothing."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


class Writer:
    """`metrics.jsonl` and TensorBoard events in `folder`, and a progress bar or, away from a terminal, plain lines."""

    def __init__(self, folder: Path, total_steps: int, first_step: int = 0):
        self.jsonl = (folder / "metrics.jsonl").open("a", buffering=1)
        self.tensorboard = SummaryWriter(str(folder / "tensorboard"))
        self.total = total_steps
        self.started, self.first_step = time.monotonic(), first_step
        self.bar = tqdm(total=total_steps, initial=first_step, unit="step", disable=not sys.stderr.isatty())

    def say(self, line: str) -> None:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def advance(self) -> None:
        self.bar.update()

    def log(self, step: int, values: dict[str, Any], **only_tensorboard: float) -> None:
        """One object in metrics.jsonl, one point in TensorBoard for each number."""
        self.jsonl.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in {**values, **only_tensorboard}.items():
            if isinstance(value, int | float):
                self.tensorboard.add_scalar(name, value, step)
        if "loss" not in values:
            return
        pairs = values["pairs_per_s"]
        if self.bar.disable:
            left = (time.monotonic() - self.started) / max(1, step - self.first_step) * (self.total - step)
            each = "  ".join(f"{k[5:]} {v:.3f}" for k, v in values.items() if k.startswith("loss/"))
            self.say(
                f"step {step}/{self.total}  loss {values['loss']:.4f}  {each}  lr {values['lr']:.2e}  "
                f"{pairs:.0f} pairs/s  {left // 60:.0f}m{left % 60:02.0f}s left"
            )
        else:
            self.bar.set_postfix_str(f"loss {values['loss']:.4f}, {pairs:.0f} pairs/s")

    def close(self) -> None:
        self.bar.close()
        self.jsonl.close()
        self.tensorboard.close()


class NullWriter:
    """The other ranks' writer."""

    def say(self, line: str) -> None:
        pass

    def advance(self) -> None:
        pass

    def log(self, step: int, values: dict[str, Any], **only_tensorboard: float) -> None:
        pass

    def close(self) -> None:
        pass


def peak_memory_bytes() -> int:
    """Most memory held so far: the allocator's on a GPU, the process's resident set on a CPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
