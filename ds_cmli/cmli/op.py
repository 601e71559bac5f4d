"""`cmli_scores`: the scores of Cross-Modal Late Interaction of every image with every text.

The kernels of a device are two functions that write into tensors made here:
`forward(sides, scores, argmax)` writes scores [I, J], zeros before, and argmax indices [I, J, N]
and [I, J, M], unless None; `backward(sides, d_scores, argmax, d_sides)` adds gradients of image and
text, fp32 or fp64. On tensors without data, as those of FakeTensorMode, they allocate what they
would otherwise and start nothing.

Two operators of PyTorch stand around the kernels, so that whatever traces a program (`make_fx`,
`torch.export`, `torch.compile`) records them as they are: `ds_cmli::scores`, which has a gradient,
and `ds_cmli::add_feature_gradients`, its backward.

Shapes: I images, J texts, N patches, M text positions (padded), D features.
"""

import functools
import os
import subprocess
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from . import cpu, fallback
from .sides import (
    Directions,
    Sides,
    checked_sides,
    full_precision,
    has_data,
    index_dtype,
    power_of_two,
    score_dtype,
    zero_gradient,
)

BACKENDS = ("auto", "cpu", "triton", "torch")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's kernels run on a CPU, slowly


class Kernels(NamedTuple):
    forward: Callable[..., None]
    backward: Callable[..., None]


def cmli_scores(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None = None,
    backend: str = "auto",
) -> Directions:
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
        patch_mask: bool [I, N], likewise; None: all patches are valid.
        backend: "cpu" (C++) or "triton" (GPUs), "torch" for PyTorch's operators alone, or "auto":
            the kernels of the device where they run, and PyTorch's operators otherwise.

    Returns:
        s_i2t and s_t2i, [I, J] fp32 (fp64 for fp64). Products are summed in fp32 and maxima taken
        of these sums, whatever the inputs. A masked position wins no maximum and counts in no mean;
        a text without valid tokens and an image without valid patches score 0 with zero gradient.
        Of equal similarities the lowest index wins. NaN and inf propagate.

    Raises ValueError if an argument does not fit, and RuntimeError if the backend does not run here
    or a second derivative is computed.
    """
    check_backend(backend)
    image, text, token_mask, patch_mask = checked_sides(Sides(image, text, token_mask, patch_mask))
    if len(image) == 0 or len(text) == 0:
        raise ValueError(f"there are no pairs of {len(image)} images and {len(text)} texts")
    keep_argmax = torch.is_grad_enabled() and (image.requires_grad or text.requires_grad)
    s_i2t, s_t2i, _, _ = torch.ops.ds_cmli.scores(
        image, text, token_mask, patch_mask, backend, keep_argmax
    )
    return s_i2t, s_t2i


def check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} is unknown; it must be one of {', '.join(BACKENDS)}")


# --- the operators of PyTorch


def score_pairs(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    backend: str,
    keep_argmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return both scores [I, J], and the best token of each patch [I, J, N] and the best patch of
    each token [I, J, M], which are empty unless `keep_argmax`.
    """
    sides = Sides(image, text, token_mask, patch_mask)
    kernels = choose_kernels(sides, backend)
    s_i2t, s_t2i, token_argmax, patch_argmax = _empty_results(*sides, backend, keep_argmax)
    argmax = (token_argmax, patch_argmax) if keep_argmax else None
    with full_precision(image.device):
        kernels.forward(sides, (s_i2t, s_t2i), argmax)
    return s_i2t, s_t2i, token_argmax, patch_argmax


def add_feature_gradients(
    d_image: Tensor,
    d_text: Tensor,
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    patch_mask: Tensor | None,
    d_i2t: Tensor,
    d_t2i: Tensor,
    token_argmax: Tensor,
    patch_argmax: Tensor,
    backend: str,
) -> None:
    """Add the features' gradients to `d_image` and `d_text`, given those of both scores [I, J]."""
    sides = Sides(image, text, token_mask, patch_mask)
    kernels = choose_kernels(sides, backend)
    d_scores = (d_i2t.contiguous(), d_t2i.contiguous())
    with full_precision(image.device):
        kernels.backward(sides, d_scores, (token_argmax, patch_argmax), (d_image, d_text))


# Called with the arguments of `score_pairs`: by it, and by PyTorch on tensors without data.
def _empty_results(image, text, token_mask, patch_mask, backend, keep_argmax):
    num_images, num_patches, _ = image.shape
    num_texts, num_tokens, _ = text.shape
    # They are zeros, because kernels write no scores of empty texts.
    s_i2t = image.new_zeros(num_images, num_texts, dtype=score_dtype(image))
    s_t2i = image.new_zeros(num_images, num_texts, dtype=score_dtype(image))
    kept_images = num_images if keep_argmax else 0
    token_argmax = image.new_empty(
        kept_images, num_texts, num_patches, dtype=index_dtype(num_tokens)
    )
    patch_argmax = image.new_empty(
        kept_images, num_texts, num_tokens, dtype=index_dtype(num_patches)
    )
    return s_i2t, s_t2i, token_argmax, patch_argmax


def _save_for_backward(ctx, inputs, output):
    image, text, token_mask, patch_mask, backend, _ = inputs
    _, _, token_argmax, patch_argmax = output
    ctx.save_for_backward(image, text, token_mask, patch_mask, token_argmax, patch_argmax)
    ctx.backend = backend
    ctx.mark_non_differentiable(token_argmax, patch_argmax)
    ctx.set_materialize_grads(False)  # zeros for the indices would take as much memory as these


