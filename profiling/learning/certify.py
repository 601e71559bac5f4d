"""python -m profiling.learning.certify [--tiles 10000] [--run RUN]

The true error of a gradient that `cmli.cut` cuts, and its bound: on tiles of random features and, of a trained run,
on tiles of its training pairs' features at the scale it has learned.

Shapes: B pairs, N patches, M text positions, D embedding dimension.
"""

import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import click
import torch
from torch import Tensor

from ds_cmli.cmli import cmli_scores
from ds_cmli.cmli.contrastive import contrastive_loss
from ds_cmli.cmli.cut import Cut, as_loss
from ds_cmli.cmli.loss import l2_normalize
from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.common.cli import run_command

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass
class CutTile:
    """A batch of normalised features, and how it is cut."""

    image: Tensor  # [B, N, D]
    text: Tensor  # [B, M, D]
    token_mask: Tensor  # bool [B, M]
    image_mask: Tensor | None  # bool [B, N]
    ignore: Tensor | None  # bool [B, B]
    logit_scale: float
    delta: float


def random_tile(seed: int, pairs: int = 0, spread: float = 0.0) -> CutTile:
    """Features whose own pairs match best, of random sizes, dtype, masks, temperature and cut.

    Args:
        pairs: B; 0: a random number.
        spread: how far features lie from their pair's topic; 0: a random distance, and any dtype.
    """
    draw, g = random.Random(seed), torch.Generator().manual_seed(seed)
    N, M, D = draw.randint(1, 9), draw.randint(1, 9), draw.choice((4, 16, 40))
    B, dtype = pairs or draw.randint(2, 40), torch.float64 if spread else draw.choice(DTYPES)
    spread = spread or draw.uniform(0.1, 2.0)
    topic = torch.randn(B, 1, D, generator=g)
    image = l2_normalize(topic + spread * torch.randn(B, N, D, generator=g))
    text = l2_normalize(topic + spread * torch.randn(B, M, D, generator=g))
    token_mask = torch.arange(M) < torch.randint(0, M + 1, (B, 1), generator=g)
    image_mask = torch.rand(B, N, generator=g) < 0.7 if draw.random() < 0.3 else None
    ignore = torch.rand(B, B, generator=g) < 0.1 if draw.random() < 0.5 else None
    if ignore is not None:
        ignore.diagonal().fill_(False)
    scale, delta = draw.uniform(2.0, 4.7), 10 ** draw.uniform(-5, -0.5)
    return CutTile(image.to(dtype), text.to(dtype), token_mask, image_mask, ignore, scale, delta)


def certified(tile: CutTile) -> tuple[float, float]:
    """The error in fp64, the larger of the sums of norms over patches and over tokens; the bound.

    Pairs are chosen in the tile's dtype, as in training; for these the exact gradient is computed.
    """
    masks, scale = (tile.token_mask, tile.image_mask), torch.tensor([tile.logit_scale])
    cut = Cut(tile.delta)
    scores = [s.requires_grad_() for s in cmli_scores(tile.image, tile.text, *masks)]
    s_i2t, s_t2i, units = cut.apply(scores[0], scores[1], 0)
    loss = contrastive_loss(s_i2t, s_t2i, scale, ignore=tile.ignore)
    grads = torch.autograd.grad(loss + as_loss(units, scale, len(tile.image)), scores)
    left_out = (grads[0] == 0) & (grads[1] == 0)
    left_out.fill_diagonal_(False)

    features = [x.double().requires_grad_() for x in (tile.image, tile.text)]
    exact = cmli_scores_reference(features[0], features[1], *masks)
    loss = contrastive_loss(*exact, scale.double(), ignore=tile.ignore)
    of_scores = torch.autograd.grad(loss, exact, retain_graph=True)
    missing = [g.masked_fill(~left_out, 0.0) for g in of_scores]
    errors = torch.autograd.grad(exact, features, missing)
    assert cut.found is not None
    return max(e.norm(dim=2).sum().item() for e in errors), cut.found[1].item()


def real_tiles(run: str, tiles: int) -> Iterator[CutTile]:
    """Tiles of at most 64 random pairs of the first 1,024 that the run trained on, of any dtype and cut."""
    from profiling.speed.cut import embedded, loaded, whole

    model = loaded(run)
    objective = model.objective
    image, text, token_mask = whole(embedded(model, objective, 1024))
    image, text = l2_normalize(image), l2_normalize(text)
    scale = math.log(objective.scales()["cmli"])
    for seed in range(tiles):
        draw = random.Random(seed)
        some, dtype = draw.sample(range(len(image)), draw.randint(2, 64)), draw.choice(DTYPES)
        mask, delta = token_mask[some], 10 ** draw.uniform(-5, -0.5)
        yield CutTile(image[some].to(dtype), text[some].to(dtype), mask, None, None, scale, delta)


def report(kind: str, tiles: Iterable[CutTile]) -> int:
    """Print how the errors compare with their bounds; returns how many are above."""
    tiles_certified = [certified(tile) for tile in tiles]
    shares = sorted(error / bound for error, bound in tiles_certified if bound)
    above = sum(error > bound for error, bound in tiles_certified)
    kinds = (
        f"{len(tiles_certified):,} {kind} tiles, in {len(shares):,} of which pairs were left out"
    )
    print(f"{kinds}: {above} above the bound", flush=True)
    if shares:
        print(f"error / bound: median {shares[len(shares) // 2]:.3f}, most {shares[-1]:.4f}")
    return above


@click.command(help="The error of cut gradients, in fp64, and its bound.")
@click.option("--tiles", type=click.IntRange(0), default=10_000, show_default=True, help="Random.")
@click.option("--run", metavar="RUN", help="A trained run, for tiles of its features.")
@click.option("--real-tiles", "real", type=click.IntRange(1), default=1000, show_default=True)
def command(tiles: int, run: str | None, real: int) -> int:
    above = report("random", map(random_tile, range(tiles)))
    if run is not None:
        above += report("trained", real_tiles(run, real))
    return 1 if above else 0


if __name__ == "__main__":
    run_command(command)
