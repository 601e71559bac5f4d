"""`cmli_scores`: the all-pairs scores of Cross-Modal Late Interaction, and what computes them.

An implementation is two functions that write into tensors made here: `forward` scores and argmax
indices, `backward` the gradients of both sides, which it adds. On tensors without data, as those of
FakeTensorMode, each allocates what it would otherwise and starts no kernel.

Shapes: I images, J texts, N patches, M text positions (padded), D features.
"""

import functools
import subprocess
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

Pair = tuple[Tensor, Tensor]
Implementation = tuple[Callable[..., None], Callable[..., None]]  # forward, backward

BACKENDS = ("auto", "cpu", "triton", "torch")
LONGEST = 2**15 - 1  # positions of a side: argmax indices are kept in int16 at most


def has_data(x: Tensor) -> bool:
    return not (isinstance(x, FakeTensor) or x.is_meta)


def upcast(x: Tensor) -> Tensor:
    """Cast to fp32; fp64 stays fp64."""
    return x if x.dtype == torch.float64 else x.float()


def index_dtype(length: int) -> torch.dtype:
    """The dtype of argmax indices into a side of this length."""
    return torch.uint8 if length <= 256 else torch.int16


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """No autocast inside: it would multiply fp32 matrices in 16 bits."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def implementation(image: Tensor, text: Tensor, backend: str = "auto") -> Implementation:
    """What computes pairs of such sides.

    Raises RuntimeError if `backend` names kernels that do not run here; with "auto" PyTorch's
    operators take their place, with a warning.
    """
    from . import fallback

    name, reason = backend, None
    if backend == "auto":
        name = {"cpu": "cpu", "cuda": "triton"}.get(image.device.type, "torch")
    if name == "torch" or image.dtype == torch.float64:
        return fallback.forward, fallback.backward
    if name == "cpu":
        reason = why_not_cpu()
    elif has_data(image) and image.device.type == "cuda":
        (_, N, D), M = image.shape, text.shape[1]
        reason = why_not_triton(image.device, image.dtype, N, M, D)
    if reason is None:
        return _kernels(name)
    if backend != "auto":
        raise RuntimeError(f"backend={backend!r} does not run here: {reason}")
    _warn(reason)
    return fallback.forward, fallback.backward


def _kernels(name: str) -> Implementation:
    if name == "cpu":
        from . import cpu

        return cpu.forward, cpu.backward
    from . import triton_backward, triton_forward

    return triton_forward.forward, triton_backward.backward


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


def why_not_triton(device: torch.device, dtype: torch.dtype, N: int, M: int, D: int) -> str | None:
    """Why the Triton kernels do not run on a GPU for such inputs, in one line; None if they do.

    The first time they are compiled, started for one pair, and waited for.
    """
    from .triton_forward import power_of_two

    # As finely as the choice of tiles distinguishes sizes.
    return _why_not(device, dtype, power_of_two(N), power_of_two(M), D)


@functools.cache
def _why_not(device: torch.device, dtype: torch.dtype, N: int, M: int, D: int) -> str | None:
    from .triton_forward import unsuited

    reason = unsuited(torch.cuda.get_device_capability(device))
    if reason is not None:
        return reason
    image, text = (torch.ones(1, n, D, dtype=dtype, device=device) for n in (N, M))
    sides = image, text, torch.ones(1, M, dtype=torch.bool, device=device), None
    try:
        kernels = _kernels("triton")
        scores, argmax = cmli_forward(kernels, *sides, True)
        assert argmax is not None  # they are kept
        cmli_backward(kernels, scores, *sides, argmax, *map(zero_gradient, (image, text)))
        torch.cuda.synchronize(device)  # raises what failed while it ran
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # of Triton's compiler, of ptxas, or of the launch
        return " ".join(str(error).split())[:300]
    return None


def cmli_forward(
    kernels: Implementation,
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    keep: bool,
) -> tuple[Pair, Pair | None]:
    """Both scores [I, J], and if `keep` the argmax indices for `cmli_backward`: the best token of
    each patch [I, J, N], and the best patch of each token [I, J, M]."""
    (I, N, _), (J, M, _) = image.shape, text.shape  # noqa: E741
    dtype, argmax = torch.promote_types(image.dtype, torch.float32), None
    # Zeros, because those of empty texts are not written.
    scores = image.new_zeros(I, J, dtype=dtype), image.new_zeros(I, J, dtype=dtype)
    if keep:
        tokens = image.new_empty(I, J, N, dtype=index_dtype(M))
        argmax = tokens, image.new_empty(I, J, M, dtype=index_dtype(N))
    with full_precision(image.device):
        kernels[0](image, text, token_mask, patch_mask, scores, argmax)
    return scores, argmax


def cmli_backward(
    kernels: Implementation,
    grads: Pair,
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    argmax: Pair,
    d_image: Tensor,
    d_text: Tensor,
) -> None:
    """Add the features' gradients to `zero_gradient`s, given those of both scores [I, J]."""
    g = grads[0].contiguous(), grads[1].contiguous()
    with full_precision(image.device):
        kernels[1](g, image, text, token_mask, patch_mask, argmax, d_image, d_text)