def _scores_backward(ctx, d_i2t, d_t2i, _d_token_argmax, _d_patch_argmax):
    refuse_second_derivative()
    image, text, token_mask, patch_mask, token_argmax, patch_argmax = ctx.saved_tensors
    shape = len(image), len(text)
    if d_i2t is None:
        d_i2t = image.new_zeros(shape, dtype=score_dtype(image))
    if d_t2i is None:
        d_t2i = image.new_zeros(shape, dtype=score_dtype(image))
    d_image = zero_gradient(image)
    d_text = zero_gradient(text)
    torch.ops.ds_cmli.add_feature_gradients(
        d_image, d_text, image, text, token_mask, patch_mask, d_i2t, d_t2i, token_argmax,
        patch_argmax, ctx.backend,
    )  # fmt: skip
    return d_image.to(image.dtype), d_text.to(text.dtype), None, None, None, None


def refuse_second_derivative() -> None:
    """Raise RuntimeError in a backward that is itself differentiated.

    `once_differentiable` is silent here: it returns gradients without a graph.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "all-pairs CMLI has no second derivative: call backward without create_graph=True"
        )


# `torch.library.custom_op` does the same, but its first call imports torch._dynamo: seconds.
torch.library.define("ds_cmli::scores", torch.library.infer_schema(score_pairs, mutates_args=()))
torch.library.impl("ds_cmli::scores", "default", score_pairs)
torch.library.register_fake("ds_cmli::scores", _empty_results)
torch.library.register_autograd(
    "ds_cmli::scores", _scores_backward, setup_context=_save_for_backward
)
torch.library.define(
    "ds_cmli::add_feature_gradients",
    torch.library.infer_schema(add_feature_gradients, mutates_args=("d_image", "d_text")),
)
torch.library.impl("ds_cmli::add_feature_gradients", "default", add_feature_gradients)
torch.library.register_fake("ds_cmli::add_feature_gradients", lambda *_: None)


# --- the choice of kernels


def choose_kernels(sides: Sides, backend: str) -> Kernels:
    """Return the kernels of a backend; "auto": those of the device.

    If the device's kernels do not run, "auto" warns once and returns plain PyTorch's. Raises
    RuntimeError if `backend` names kernels that do not run here.
    """
    device = sides.image.device
    name = backend
    if backend == "auto":
        name = {"cpu": "cpu", "cuda": "triton"}.get(device.type, "torch")
    if sides.image.dtype == torch.float64:
        name = "torch"
    why_not = None
    if name == "cpu":
        why_not = why_not_cpu() if device.type == "cpu" else f"the features are on {device}"
    elif name == "triton" and device.type != "cuda" and not INTERPRETED:
        why_not = f"the features are on {device}"
    elif name == "triton" and device.type == "cuda" and has_data(sides.image):
        # Tiles depend on sizes rounded up to powers of two, so one trial serves all such sizes.
        N = power_of_two(sides.image.shape[1])
        M = power_of_two(sides.text.shape[1])
        why_not = why_not_triton(device, sides.image.dtype, N, M, sides.image.shape[2])
    if why_not is None:
        return _kernels_named(name)
    if backend != "auto":
        raise RuntimeError(f"backend={backend!r} does not run here: {why_not}")
    _warn(why_not)
    return _kernels_named("torch")


def _kernels_named(name: str) -> Kernels:
    if name == "triton":
        from . import triton_backward, triton_forward

        return Kernels(triton_forward.forward, triton_backward.backward)
    module = cpu if name == "cpu" else fallback
    return Kernels(module.forward, module.backward)


@functools.cache
def _warn(reason: str) -> None:
    warnings.warn(f"all-pairs CMLI runs without kernels, and slower: {reason}", stacklevel=2)


@functools.cache
def why_not_cpu() -> str | None:
    """Return why the C++ kernels do not run, in one line, or None."""
    try:
        cpu.load_kernels()
    except subprocess.CalledProcessError as error:
        lines = error.stderr.decode(errors="replace").splitlines()
        message = next((line for line in lines if "error" in line), " ".join(lines[:1]))
        return f"{error.cmd[0]} failed with exit code {error.returncode}: {message.strip()[:300]}"
    except OSError as error:
        return str(error)
    return None


@functools.cache
def why_not_triton(device: torch.device, dtype: torch.dtype, N: int, M: int, D: int) -> str | None:
    """Return why the Triton kernels do not run on a GPU for such inputs, in one line, or None.

    The kernels are compiled, started for one pair, and waited for.
    """
    from .triton_forward import why_not_capability

    why_not = why_not_capability(torch.cuda.get_device_capability(device))
    if why_not is not None:
        return why_not
    image = torch.ones(1, N, D, dtype=dtype, device=device)
    text = torch.ones(1, M, D, dtype=dtype, device=device)
    token_mask = torch.ones(1, M, dtype=torch.bool, device=device)
    sides = Sides(image, text, token_mask)
    d_sides = zero_gradient(image), zero_gradient(text)
    kernels = _kernels_named("triton")
    try:
        s_i2t, s_t2i, *argmax = _empty_results(*sides, "triton", keep_argmax=True)
        with full_precision(device):
            kernels.forward(sides, (s_i2t, s_t2i), argmax)
            kernels.backward(sides, (s_i2t, s_t2i), argmax, d_sides)
        torch.cuda.synchronize(device)  # raises what failed while it ran
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # from Triton's compiler, from ptxas, or from the launch
        return " ".join(str(error).split())[:300]
    return None
