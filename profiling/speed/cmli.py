"""python -m profiling.speed.cmli [--json FILE]

The all-pairs CMLI scores and everything else that computes them, in one run: time of forward and
of forward and backward, extra memory, and where our own time goes. One that does not run
here is a row that says so.

Floor: the bare matrix product over valid tokens, torch.mm into a preallocated tensor, fp32. It is
no lower bound where that product (MKL) is not the fastest, as on AMD's processors.
Timings: repeats of all contenders interleaved, medians.

Shapes: image [B, N, D], text [B, M, D].
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from ds_cmli.common import quiet

quiet.silence()

import click
import torch

from ds_cmli.cmli import cmli_scores
from ds_cmli.common.cli import run_command
from ds_cmli.memory import cpu_events
from profiling.scripts import compare, run, to_the_end
from profiling.speed import baselines
from profiling.speed.baselines import DTYPES, SETTINGS, D, M, N, Problem, Scores

FILE = click.Path(dir_okay=False, writable=True)


def ours(**options) -> Scores:
    return lambda image, text, mask: cmli_scores(image, text, mask, **options)


# name -> (scores, dtypes, whether it is ours)
CONTENDERS: dict[str, tuple[Scores, tuple[str, ...], bool]] = {
    "naive autograd": (baselines.naive, ("fp32",), False),
    "x-clip": (baselines.x_clip, ("fp32",), False),
    "chunked": (ours(backend="chunked"), ("fp32", "bf16", "fp16"), True),
    "triton": (ours(backend="triton"), ("fp32", "bf16", "fp16"), True),
}


def why_not(name: str, dtype: str, device: str) -> str | None:
    """One line on why a contender does not run here, or None."""
    try:
        Problem("full", 2, 2, DTYPES[dtype], device).step(CONTENDERS[name][0])
    except Exception as error:
        return f"not run: {type(error).__name__}: {error}".splitlines()[0][:110]
    return None


def row(name: str, dtype: str, **more: object) -> dict[str, Any]:
    """One object of --json."""
    figures = ("setting", "B", "forward_s", "step_s", "floor_s", "peak_extra_bytes")
    return {"name": name, "dtype": dtype, **dict.fromkeys(figures), **more}


def compared(
    setting: str, B: int, repeats: int, entries: list[tuple[str, str]], device: str
) -> list[dict[str, Any]]:
    """The rows of contenders in a dtype each; medians of all calls in turn."""
    problems = {dtype: Problem(setting, B, B, DTYPES[dtype], device) for dtype in DTYPES}
    floor = ("floor", "fp32", "")
    calls: dict[tuple[str, str, str], Callable[[], object]] = {floor: problems["fp32"].floor()}
    for name, dtype in entries:
        problem, scores = problems[dtype], CONTENDERS[name][0]
        calls[name, dtype, "forward"] = partial(problem.forward, scores)
        calls[name, dtype, "step"] = partial(problem.step, scores)
    whole = {name: to_the_end(call, torch.device(device)) for name, call in calls.items()}
    times = compare(whole, repeats, time.perf_counter)
    median = {name: statistics.median(own) for name, own in times.items()}
    rows = []
    for name, dtype in entries:
        seconds = {f"{part}_s": median[name, dtype, part] for part in ("forward", "step")}
        rows.append(row(name, dtype, setting=setting, B=B, floor_s=median[floor], **seconds))
    return rows


def own_peak(name: str, setting: str, dtype: str, I: int, J: int, device: str) -> int:  # noqa: E741
    """Bytes that the allocator gives out at the peak of one forward and backward, beyond inputs and
    their gradients; call it in a fresh process.
    """
    scores = CONTENDERS[name][0]
    # Libraries load and start their threads.
    Problem(setting, 2, 2, DTYPES[dtype], device).step(scores)
    problem = Problem(setting, I, J, DTYPES[dtype], device)
    gradients = problem.image.nbytes + problem.text.nbytes
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        problem.step(scores)
        return torch.cuda.max_memory_allocated() - before - gradients
    inputs, results = (problem.image, problem.text), list[tuple[torch.Tensor, torch.Tensor]]()
    forward = cpu_events.sizes(lambda: results.append(scores(*inputs, problem.mask)))
    backward = cpu_events.sizes(lambda: torch.autograd.grad(results.pop(), inputs, problem.grads))
    return max(*accumulate(forward), max(accumulate(backward, initial=sum(forward))) - gradients)


def peak_in_own_process(*case: str | int) -> int | None:
    """What `own_peak` returns of its arguments; None where it fails."""
    command = [sys.executable, "-m", "profiling.speed.cmli", "--peak-of", json.dumps(case)]
    ended = run(command)
    return None if ended.code else int(ended.out.split()[-1])


KINDS = {
    # Of the compiled kernels, which do all of it where there are any:
    "scores": ("cmli: compare",),
    "gradients": ("cmli: gradient",),
    # Of PyTorch's operators:
    "product": ("mkldnn::_linear_pointwise", "aten::mm"),
    "maxima": ("aten::amax", "aten::eq", "aten::eq_", "aten::mul_"),
    "gathers": (
        "aten::_embedding_bag",
        "aten::_embedding_bag_forward_only",
        "aten::index_select",
        "aten::add_",
    ),
    "sorts": ("aten::sort", "aten::searchsorted", "aten::remainder_"),
}
STEP = "the whole step"  # its name in the profiler
REPEATS = 3


def breakdown(setting: str, B: int) -> dict[str, float]:
    """CPU seconds of a step of the chunked backend, of all threads together, by kind of work.

    Each kind has its share of the profiled steps. So the parts add up to the step however busy the
    machine is, which a difference between a timed and a profiled step does not.
    """
    problem, scores = Problem(setting, B, B, torch.float32, "cpu"), CONTENDERS["chunked"][0]
    problem.step(scores)
    steps, shares = [], []
    for _ in range(REPEATS):  # in turn, so that what else the machine does meets both
        started = time.process_time()
        problem.step(scores)
        steps.append(time.process_time() - started)
        shares.append(_shares(lambda: problem.step(scores)))
    step = statistics.median(steps)
    parts = {kind: step * statistics.mean(share[kind] for share in shares) for kind in KINDS}
    return {"step": step, **parts, "overhead": step - sum(parts.values())}


def _shares(step: Callable[[], None]) -> dict[str, float]:
    """The share of each kind of work in the time of one profiled step.

    Operators of a step run one after the other.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    with (
        torch.profiler.profile(activities=activities) as profiler,
        torch.profiler.record_function(STEP),
    ):
        step()
    events = {event.key: event for event in profiler.key_averages()}
    whole = events.pop(STEP).cpu_time_total
    return {
        kind: sum(events[key].self_cpu_time_total for key in keys if key in events) / whole
        for kind, keys in KINDS.items()
    }


