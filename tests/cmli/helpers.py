"""What the tests of the all-pairs op share: random cases, scores with their gradients, the allocator's own count."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ds_cmli.cmli import cmli_scores

Case = tuple[Tensor, Tensor, Tensor, Tensor | None]


def random_case(
    I: int,  # noqa: E741
    J: int,
    N: int,
    M: int,
    D: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    text_lengths: list[int] | None = None,
    masked: bool = False,
) -> Case:
    """Features and masks; `text_lengths` valid tokens, the first ones, or at random positions where `masked`."""
    g = torch.Generator().manual_seed(seed)
    image = torch.randn(I, N, D, generator=g, dtype=torch.float64).to(dtype)
    text = torch.randn(J, M, D, generator=g, dtype=torch.float64).to(dtype)
    lengths = torch.randint(0, M + 1, (J,), generator=g) if text_lengths is None else torch.tensor(text_lengths)
    text_mask = torch.arange(M) < lengths[:, None]
    if not masked:
        return image, text, text_mask, None
    text_mask = text_mask.gather(1, torch.rand(J, M, generator=g).argsort(1))
    return image, text, text_mask, torch.rand(I, N, generator=g) < 0.6


def with_gradients(case: Case, upstream: tuple[Tensor, Tensor], **options) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(s_i2t, s_t2i, d_image, d_text)"""
    image, text = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
    scores = cmli_scores(image, text, *case[2:], **options)
    grads = torch.autograd.grad(scores, (image, text), [g.to(scores[0].dtype) for g in upstream])
    return *scores, *grads


def upstream_for(case: Case, seed: int = 1) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (case[0].shape[0], case[1].shape[0])
    return torch.randn(shape, generator=g, dtype=torch.float64), torch.randn(shape, generator=g, dtype=torch.float64)


def allocator_peak(call: Callable[[], object]) -> int:
    """The most bytes that `call` held at once, of those it asked PyTorch's allocator for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        call()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        most = max(most, live)
    return most
