"""python -m profiling.speed.maxsim [--repeats N] [--json]

Late interaction in one direction, forward and backward of all queries with all documents: time, extra memory and
gradients of the libraries' way (einsum, max, sum, all similarities stored) next to `maxsim`, in one run.

Repeats of all contenders interleaved, medians. Extra memory: what the allocator gives out at the peak beyond inputs and
their gradients. Gradients: the largest difference from the libraries' way, relative to the largest entry.
"""

import statistics
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

from ds_cmli.common import quiet

quiet.silence()

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli import cmli_peak_bytes, cmli_scores, maxsim
from ds_cmli.common.cli import run_command
from ds_cmli.memory import cpu_events
from profiling.scripts import CLOCKS, clock_option, compare, prints_json, to_the_end


class Shape(NamedTuple):
    queries: int
    documents: int
    L_q: int
    L_d: int
    D: int


SHAPES = {"ColBERT": Shape(64, 64, 32, 180, 128), "ColPali": Shape(32, 32, 32, 1030, 128)}


def stored(queries: Tensor, documents: Tensor) -> Tensor:
    """MaxSim as sentence-transformers, PyLate and colpali-engine write it."""
    return torch.einsum("qld,ckd->qclk", queries, documents).max(3).values.sum(2)


def by_both_directions(queries: Tensor, documents: Tensor) -> Tensor:
    """The same from `cmli_scores`, which computes the other direction too."""
    mask = queries.new_ones(queries.shape[:2], dtype=torch.bool)
    return cmli_scores(documents, queries, mask)[1].t() * queries.shape[1]


CONTENDERS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "einsum, max, sum": stored,
    "both directions": by_both_directions,
    "maxsim": maxsim,
    "maxsim, recompute": partial(maxsim, recompute=True),
}


class Step:
    """Forward and backward of one way to score, in one dtype."""

    def __init__(
        self, shape: Shape, scores: Callable[[Tensor, Tensor], Tensor], device: torch.device
    ):
        g = torch.Generator().manual_seed(0)
        self.scores = scores
        self.inputs = [
            F.normalize(torch.randn(n, length, shape.D, generator=g), dim=-1)
            .to(device)
            .requires_grad_()
            for n, length in ((shape.queries, shape.L_q), (shape.documents, shape.L_d))
        ]
        self.upstream = (
            torch.randn(shape.queries, shape.documents, generator=g).to(device) / shape.documents
        )

    def __call__(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.scores(*self.inputs), self.inputs, self.upstream)

    def extra_bytes(self) -> int:
        gradients, results = sum(x.nbytes for x in self.inputs), list[Tensor]()
        if self.upstream.is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self()
            return torch.cuda.max_memory_allocated() - before - gradients
        forward = cpu_events.sizes(lambda: results.append(self.scores(*self.inputs)))
        backward = cpu_events.sizes(
            lambda: torch.autograd.grad(results.pop(), self.inputs, self.upstream)
        )
        return max(
            *accumulate(forward), max(accumulate(backward, initial=sum(forward))) - gradients
        )


@click.command(help=(__doc__ or "").split("\n\n")[1])
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@clock_option
@prints_json
def main(repeats: int, clock: str) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    click.echo(
        f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, fp32, {clock} time"
    )
    figures: dict[str, Any] = {}
    for name, shape in SHAPES.items():
        steps = {contender: Step(shape, scores, device) for contender, scores in CONTENDERS.items()}
        whole = {contender: to_the_end(step, device) for contender, step in steps.items()}
        times = compare(whole, repeats, CLOCKS[clock])
        wanted, figures[name] = steps["einsum, max, sum"](), {}
        click.echo(
            f"\n{name}: {shape.queries} queries of {shape.L_q} tokens, {shape.documents} documents of {shape.L_d}, "
            f"D={shape.D}\n{'':20}{'step ms':>10}{'faster':>9}{'extra MB':>10}{'gradients differ by':>21}"
        )
        first = statistics.median(times["einsum, max, sum"])
        for contender, step in steps.items():
            seconds, extra, differ = statistics.median(times[contender]), step.extra_bytes(), 0.0
            for got, want in zip(step(), wanted, strict=True):
                differ = max(differ, float((got - want).abs().max() / want.abs().max()))
            figures[name][contender] = {
                "step_s": seconds,
                "extra_bytes": extra,
                "gradients_differ": differ,
            }
            click.echo(
                f"{contender:20}{seconds * 1e3:>10.1f}{first / seconds:>9.1f}{extra / 1e6:>10.2f}{differ:>21.1e}"
            )
        sizes = shape.documents, shape.queries, shape.L_d, shape.L_q, shape.D, torch.float32
        backend = "triton" if device.type == "cuda" else "chunked"
        predicted = cmli_peak_bytes(*sizes, backend=backend, device=device.type, one_way=True)
        click.echo(f"{'maxsim, predicted':20}{'':>19}{predicted.extra / 1e6:>10.2f}")
    return figures


if __name__ == "__main__":
    run_command(main)
