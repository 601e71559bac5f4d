"""What the tests of the all-pairs op share: random cases, scores with their gradients, the allocator's own count."""

import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import permutations, zip_longest

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ds_cmli.cmli import cmli_scores
from ds_cmli.cmli.chunked import kernels

Case = tuple[Tensor, Tensor, Tensor, Tensor | None]
RECOMPUTED = {"recompute": True, "scratch_bytes": 50}


def in_interpreter(file: str, *arguments: str) -> str:
    """What a file of checks prints in a process of Triton's interpreter."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'ds-cmli[test]'")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    result = subprocess.run([sys.executable, file, *arguments], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


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
    token_mask = torch.arange(M) < lengths[:, None]
    if not masked:
        return image, text, token_mask, None
    token_mask = token_mask.gather(1, torch.rand(J, M, generator=g).argsort(1))
    return image, text, token_mask, torch.rand(I, N, generator=g) < 0.6


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


@contextmanager
def without_kernels() -> Iterator[None]:
    """As where there is no C++ compiler."""
    load, kernels.load = kernels.load, lambda: None
    try:
        yield
    finally:
        kernels.load = load


def interpret_faster() -> None:
    """In Triton's interpreter, keep what a kernel's launch has set up.

    Each call of a device function would do so again, which takes a third of the time.
    """
    from triton.runtime import interpreter

    ready = set()  # modules of device functions

    def call(function, *arguments, **keywords):
        if function.fn.__module__ not in ready:
            ready.add(function.fn.__module__)
            interpreter._patch_lang(function.fn)
        return function.rewrite()(*arguments, **keywords)

    interpreter.InterpretedFunction.__call__ = call


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """`x` in other layouts of memory: every order of its dimensions, and a part of something larger."""
    for order in list(permutations(range(x.ndim)))[1:]:
        yield f"stored as {order}", x.permute(order).contiguous().permute([order.index(d) for d in range(x.ndim)])
    part = x.new_zeros([2 * n + 1 for n in x.shape])[tuple(slice(1, None, 2) for _ in x.shape)]
    yield "every second element", part.copy_(x)
    yield "at an offset", torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    if x.dtype != torch.bool:
        yield "negated when read", torch._neg_view(-x)


def any_layout_gives_the_same(backend: str, settings: Sequence[dict] = ({}, RECOMPUTED)) -> None:
    """Scores and gradients, for every argument and upstream gradient; gradients have the strides of a new tensor.

    Args:
        settings: options of `cmli_scores`; all is done once with each.
    """
    case = random_case(2, 3, 5, 4, 6, dtype=torch.float32, masked=True)
    plain = [*case, *(g.float() for g in upstream_for(case))]
    repeated = [x[:1].expand(x.shape) for x in plain]
    for options in settings:

        def run(arguments: list[Tensor]) -> tuple[Tensor, ...]:
            image, text = (x.detach().requires_grad_() for x in arguments[:2])
            scores = cmli_scores(image, text, *arguments[2:4], backend=backend, **options)  # noqa: B023
            gradients = torch.autograd.grad(scores, (image, text), arguments[4:])
            assert backend == "reference" or all(g.is_contiguous() for g in gradients)
            return *scores, *gradients

        expected = run(plain)
        # All arguments at once, in a layout each; those of fewer dimensions have fewer.
        for turn in zip_longest(*map(layouts, plain)):
            names, arguments = zip(*(one or ("plain", x) for one, x in zip(turn, plain, strict=True)), strict=True)
            for got, want in zip(run(list(arguments)), expected, strict=True):
                torch.testing.assert_close(got, want, rtol=0, atol=1e-6, msg=lambda m: f"{names}: {m}")  # noqa: B023
        for got, want in zip(run(repeated), run([x.clone() for x in repeated]), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-6)


# Rounding coefficients and results to fp16, relative to the largest entry; for the others the sums' rounding.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3}


def reference(image, text, token_mask, image_mask):
    """(s_i2t, s_t2i, arg_i2t, arg_t2i) with everything materialised."""
    S = torch.einsum("ind,jmd->ijnm", image, text)
    patch, token = image_mask[:, None, :], token_mask[None, :, :]
    over_m = S.masked_fill(~token[:, :, None, :], -torch.inf)
    over_n = S.masked_fill(~patch[..., None], -torch.inf)
    (best_m, arg_i2t), (best_n, arg_t2i) = over_m.max(3), over_n.max(2)
    some = patch.any(2) & token.any(2)
    s_i2t = torch.where(patch, best_m, 0).sum(2) / patch.sum(2).clamp(min=1)
    s_t2i = torch.where(token, best_n, 0).sum(2) / token.sum(2).clamp(min=1)
    return torch.where(some, s_i2t, 0), torch.where(some, s_t2i, 0), arg_i2t, arg_t2i


def inputs(I, J, N, M, D, dtype, seed, holes=True, exact=False):  # noqa: E741
    """Features, masks with holes (texts 0 and 1 have no and one valid token, the last all) and upstream gradients."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randint(-2, 3, shape, generator=rng) / 4 if exact else torch.randn(shape, generator=rng)

    image, text = draw(I, N, D).to(dtype), draw(J, M, D).to(dtype)
    token_mask = torch.rand(J, M, generator=rng) < 0.7
    token_mask[0] = False
    if J > 1:
        token_mask[1] = torch.arange(M) == M // 2
    token_mask[-1] = True
    image_mask = torch.rand(I, N, generator=rng) < 0.8 if holes else None
    if holes and I > 2:
        image_mask[1] = False
    acc = torch.promote_types(dtype, torch.float32)
    grads = [torch.randn(I, J, generator=rng).to(acc) for _ in range(2)]
    return image, text, token_mask, image_mask, grads


def distance(value, expected):
    """Largest error, relative to the largest expected entry."""
    assert value.shape == expected.shape and value.isfinite().all()
    return ((value.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def failure(function, *arguments) -> str | None:
    try:
        function(*arguments)
    except Exception:
        return traceback.format_exc()
    return None