@click.command(help=(__doc__ or "").split("\n\n")[1])
@click.option("--batch", "batches", multiple=True, type=click.IntRange(2), default=(32, 64, 128, 256),
              show_default=True)  # fmt: skip
@click.option("--setting", "settings", multiple=True, type=click.Choice(SETTINGS), default=SETTINGS,
              show_default=True)  # fmt: skip
@click.option("--peers-up-to", default=64, show_default=True,
              help="Largest B of the others, who need B^2 memory.")  # fmt: skip
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@click.option("--memory/--no-memory", default=True,
              help="Peak memory at `full` up to that B, each in its own process.")  # fmt: skip
@click.option("--json", "json_path", type=FILE, help="Write the rows here.")
@click.option("--peak-of", hidden=True)
def main(batches, settings, peers_up_to, repeats, memory, json_path, peak_of):
    if peak_of:
        click.echo(own_peak(*json.loads(peak_of)))
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    click.echo(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, N={N} M={M} D={D}; times in ms"
    )
    rows, runnable = list[dict](), list[tuple[str, str]]()
    for name, (_, dtypes, _) in CONTENDERS.items():
        for dtype in dtypes:
            reason = why_not(name, dtype, device)
            if reason is None:
                runnable.append((name, dtype))
                continue
            click.echo(f"{name:26}{dtype:6}{reason}")
            rows.append(row(name, dtype, note=reason))

    click.echo(
        f"\n{'':26}{'':6}{'setting':>9}{'B':>5}{'forward':>10}{'step':>10}{'x floor':>9}{'x naive':>9}{'extra MB':>10}"
    )
    for setting in settings:
        for B in batches:
            entries = [pair for pair in runnable if peers_up_to >= B or CONTENDERS[pair[0]][2]]
            group = compared(setting, B, repeats, entries, device)
            reference = next((r["step_s"] for r in group if r["name"] == "naive autograd"), None)
            for one in group:
                if memory and setting == "full" and peers_up_to >= B:
                    case = one["name"], setting, one["dtype"], B, B, device
                    one["peak_extra_bytes"] = peak_in_own_process(*case)
                extra = one["peak_extra_bytes"]
                megabytes = "" if extra is None else f"{extra / 1e6:.1f}"
                faster = f"{reference / one['step_s']:.2f}" if reference else ""
                click.echo(
                    f"{one['name']:26}{one['dtype']:6}{setting:>9}{B:>5}{one['forward_s'] * 1e3:>10.1f}"
                    f"{one['step_s'] * 1e3:>10.1f}{one['step_s'] / one['floor_s']:>9.2f}{faster:>9}"
                    f"{megabytes:>10}"
                )
            rows += group

    if device == "cpu":
        click.echo("\nWhere a step of `chunked` goes (CPU ms of all threads, B=128)")
        for setting in settings:
            parts = breakdown(setting, 128).items()
            shares = "  ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in parts)
            click.echo(f"{setting:9}{shares}")
    if json_path:
        Path(json_path).write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    run_command(main)
