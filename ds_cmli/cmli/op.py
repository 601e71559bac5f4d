"""`cmli_scores`: the all-pairs scores of Cross-Modal Late Interaction, and what computes them.

An implementation is two functions that write into tensors made here: `forward(sides, scores,
argmax)` writes scores and, unless None, argmax indices; `backward(sides, grads, argmax, d_sides)`
adds gradients of features. On tensors without data, as those of FakeTensorMode, they allocate what
they would otherwise and start no kernel.

Shapes: I images, J texts, N patches, M text positions (padded), D features.
"""

import functools
import subprocess
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Pair = tuple[Tensor, Tensor]
Implementation = tuple[Callable[..., None], Callable[..., None]]  # forward, backward

BACKENDS = ("auto", "cpu", "triton", "torch")
LONGEST = 2**15 - 1  # positions of a side: argmax indices are kept in int16 at most


class Sides(NamedTuple):
    image: Tensor  # [I, N, D]
    text: Tensor  # [J, M, D]
    token_mask: Tensor  # bool [J, M], True = valid
    patch_mask: Tensor | None = None  # bool [I, N]; None: all are valid


def has_data(x: Tensor) -> bool:
    return not (isinstance(x, FakeTensor) or x.is_meta)


def upcast(x: Tensor) -> Tensor:
    """Cast to fp32; fp64 stays fp64."""
    return x if x.dtype == torch.float64 else x.float()


def index_dtype(length: int) -> torch.dtype:
    """The dtype of argmax indices into a side of this length."""
    return torch.uint8 if length <= 256 else torch.int16


def power_of_two(n: int) -> int:
    """The least power of two that is at least n and at least 16, the smallest side of a product."""
    return max(16, 1 << (n - 1).bit_length())


def slices(size: int, each: int) -> list[slice]:
    return [slice(at, min(at + each, size)) for at in range(0, size, each)]


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside: it would multiply fp32 matrices in 16 bits."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def implementation(sides: Sides, backend: str = "auto") -> Implementation:
    """What computes the pairs of such sides: with "auto" PyTorch's operators, with a warning, where
    no kernels run. Raises RuntimeError if `backend` names kernels that do not run here."""
    device, reason = sides.image.device, None
    of_device = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "torch")
    name = of_device if backend == "auto" else backend
    if sides.image.dtype == torch.float64:
        name = "torch"
    if name == "cpu":
        reason = why_not_cpu()
    elif name == "triton" and device.type == "cuda" and has_data(sides.image):
        # As finely as the choice of tiles distinguishes sizes.
        N, M = (power_of_two(x.shape[1]) for x in (sides.image, sides.text))
        reason = why_not_triton(device, sides.image.dtype, N, M, sides.image.shape[2])
    if reason is None:
        return _functions(name)
    if backend != "auto":
        raise RuntimeError(f"backend={backend!r} does not run here: {reason}")
    _warn(reason)
    return _functions("torch")


def _functions(name: str) -> Implementation:
    if name == "triton":
        from . import triton_backward, triton_forward

        return triton_forward.forward, triton_backward.backward
    from . import cpu, fallback

    module = cpu if name == "cpu" else fallback
    return module.forward, module.backward


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"all-pairs CMLI runs without kernels, and slower: {reason}", stacklevel=4)


@functools.cache
def why_not_cpu() -> str | None:
    """Why the C++ kernels do not run, in one line; None if they do."""
    from . import cpu

    try:
        cpu.library()
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)
    return None


@functools.cache
def why_not_triton(device: torch.device, dtype: torch.dtype, N: int, M: int, D: int) -> str | None:
    """Why the Triton kernels do not run on a GPU for such inputs, in one line; None if they do.

    They are compiled, started for one pair, and waited for.
    """
    from .triton_forward import unsuited

    reason = unsuited(torch.cuda.get_device_capability(device))
    if reason is not None:
        return reason
    image, text = (torch.ones(1, n, D, dtype=dtype, device=device) for n in (N, M))
    sides = Sides(image, text, torch.ones(1, M, dtype=torch.bool, device=device))
    try:
        kernels = _functions("triton")
        scores, argmax = cmli_forward(kernels, sides, True)
        assert argmax is not None  # they are kept
        cmli_backward(kernels, sides, scores, argmax, (zero_gradient(image), zero_gradient(text)))
        torch.cuda.synchronize(device)  # raises what failed while it ran
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton's compiler, of ptxas, or of the launch
        return " ".join(str(error).split())[:300]
    return None


def cmli_forward(kernels: Implementation, sides: Sides, keep: bool) -> tuple[Pair, Pair | None]:
    """Both scores [I, J], and if `keep` the argmax indices for `cmli_backward`: the best token of
    each patch [I, J, N], and the best patch of each token [I, J, M]."""
    image = sides.image
    (I, N, _), (J, M, _) = image.shape, sides.text.shape  # noqa: E741
    dtype, argmax = torch.promote_types(image.dtype, torch.float32), None
    # Zeros, because those of empty texts are not written.
    scores = image.new_zeros(I, J, dtype=dtype), image.new_zeros(I, J, dtype=dtype)
    if keep:
        tokens = image.new_empty(I, J, N, dtype=index_dtype(M))
        argmax = tokens, image.new_empty(I, J, M, dtype=index_dtype(N))
    with full_precision(image.device):
        kernels[0](sides, scores, argmax)
    return scores, argmax


