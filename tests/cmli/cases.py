"""Random inputs of the all-pairs op, and the errors of an implementation beside the reference in fp64."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ds_cmli.cmli.reference import cmli_scores_reference

PATCHES = [1, 2, 7, 15, 16, 17, 49, 197, 300]
TOKENS = [1, 2, 3, 5, 9, 16, 33, 64, 70, 300]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Rounding of the gradients that are returned; scores are fp32 whatever the inputs.
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class Case(NamedTuple):
    kind: str
    image: Tensor
    text: Tensor
    token_mask: Tensor
    patch_mask: Tensor | None
    d_scores: list[Tensor]  # the gradients of both scores, fp64


def case(seed: int, longest: int = 300, dtype: torch.dtype | None = None) -> Case:
    """Return holes in masks, NaN or large padding, empty texts and images, exact ties, one position, infinity."""
    rng = torch.Generator().manual_seed(seed)

    def pick(values):
        return values[int(torch.randint(len(values), (1,), generator=rng))]

    def chance(share: float) -> bool:
        return torch.rand((), generator=rng).item() < share

    I = pick([1, 2, 3, 5])  # noqa: E741
    J = pick([1, 2, 4, 7])
    D = pick([1, 4, 16, 20, 33, 64])
    N, M = (pick([n for n in lengths if n <= longest]) for lengths in (PATCHES, TOKENS))
    kind = pick(["random"] * 3 + ["ties", "nan", "inf"])
    dtype = dtype or pick(DTYPES)
    shapes = (I, N, D), (J, M, D)
    if kind == "ties":
        sides = [torch.randint(-2, 3, shape, generator=rng).double() / 4 for shape in shapes]
    else:
        sides = [F.normalize(torch.randn(shape, generator=rng).double(), dim=2) for shape in shapes]
    token_mask = torch.rand(J, M, generator=rng) < pick([0.5, 0.8, 1.1])
    patch_mask = None
    if chance(0.4):
        token_mask[0] = False
    if chance(0.3):
        patch_mask = torch.rand(I, N, generator=rng) < 0.7
        patch_mask[0] &= chance(0.5)
    image, text = (x.to(dtype) for x in sides)
    padding = torch.nan if seed % 2 else 50.0
    text[~token_mask] = padding
    if patch_mask is not None:
        image[~patch_mask] = padding
    if kind in ("nan", "inf"):
        x = pick([image, text]).view(-1, D)
        x[int(torch.randint(len(x), (1,), generator=rng)), 0] = float(kind)
    d_scores = [torch.randn(I, J, generator=rng).double() for _ in range(2)]
    for d_score in d_scores:
        d_score[torch.rand(I, J, generator=rng) < 0.3] = 0
    return Case(kind, image, text, token_mask, patch_mask, d_scores)


def with_gradients(scores, case: Case, double: bool = False) -> list[Tensor]:
    """Both scores, and the gradients of image and text, in fp64; `double`: computed in it."""
    image, text = ((x.double() if double else x).clone().requires_grad_() for x in (case.image, case.text))
    out = scores(image, text, case.token_mask, case.patch_mask)
    d_scores = [d_score.to(s.dtype) for d_score, s in zip(case.d_scores, out, strict=True)]
    return [x.detach().double() for x in (*out, *torch.autograd.grad(out, (image, text), d_scores))]


def check(scores, case: Case) -> None:
    """Compare scores, also those that are not finite, and the gradients where nothing is NaN or infinite."""
    *ours, d_image, d_text = with_gradients(scores, case)
    *expected, expected_d_image, expected_d_text = with_gradients(cmli_scores_reference, case, double=True)
    limit = LIMITS[case.image.dtype]
    torch.testing.assert_close(ours, expected, rtol=0, atol=min(limit, 1e-6), equal_nan=True)
    for gradient, expected_gradient in ((d_image, expected_d_image), (d_text, expected_d_text)):
        if case.kind in ("nan", "inf"):  # reaches no other gradients than in the reference
            assert gradient[expected_gradient.isfinite()].isfinite().all()
        else:
            largest = max(1e-3, expected_gradient.abs().max().item())
            torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=limit * largest)
    assert not d_text[~case.token_mask].any()
    assert case.patch_mask is None or not d_image[~case.patch_mask].any()
