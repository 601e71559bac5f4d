"""python -m profiling.speed.flair [--pairs 32,64] [--texts 1] [--repeats 3] [--clock wall] [--json]

FLAIR's pair scores of all pairs in tiles, and with attention and pooled embeddings stored, in one run.

"stored" keeps the attention weights [B, T, 8, N] and the embeddings [B, T, H]; "fused" keeps the
embeddings, with PyTorch's fused attention in the place of the weights. Each row is forward and
backward of all inputs and weights in fp32: the median of repeats in turn, and the most memory that
one step allocates. N = 196, H = 768, D = 256.
"""

import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import accumulate

from ds_cmli.common import quiet

quiet.silence()

import click
import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.pooling import EPS, TextConditionedPooling
from ds_cmli.common.cli import run_command
from ds_cmli.memory import cpu_events
from profiling.scripts import CLOCKS, clock_option, compare, count, listed, prints_json, to_the_end

N, H, D = 196, 768, 256


def stored(patches: Tensor, texts: Tensor, pooling: TextConditionedPooling, fused: bool) -> Tensor:
    """The scores [R, T] as the authors' code computes them, of all pairs at once."""
    weights, heads = pooling.weights, pooling.heads
    normed = F.layer_norm(texts, (H,), eps=EPS / H)
    query = F.linear(normed, weights.query_weight, weights.query_bias).unflatten(1, (heads, -1))
    context = F.linear(
        F.layer_norm(patches, (D,), eps=EPS / D), weights.context_weight, weights.context_bias
    )
    context = F.pad(context, (0, 0, 0, 1)).unflatten(2, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    queries = query.transpose(0, 1).expand(len(patches), -1, -1, -1)  # [R, heads, T, D / heads]
    if fused:
        pooled = F.scaled_dot_product_attention(queries, *context)
    else:
        logits = queries @ context[0].transpose(2, 3) / math.sqrt(D // heads)
        pooled = logits.softmax(3) @ context[1]
    pooled = pooled.transpose(1, 2).flatten(2)  # [R, T, D]
    out = F.linear(pooled, weights.out_weight, weights.out_bias)  # [R, T, H]
    return (F.normalize(out, dim=2) * texts).sum(2)


def steps(images: int, texts: int, device: torch.device) -> dict[str, Callable[[], None]]:
    """Forward and backward of each way, of the same inputs."""
    torch.manual_seed(0)
    pooling = TextConditionedPooling(H, D).to(device)
    patches = F.normalize(torch.randn(images, N, D, device=device), dim=2).requires_grad_()
    classes = F.normalize(torch.randn(texts, H, device=device), dim=1).requires_grad_()
    leaves, upstream = [patches, classes, *pooling.parameters()], torch.randn(images, texts)
    ways: dict[str, Callable[..., Tensor]] = {
        "tiles": pooling,
        "stored": partial(stored, pooling=pooling, fused=False),
        "fused": partial(stored, pooling=pooling, fused=True),
    }

    def step(scores: Callable[[Tensor, Tensor], Tensor]) -> None:
        torch.autograd.grad(scores(patches, classes), leaves, upstream.to(device))

    return {name: to_the_end(partial(step, scores), device) for name, scores in ways.items()}


def peak(step: Callable[[], None], device: torch.device) -> int:
    """The most bytes that a step holds of those that it allocates."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    return max(accumulate(cpu_events.sizes(step)))


@click.command(help=(__doc__ or "").split("\n\n")[1])
@click.option("--pairs", default="32,64", show_default=True, help="Numbers of images.")
@click.option("--texts", default=1, show_default=True, help="Texts of each image.")
@click.option("--repeats", type=click.IntRange(1), default=3, show_default=True)
@clock_option
@prints_json
def main(pairs: str, texts: int, repeats: int, clock: str) -> list[dict[str, float | str]]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    click.echo(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads")
    click.echo(f"{'':10}{'images':>8}{'texts':>8}{'seconds':>10}{'bytes':>18}")
    rows: list[dict[str, float | str]] = []
    for images in listed("--pairs", pairs, int):
        ways = steps(images, images * texts, device)
        for name, seconds in compare(ways, repeats, CLOCKS[clock]).items():
            median, most = statistics.median(seconds), peak(ways[name], device)
            click.echo(f"{name:10}{images:>8}{images * texts:>8}{median:>10.3f}{count(most):>18}")
            rows.append({"way": name, "images": images, "seconds": median, "bytes": most})
    return rows


if __name__ == "__main__":
    run_command(main)
