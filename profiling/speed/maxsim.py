"""python -m profiling.speed.maxsim [--repeats N] [--json]

Training steps of late interaction in one direction, from token embeddings on, forward and backward of an in-batch loss:
time, extra memory, loss and gradients of each library's own loss next to `maxsim`, in one run. Libraries come with
`pip install -e '.[bench,colpali]'`, PyLate with an environment of its own; one that is missing is a line that says so.

Repeats of all contenders interleaved, medians, by the clock and in CPU time of all threads. Extra memory: what the
allocator gives out at the peak beyond inputs and their gradients. Differences are from the first row, relative to the
largest entry; gradients are compared along unit rows' directions, as PyLate normalises its inputs itself.
"""

import time
from itertools import accumulate
from typing import Any, NamedTuple

from ds_cmli.common import quiet

quiet.silence()

import click
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli import cmli_peak_bytes
from ds_cmli.common.cli import run_command
from ds_cmli.memory import cpu_events
from profiling.scripts import compare, prints_json, processor, to_the_end
from profiling.speed.late_losses import Loss, losses


class Shape(NamedTuple):
    queries: int
    documents: int
    L_q: int
    L_d: int
    D: int


SHAPES = {"ColBERT": Shape(32, 32, 32, 180, 128), "ColPali": Shape(16, 16, 32, 1030, 128)}


class Step:
    """Forward and backward of one loss."""

    def __init__(self, shape: Shape, loss: Loss, device: torch.device):
        g = torch.Generator().manual_seed(0)
        self.loss = loss
        # A document holds tokens like those of its query, so that the loss is no mere chance.
        queries, documents = (
            F.normalize(torch.randn(n, length, shape.D, generator=g), dim=-1)
            for n, length in ((shape.queries, shape.L_q), (shape.documents, shape.L_d))
        )
        documents[:, : shape.L_q] = F.normalize(documents[:, : shape.L_q] + 0.1 * queries, dim=-1)
        self.inputs = [x.to(device).requires_grad_() for x in (queries, documents)]

    def __call__(self) -> tuple[Tensor, ...]:
        """The loss, and its gradients without what would change the rows' norms."""
        value = self.loss(*self.inputs)
        gradients = torch.autograd.grad(value, self.inputs)
        return value.detach(), *gradients

    def along(self) -> list[Tensor]:
        value, *gradients = self()
        rows = [x.detach() for x in self.inputs]
        return [
            value,
            *(g - (g * x).sum(-1, keepdim=True) * x for g, x in zip(gradients, rows, strict=True)),
        ]

    def extra_bytes(self) -> int:
        gradients, results = sum(x.nbytes for x in self.inputs), list[Tensor]()
        if self.inputs[0].is_cuda:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            self()
            return torch.cuda.max_memory_allocated() - before - gradients
        forward = cpu_events.sizes(lambda: results.append(self.loss(*self.inputs)))
        backward = cpu_events.sizes(lambda: torch.autograd.grad(results.pop(), self.inputs))
        return max(
            *accumulate(forward), max(accumulate(backward, initial=sum(forward))) - gradients
        )


def both_clocks() -> Any:
    """Seconds of this process's CPU time, and by the clock."""
    return np.array([time.process_time(), time.perf_counter()])


@click.command(help=(__doc__ or "").split("\n\n")[1])
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True)
@click.option(
    "--shape",
    "names",
    multiple=True,
    type=click.Choice(tuple(SHAPES)),
    help="Only these; may be repeated.",
)
@prints_json
def main(repeats: int, names: tuple[str, ...]) -> dict[str, Any]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    contenders, left_out = losses()
    click.echo(
        f"torch {torch.__version__}, {device}, {processor()}, {torch.get_num_threads()} threads, fp32"
    )
    click.echo("\n".join(left_out))
    figures: dict[str, Any] = {}
    for name in names or SHAPES:
        shape = SHAPES[name]
        steps = {contender: Step(shape, loss, device) for contender, loss in contenders.items()}
        whole = {contender: to_the_end(step, device) for contender, step in steps.items()}
        times = compare(whole, repeats, both_clocks)
        figures[name] = {}
        first, *_ = steps
        wanted = steps[first].along()
        click.echo(
            f"\n{name}: {shape.queries} queries of {shape.L_q} tokens, {shape.documents} documents of {shape.L_d}, "
            f"D={shape.D}\n{'':32}{'CPU ms':>9}{'ms':>9}{'extra MB':>10}{'loss':>10}{'gradients differ by':>21}"
        )
        for contender, step in steps.items():
            cpu, wall = np.median(times[contender], 0).tolist()
            differ, got = 0.0, step.along()
            for x, y in zip(got[1:], wanted[1:], strict=True):
                differ = max(differ, float((x - y).abs().max() / y.abs().max()))
            row = {"cpu_s": cpu, "step_s": wall, "extra_bytes": step.extra_bytes()}
            row |= {"loss": float(got[0]), "gradients_differ": differ}
            figures[name][contender] = row
            click.echo(
                f"{contender:32}{cpu * 1e3:>9.1f}{wall * 1e3:>9.1f}{row['extra_bytes'] / 1e6:>10.2f}"
                f"{row['loss']:>10.5f}{differ:>21.1e}"
            )
        sizes = shape.documents, shape.queries, shape.L_d, shape.L_q, shape.D, torch.float32
        backend = "triton" if device.type == "cuda" else "chunked"
        predicted = cmli_peak_bytes(*sizes, backend=backend, device=device.type, one_way=True)
        click.echo(f"{'maxsim alone, predicted':32}{'':>18}{predicted.extra / 1e6:>10.2f}")
    return figures


if __name__ == "__main__":
    run_command(main)
