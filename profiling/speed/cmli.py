"""python -m profiling.speed.cmli [--json FILE] [--plot FILE]

The all-pairs CMLI scores and everything else that computes them, in one run: time of forward and
of forward and backward, extra memory, where our own time goes, and how it grows. Peers come with
`pip install -e '.[bench]'`; one that is missing or does not run here is a row that says so.

Floor: the bare matrix product over valid tokens, torch.mm into a preallocated tensor, fp32. It is
no lower bound where that product (MKL) is not the fastest, as on AMD's processors.
Timings: repeats of all contenders interleaved, medians.

Shapes: image [B, N, D], text [B, M, D].
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from typing import Any

from ds_cmli.common import quiet

quiet.silence()

import click
import torch

from ds_cmli.cmli import cmli_scores
from ds_cmli.common import plots
from ds_cmli.common.cli import run_command
from ds_cmli.memory import cpu_events
from profiling.scripts import Name, compare, no_label, plain, run, to_the_end
from profiling.speed import baselines
from profiling.speed.baselines import DTYPES, SETTINGS, D, M, N, Problem, Scores

FILE = click.Path(dir_okay=False, writable=True)


def ours(**options) -> Scores:
    return lambda image, text, mask: cmli_scores(image, text, mask, **options)


# The chunked backend's least memory: no argmax saved, half the default scratch.
THRIFTY = "recompute, 32 MB"
# name -> (scores, dtypes, whether it is ours)
CONTENDERS: dict[str, tuple[Scores, tuple[str, ...], bool]] = {
    "naive autograd": (baselines.naive, ("fp32",), False),
    "x-clip": (baselines.x_clip, ("fp32",), False),
    "sentence-transformers": (baselines.sentence_transformers, ("fp32",), False),
    "late-interaction-kernels": (baselines.late_interaction_kernels, ("fp32",), False),
    "flash-maxsim": (baselines.flash_maxsim, ("fp32",), False),
    "chunked": (ours(backend="chunked"), ("fp32", "bf16", "fp16"), True),
    THRIFTY: (ours(backend="chunked", recompute=True, scratch_bytes=32 << 20), ("fp32",), True),
    "triton": (ours(backend="triton"), ("fp32", "bf16", "fp16"), True),
}


def why_not(name: str, dtype: str, device: str) -> str | None:
    """One line on why a contender does not run here, or None."""
    try:
        Problem("full", 2, 2, DTYPES[dtype], device).step(CONTENDERS[name][0])
    except Exception as error:
        return f"not run: {type(error).__name__}: {error}".splitlines()[0][:110]
    return None


def row(
    name: str, setting: str | None, dtype: str, B: int | None, **more: object
) -> dict[str, Any]:
    """One object of --json."""
    figures = dict.fromkeys(("forward_s", "step_s", "floor_s", "peak_extra_bytes"))
    return {"name": name, "setting": setting, "dtype": dtype, "B": B, **figures, **more}


def medians(
    calls: Mapping[Name, Callable[[], object]], repeats: int, device: str
) -> dict[Name, float]:
    """Seconds of each call, all of them in turn."""
    whole = {name: to_the_end(call, torch.device(device)) for name, call in calls.items()}
    times = compare(whole, repeats, time.perf_counter)
    return {name: statistics.median(own) for name, own in times.items()}


def compared(
    setting: str, B: int, repeats: int, peers: bool, runnable: list[tuple[str, str]], device: str
) -> list[dict[str, Any]]:
    problems = {dtype: Problem(setting, B, B, DTYPES[dtype], device) for dtype in DTYPES}
    entries = [(name, dtype) for name, dtype in runnable if peers or CONTENDERS[name][2]]
    calls: dict[tuple[str, str, str], Callable[[], object]] = {
        ("floor", "fp32", ""): problems["fp32"].floor()
    }
    for name, dtype in entries:
        problem, scores = problems[dtype], CONTENDERS[name][0]
        calls[name, dtype, "forward"] = partial(problem.forward, scores)
        calls[name, dtype, "step"] = partial(problem.step, scores)
    median = medians(calls, repeats, device)
    rows = []
    for name, dtype in entries:
        forward, step = median[name, dtype, "forward"], median[name, dtype, "step"]
        seconds = {"forward_s": forward, "step_s": step, "floor_s": median["floor", "fp32", ""]}
        rows.append(row(name, setting, dtype, B, **seconds))
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
    inputs, found = (problem.image, problem.text), list[tuple[torch.Tensor, torch.Tensor]]()
    forward = cpu_events.sizes(lambda: found.append(scores(*inputs, problem.mask)))
    backward = cpu_events.sizes(lambda: torch.autograd.grad(found.pop(), inputs, problem.grads))
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
    parts = {kind: step * statistics.mean(each[kind] for each in shares) for kind in KINDS}
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


def scaling(setting: str, batches: list[int], repeats: int, device: str) -> list[dict[str, Any]]:
    """One rank's block row of G/P images against G texts: time by G^2/P and by valid patch-token
    pair.
    """
    scores = ours()
    ranks = [(G, 1) for G in batches] + [(batches[-1], 2), (batches[-1], 4)]
    problems = {(G, P): Problem(setting, G // P, G, torch.float32, device) for G, P in ranks}
    calls = {place: partial(problem.step, scores) for place, problem in problems.items()}
    rows = []
    for (G, P), seconds in medians(calls, repeats, device).items():
        pairs = G // P * N * problems[G, P].tokens
        more = {"G": G, "P": P, "step_s": seconds, "ns_per_pair": seconds / pairs * 1e9}
        rows.append(row("scaling", setting, "fp32", G // P, **more))
    return rows


def megabytes(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.1f}"


def draw(rows: list[dict], path: str) -> None:
    if not plots.installed():
        click.echo("no plot: matplotlib is not installed; pip install -e '.[bench]'")
        return
    pyplot = plots.matplotlib("--plot")
    figure, axes = pyplot.subplots(
        1, len(SETTINGS), figsize=(15, 4), sharey=True, layout="constrained"
    )
    for axis, setting in zip(axes, SETTINGS, strict=True):
        timed = [
            r for r in rows if r["setting"] == setting and r["step_s"] and r["name"] != "scaling"
        ]
        for number, (name, dtype) in enumerate(
            dict.fromkeys((r["name"], r["dtype"]) for r in timed)
        ):
            line = [
                (r["B"], r["step_s"]) for r in timed if (r["name"], r["dtype"]) == (name, dtype)
            ]
            colour, style = plots.line(number)
            axis.plot(
                *zip(*line, strict=True), style, color=colour, marker="o", label=f"{name} {dtype}"
            )
        floor = sorted({(r["B"], r["floor_s"]) for r in timed})
        if floor:
            axis.plot(*zip(*floor, strict=True), "k--", label="floor: torch.mm")
        axis.set(title=setting, xlabel="B", xscale="log", yscale="log")
        for axle, unit in ((axis.xaxis, ""), (axis.yaxis, " s")):
            axle.set_major_formatter(lambda value, _, u=unit: plain(value) + u)
            axle.set_minor_formatter(no_label)
        axis.set_xticks(sorted({r["B"] for r in timed}))
    axes[0].set_ylabel("forward + backward")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=120)


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
@click.option("--scaling/--no-scaling", "scale", default=True,
              help="G from 64 to 512, and P = 1, 2, 4.")  # fmt: skip
@click.option("--json", "json_path", type=FILE, help="Write the rows here.")
@click.option("--plot", "plot_path", type=FILE, help="Write a PNG here.")
@click.option("--peak-of", hidden=True)
def main(batches, settings, peers_up_to, repeats, memory, scale, json_path, plot_path, peak_of):
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
            rows.append(row(name, None, dtype, None, note=reason))

    click.echo(
        f"\n{'':26}{'':6}{'setting':>9}{'B':>5}{'forward':>10}{'step':>10}{'x floor':>9}{'x naive':>9}{'extra MB':>10}"
    )
    for setting in settings:
        for B in batches:
            group = compared(setting, B, repeats, peers_up_to >= B, runnable, device)
            reference = next((r["step_s"] for r in group if r["name"] == "naive autograd"), None)
            for one in group:
                if memory and setting == "full" and peers_up_to >= B:
                    case = one["name"], setting, one["dtype"], B, B, device
                    one["peak_extra_bytes"] = peak_in_own_process(*case)
                faster = f"{reference / one['step_s']:.2f}" if reference else ""
                click.echo(
                    f"{one['name']:26}{one['dtype']:6}{setting:>9}{B:>5}{one['forward_s'] * 1e3:>10.1f}"
                    f"{one['step_s'] * 1e3:>10.1f}{one['step_s'] / one['floor_s']:>9.2f}{faster:>9}"
                    f"{megabytes(one['peak_extra_bytes']):>10}"
                )
            rows += group

    if device == "cpu":
        click.echo("\nWhere a step of `chunked` goes (CPU ms of all threads, B=128)")
        for setting in settings:
            parts = breakdown(setting, 128)
            click.echo(
                f"{setting:9}"
                + "  ".join(f"{kind} {seconds * 1e3:.1f}" for kind, seconds in parts.items())
            )
    if memory:
        click.echo(
            "\nThe document's setting, bf16, all tokens valid: extra MB of a forward and backward"
        )
        for name, I, J in (("chunked", 256, 512), (THRIFTY, 256, 512), ("chunked", 512, 512)):  # noqa: E741
            click.echo(
                f"{name:26}{I} x {J}  {megabytes(peak_in_own_process(name, 'full', 'bf16', I, J, device))}"
            )
    if scale:
        click.echo("\nGrowth with G^2/P (fp32, captions): step, ns per valid patch-token pair")
        for one in scaling("captions", [64, 128, 256, 512], max(7, repeats), device):
            click.echo(
                f"G={one['G']:<5}P={one['P']:<3}{one['step_s'] * 1e3:>9.1f} ms{one['ns_per_pair']:>8.2f} ns"
            )
            rows.append(one)
    if json_path:
        with open(json_path, "w") as file:
            json.dump(rows, file, indent=1)
    if plot_path:
        draw(rows, plot_path)


if __name__ == "__main__":
    run_command(main)
