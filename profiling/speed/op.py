"""python -m profiling.speed.op [--beside CHECKOUT]

Measure the all-pairs scores and their loss, forward and backward, and other implementations of them,
also those of another checkout: the time, and the memory beyond inputs and gradients.

Each contender runs in a process of its own. They take turns, so that other load on the machine slows
all of them alike, and the medians are printed. The floor is the bare matrix product over valid
tokens, in fp32. It is not a lower bound if MKL's product is not the fastest, as on AMD's processors.

CMLI is two MaxSims with the sides swapped. On a GPU they come from late-interaction-kernels, if that
is installed.

Shapes: image [I, N, D], text [J, M, D].
"""

import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import click
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ds_cmli.cmli import CMLILoss, cmli_scores

N, M, D = 196, 64, 256
MAX_TOKENS = M - 2  # without [CLS] and [SEP]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}  # elapsed; of all threads together
ROOT = Path(__file__).parents[2]
CONTENDERS = ("scores", "loss", "stored", "x-clip", "maxsim", "floor")


def text_lengths(setting: str, J: int) -> Tensor:
    """Return the number of valid tokens of each text: "full", or about 12 as in "captions"."""
    if setting == "full":
        return torch.full((J,), MAX_TOKENS)
    generator = torch.Generator().manual_seed(1)
    lengths = torch.empty(J).log_normal_(2.35, 0.5, generator=generator)
    lengths = lengths.round().clamp(3, MAX_TOKENS).long()
    lengths[0] = MAX_TOKENS
    return lengths


def upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cmli_from(similarities: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return both scores [I, J] from [I, N, J, M], masked tokens at minus infinity."""
    i2t = similarities.max(3).values.mean(1)
    best_patches = similarities.max(1).values.masked_fill(~token_mask, 0)  # [I, J, M]
    return i2t, best_patches.sum(2) / token_mask.sum(1)


def materialised_scores(image: Tensor, text: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Score all pairs by one matrix product and plain autograd, [I, N, J, M] stored."""
    similarities = upcast(image).flatten(0, 1) @ upcast(text).flatten(0, 1).t()  # [I*N, J*M]
    # In place and before the view, because memory has no room for a copy of this tensor.
    similarities.masked_fill_(~token_mask.flatten(), -torch.inf)
    return cmli_from(similarities.view(*image.shape[:2], *text.shape[:2]), token_mask)


def x_clip(image: Tensor, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Score all pairs by the formula of x-clip 0.14.4, use_all_token_embeds."""
    S = torch.einsum("xtd,yid->xyti", text, image)
    token = mask[:, None, :]
    t2i = S.amax(-1).masked_fill(~token, 0.0).sum(-1) / token.sum(-1).clamp(min=1e-6)
    i2t = S.masked_fill(~token[..., None], -torch.finfo(S.dtype).max).amax(-2).mean(-1)
    return i2t.t(), t2i.t()


def two_maxsims(image: Tensor, text: Tensor, token_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Score all pairs by late-interaction-kernels: MaxSim, a sum of maxima, of each direction."""
    from late_interaction_kernels import maxsim

    i2t = maxsim(image, text, d_mask=token_mask)  # [I, J]
    t2i = maxsim(text, image, q_mask=token_mask)  # [J, I]
    return i2t / image.shape[1], t2i.t() / token_mask.sum(1)


class Problem:
    """Inputs and upstream gradients of I images and J texts, and the contenders that run on them."""

    def __init__(self, setting: str, I: int, J: int, dtype: str, device: str):  # noqa: E741
        generator = torch.Generator().manual_seed(0)
        self.mask = (torch.arange(M) < text_lengths(setting, J)[:, None]).to(device)
        self.image, self.text = (
            F.normalize(torch.randn(count, length, D, generator=generator), dim=-1)
            .to(device, DTYPES[dtype])
            .requires_grad_()
            for count, length in ((I, N), (J, M))
        )
        self.d_scores = [(torch.randn(I, J, generator=generator) / J).to(device) for _ in range(2)]

    def run_scores(self, scores: Callable) -> None:
        out = scores(self.image, self.text, self.mask)
        torch.autograd.grad(out, (self.image, self.text), self.d_scores)

    def run_loss(self) -> None:
        loss = CMLILoss().to(self.image.device)
        value = loss(self.image, self.text, self.mask)
        torch.autograd.grad(value, (self.image, self.text, *loss.parameters()))

    def run_floor(self) -> None:
        with torch.no_grad():
            valid_tokens = self.text[self.mask].float()
            for block in self.image.float().flatten(0, 1).split(16 * N):
                valid_tokens @ block.t()

    def contender(self, name: str) -> Callable[[], None]:
        if name == "loss":
            return self.run_loss
        if name == "floor":
            return self.run_floor
        scores = {
            "scores": cmli_scores,
            "stored": materialised_scores,
            "x-clip": x_clip,
            "maxsim": two_maxsims,
        }
        return lambda: self.run_scores(scores[name])


def cpu_sizes(call: Callable[[], object]) -> list[int]:
    """Return the bytes of `call` by PyTorch's profiler: allocations positive, frees negative."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    results = profiler.profiler.kineto_results  # type: ignore[union-attr]
    events = sorted(results.events(), key=lambda event: event.start_ns())  # type: ignore[union-attr]
    return [event.nbytes() for event in events if event.name() == "[memory]"]


def seconds(call: Callable[[], object], clock: str, device: torch.device) -> float:
    started = CLOCKS[clock]()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()  # CPU-GPU sync
    return CLOCKS[clock]() - started


def time_calls(case: str) -> None:
    """Print the bytes that a call takes, and then the seconds of a call for each line of stdin."""
    name, clock, threads, setting, images, texts, dtype, device = json.loads(case)
    torch.set_num_threads(threads)
    # In a first small call libraries load and start their threads.
    Problem(setting, 2, 2, dtype, device).contender(name)()
    problem = Problem(setting, images, texts, dtype, device)
    call = problem.contender(name)
    gradient_bytes = 0 if name == "floor" else problem.image.nbytes + problem.text.nbytes
    if problem.image.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated() - allocated
    else:
        peak = max(accumulate(cpu_sizes(call)))
    print(max(0, peak - gradient_bytes), flush=True)
    for _ in sys.stdin:
        print(seconds(call, clock, problem.image.device), flush=True)


class ContenderProcess:
    """A process that calls one contender, of one checkout."""

    def __init__(self, checkout: Path, case: tuple, threads: int):
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", json.dumps(case)],
            env=os.environ
            | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads)}
            | {"LIK_SUPPRESS_NORM_WARN": "1"},  # its check reads the features
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.bytes = self.read_number()

    def read_number(self) -> float:
        """Return the number on the next line of the process; NaN if it has failed."""
        assert self.process.stdout is not None
        return float(self.process.stdout.readline() or "nan")

    def seconds(self) -> float:
        if self.process.poll() is None:
            print(file=self.process.stdin, flush=True)
        return self.read_number()


def in_turn(functions: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Call all functions in turn, `repeats` times, and return the results of each.

    Each round has the reverse order of the one before.
    """
    results = {name: list[float]() for name in functions}
    names = list(functions)
    for _ in range(repeats):
        names.reverse()
        for name in names:
            results[name].append(functions[name]())
    return results


class Speed(NamedTuple):
    seconds: float  # the median
    bytes: float  # the peak beyond inputs and gradients


def measure_speed(
    images: int = 64,
    texts: int = 64,
    setting: str = "full",
    dtype: str = "fp32",
    threads: int = 1,
    repeats: int = 9,
    clock: str = "wall",
    device: str = "cuda",
    contenders: tuple[str, ...] = CONTENDERS,
    beside: Path | None = None,
) -> dict[str, Speed]:
    """Measure the contenders in turn; the numbers of one that fails are NaN.

    `maxsim` is left out if there is no GPU or no late-interaction-kernels.
    """
    kernels = importlib.util.find_spec("late_interaction_kernels")
    has_maxsim = device != "cpu" and kernels is not None
    runners = {}
    for name in contenders:
        if name == "maxsim" and not has_maxsim:
            continue
        num_texts = images if name == "loss" else texts
        case = (name, clock, threads, setting, images, num_texts, dtype, device)
        runners[name] = ContenderProcess(ROOT, case, threads)
        if beside is not None and name in ("scores", "loss"):
            runners[f"{name} beside"] = ContenderProcess(beside.resolve(), case, threads)
    times = in_turn({name: runner.seconds for name, runner in runners.items()}, repeats)
    for runner in runners.values():
        runner.process.kill()
    return {name: Speed(statistics.median(times[name]), runners[name].bytes) for name in runners}


@click.command(help=(__doc__ or "").split("\n\n")[1])
@click.option("--images", default=64, show_default=True)
@click.option("--texts", default=64, show_default=True, help="The loss has as many as images.")
@click.option("--setting", type=click.Choice(("full", "captions")), default="full")
@click.option("--dtype", type=click.Choice(tuple(DTYPES)), default="fp32")
@click.option("--threads", default=1, show_default=True)
@click.option("--repeats", default=9, show_default=True)
@click.option("--clock", type=click.Choice(tuple(CLOCKS)), default="wall")
@click.option("--device", default="cuda" if torch.cuda.is_available() else "cpu")
@click.option("--only", default=",".join(CONTENDERS), show_default=True)
@click.option("--beside", type=click.Path(exists=True, path_type=Path), help="Another checkout.")
@click.option("--serve", "case", hidden=True)
def command(only: str, case: str | None, **options) -> None:
    if case:
        return time_calls(case)
    results = measure_speed(contenders=tuple(only.split(",")), **options)
    print(
        "{images} x {texts}, {setting}, {dtype}, {threads} threads, {device}; medians of {repeats}".format(
            **options
        )
    )
    for name, speed in results.items():
        print(f"  {name:16}{speed.seconds * 1e3:10.1f} ms{speed.bytes / 1e6:10.1f} MB")


if __name__ == "__main__":
    command()