def cmli_backward(kernels: Implementation, sides: Sides, grads: Pair, argmax: Pair, d_sides: Pair):
    """Add the features' gradients to `zero_gradient`s, given those of both scores [I, J]."""
    with full_precision(sides.image.device):
        kernels[1](sides, (grads[0].contiguous(), grads[1].contiguous()), argmax, d_sides)


def zero_gradient(x: Tensor) -> Tensor:
    """Where the gradient of features is added up, in fp32 (fp64 for fp64)."""
    return x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, backend, *sides):
        ctx.kernels = implementation(Sides(*sides), backend)
        scores, argmax = cmli_forward(ctx.kernels, Sides(*sides), any(ctx.needs_input_grad))
        ctx.save_for_backward(*sides, *(argmax or ()))
        return scores

    @staticmethod
    def backward(ctx, *grads):
        refuse_second_derivative()
        sides, argmax = Sides(*ctx.saved_tensors[:4]), ctx.saved_tensors[4:]
        d_sides = zero_gradient(sides.image), zero_gradient(sides.text)
        cmli_backward(ctx.kernels, sides, grads, argmax, d_sides)
        return None, *(d.to(sides.image.dtype) for d in d_sides), None, None


def refuse_second_derivative() -> None:
    """`once_differentiable` is silent here: it returns gradients without a graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "all-pairs CMLI has no second derivative: call backward without create_graph=True"
        )


def checked(sides: Sides) -> Sides:
    """The same, under autocast of one dtype. Raises ValueError for what does not fit."""
    image, text, token_mask, patch_mask = sides
    device = image.device
    if image.dtype != text.dtype and torch.is_autocast_enabled(device.type):
        wider = torch.promote_types(image.dtype, text.dtype)
        image, text = image.to(wider), text.to(wider)
    shapes = list(image.shape), list(text.shape)
    fit = image.ndim == text.ndim == 3 and shapes[0][2] == shapes[1][2]
    if not (fit and image.numel() and text.numel()):
        raise ValueError(f"image [I, N, D] and text [J, M, D] do not fit: {shapes}")
    if image.dtype != text.dtype or not image.is_floating_point() or device != text.device:
        kinds = f"{image.dtype} on {device} and {text.dtype} on {text.device}"
        raise ValueError(f"image and text must be floats of one dtype on one device, not {kinds}")
    for name, mask, x in (("token_mask", token_mask, text), ("patch_mask", patch_mask, image)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:2]):
            kind = f"{mask.dtype} {list(mask.shape)}"
            raise ValueError(f"{name} must be bool {list(x.shape[:2])}, True = valid, not {kind}")
    if max(image.shape[1], text.shape[1]) > LONGEST:
        raise ValueError(f"image and text {shapes} may have {LONGEST} positions at most")
    return Sides(image, text, token_mask, patch_mask)


def cmli_scores(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None = None,
    backend: str = "auto",
) -> Pair:
    """Score every image with every text by Cross-Modal Late Interaction, in both directions.

    With S[n, m] = image[i, n] . text[j, m] over valid patches n and valid tokens m, by equations
    (1) to (4) of the source document, and 4 and 5 of FILIP (arXiv 2111.07783):
        s_i2t[i, j] = mean over n of max over m of S[n, m]
        s_t2i[i, j] = mean over m of max over n of S[n, m]
    The similarities of all pairs are never stored: memory is the argmax indices, I*J*(N+M) bytes,
    and a bounded scratch.

    Args:
        image: [I, N, D] patches, fp32, bf16, fp16 or fp64: normalised by the caller for cosines.
        text: [J, M, D] tokens, of the same dtype and device.
        token_mask: bool [J, M], True = valid, in any pattern. Leave out [CLS], [SEP] and [PAD].
        patch_mask: bool [I, N], likewise; None: all are valid.
        backend: "cpu" (C++) or "triton" (GPUs), "torch" for PyTorch's operators alone, or "auto":
            the kernels of the device where they run, and PyTorch's operators otherwise.

    Returns:
        s_i2t and s_t2i, [I, J] fp32 (fp64 for fp64). Products are summed in fp32 and maxima taken
        of these sums, whatever the inputs. A masked position wins no maximum and counts in no mean;
        a text without valid tokens and an image without valid patches score 0 with zero gradient.
        Of equal similarities the lowest index wins. NaN and inf propagate.

    Raises ValueError for an argument that does not fit, RuntimeError if the backend does not run
    here, or a second derivative is asked for.
    """
    sides = checked(Sides(image, text, token_mask, patch_mask))
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; it must be one of {', '.join(BACKENDS)}")
    return _Scores.apply(backend, *sides)
