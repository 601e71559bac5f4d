"""Random inputs of the all-pairs op, and the errors of an implementation against the fp64 reference."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.reference import cmli_scores_reference

PADDING = 50.0  # what stands at positions that do not count
LENGTHS = [1, 2, 7, 15, 16, 17, 49, 197, 300], [1, 2, 3, 5, 9, 16, 33, 64, 70, 300]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding of the gradients that are returned; scores are fp32 whatever the inputs.
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Case(NamedTuple):
    kind: str
    sides: tuple[Tensor, Tensor, Tensor, Tensor | None]
    grads: list[Tensor]  # fp64


def case(seed: int, longest: int = 300, dtype: torch.dtype | None = None) -> Case:
    """Holes in masks, large padding, empty texts and images, ties of exact products, one position, NaN and infinity."""
    rng = torch.Generator().manual_seed(seed)

    def pick(values):
        return values[int(torch.randint(len(values), (1,), generator=rng))]

    def chance(share: float) -> bool:
        return torch.rand((), generator=rng).item() < share

    I, J, D = pick([1, 2, 3, 5]), pick([1, 2, 4, 7]), pick([1, 4, 16, 20, 33, 64])  # noqa: E741
    N, M = (pick([n for n in lengths if n <= longest]) for lengths in LENGTHS)
    kind, dtype = pick(["random"] * 3 + ["ties", "nan", "inf"]), dtype or pick(DTYPES)
    shapes = (I, N, D), (J, M, D)
    if kind == "ties":
        sides = [torch.randint(-2, 3, shape, generator=rng).double() / 4 for shape in shapes]
    else:
        sides = [F.normalize(torch.randn(shape, generator=rng).double(), dim=2) for shape in shapes]
    token_mask, patch_mask = torch.rand(J, M, generator=rng) < pick([0.5, 0.8, 1.1]), None
    if chance(0.4):
        token_mask[0] = False
    if chance(0.3):
        patch_mask = torch.rand(I, N, generator=rng) < 0.7
        patch_mask[0] &= chance(0.5)
    image, text = (x.to(dtype) for x in sides)
    text[~token_mask] = PADDING
    if patch_mask is not None:
        image[~patch_mask] = PADDING
    if kind in ("nan", "inf"):
        x = pick([image, text]).view(-1, D)
        x[int(torch.randint(len(x), (1,), generator=rng)), 0] = float(kind)
    grads = [torch.randn(I, J, generator=rng).double() for _ in range(2)]
    for g in grads:
        g[torch.rand(I, J, generator=rng) < 0.3] = 0
    return Case(kind, (image, text, token_mask, patch_mask), grads)


def with_gradients(scores, of: Case, double: bool = False) -> list[Tensor]:
    """Scores and gradients of the features in fp64; `double`: computed in it."""
    image, text = ((x.double() if double else x).clone().requires_grad_() for x in of.sides[:2])
    out = scores(image, text, *of.sides[2:])
    grads = torch.autograd.grad(out, (image, text), [g.to(s.dtype) for g, s in zip(of.grads, out, strict=True)])
    return [x.detach().double() for x in (*out, *grads)]


def check(scores, of: Case, reference=cmli_scores_reference) -> None:
    """Scores also where they are not finite; the sizes of gradients where nothing is NaN or infinite."""
    ours, expected = with_gradients(scores, of), with_gradients(reference, of, double=True)
    limit = LIMITS[of.sides[0].dtype]
    for s, right in zip(ours[:2], expected[:2], strict=True):
        torch.testing.assert_close(s, right, rtol=0, atol=min(limit, 1e-6), equal_nan=True)
    for g, right in zip(ours[2:], expected[2:], strict=True):
        if of.kind in ("nan", "inf"):  # reaches no other gradients than in the reference
            assert g[right.isfinite()].isfinite().all()
            continue
        torch.testing.assert_close(g, right, rtol=0, atol=limit * max(1e-3, right.abs().max().item()))
    patch_mask = torch.ones_like(ours[2][..., 0], dtype=torch.bool) if of.sides[3] is None else of.sides[3]
    assert not ours[2][~patch_mask].any() and not ours[3][~of.sides[2]].any()


def by_loops(
    image: Tensor, text: Tensor, token_mask: Tensor, patch_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(1) to (4) in fp64, a pair at a time."""
    rows, every = [], torch.ones(image.shape[:2], dtype=torch.bool)
    patch_mask = every if patch_mask is None else patch_mask
    for v, of_patch in zip(image.double(), patch_mask, strict=True):
        for w, of_token in zip(text.double(), token_mask, strict=True):
            S = v[of_patch] @ w[of_token].t()
            both = (S.amax(1).mean(), S.amax(0).mean()) if S.numel() else (S.sum(), S.sum())
            rows.append(torch.stack(both))
    s = torch.stack(rows).view(len(image), len(text), 2)
    return s[..., 0], s[..., 1]