def zero_gradient(x: Tensor) -> Tensor:
    """Where the gradient of features is added up, in fp32 (fp64 for fp64)."""
    return x.new_zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32))


class _Scores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, image, text, token_mask, patch_mask, backend):
        ctx.kernels, keep = implementation(image, text, backend), any(ctx.needs_input_grad)
        sides = image, text, token_mask, patch_mask
        scores, argmax = cmli_forward(ctx.kernels, *sides, keep)
        ctx.save_for_backward(*sides, *(argmax or ()))
        return scores

    @staticmethod
    def backward(ctx, *grads):
        refuse_second_derivative()
        image, text, token_mask, patch_mask, *argmax = ctx.saved_tensors
        d_image, d_text = zero_gradient(image), zero_gradient(text)
        sides = image, text, token_mask, patch_mask
        cmli_backward(ctx.kernels, grads, *sides, argmax, d_image, d_text)
        return d_image.to(image.dtype), d_text.to(text.dtype), None, None, None


def refuse_second_derivative() -> None:
    """`once_differentiable` is silent here: it returns gradients without a graph."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            "all-pairs CMLI has no second derivative: call backward without create_graph=True"
        )


def checked(image: Tensor, text: Tensor, token_mask: Tensor, patch_mask: Tensor | None) -> Pair:
    """The features, under autocast of one dtype. Raises ValueError for what does not fit."""
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
    return image, text


def cmli_scores(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None = None,
    backend: str = "auto",
) -> Pair:
    """Score every image with every text by Cross-Modal Late Interaction, in both directions.

    With S[n, m] = image[i, n] . text[j, m] over valid patches n and valid tokens m:
        s_i2t[i, j] = mean over n of max over m of S[n, m]
        s_t2i[i, j] = mean over m of max over n of S[n, m]
    Equations (1)-(4) of the source document; FILIP (arXiv 2111.07783), equations 4 and 5. The
    similarities of all pairs are never stored: memory is the argmax indices, I*J*(N+M) bytes, and a
    bounded scratch.

    Args:
        image: [I, N, D] patch features, fp32, bf16, fp16 or fp64. Not normalised here: for cosines
            the caller normalises, as `CMLILoss` does in fp32.
        text: [J, M, D] token features, of the same dtype and device.
        token_mask: bool [J, M], True = valid, in any pattern. Leave out [CLS], [SEP] and [PAD].
        patch_mask: bool [I, N], likewise; None: all are valid.
        backend: "cpu" (C++) or "triton" (GPUs), "torch" for PyTorch's operators alone, or "auto":
            the kernels of the device where they run, and PyTorch's operators otherwise.

    Returns:
        s_i2t and s_t2i, [I, J] fp32 (fp64 for fp64). Products are summed in fp32 and maxima taken
        of these sums, whatever the inputs. A masked position wins no maximum and counts in no mean;
        a text without valid tokens and an image without valid patches score 0 with zero gradient.
        Of equal similarities the lowest index wins. NaN and inf propagate.

    Raises:
        ValueError: an argument does not fit.
        RuntimeError: the backend does not run here, or a second derivative is asked for.
    """
    image, text = checked(image, text, token_mask, patch_mask)
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; it must be one of {', '.join(BACKENDS)}")
    return _Scores.apply(image, text, token_mask, patch_mask, backend)
