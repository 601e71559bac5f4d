"""`cmli_scores`: all-pairs CMLI as one opaque, differentiable operator with several backends.

The two operators `ds_cmli::cmli_forward` and `ds_cmli::cmli_backward` are registered with
torch.library, so that FakeTensorMode, torch.compile and activation checkpointing see their shapes
and never look inside.
They return what `forward` and `backward` of a backend do, chosen inside them (`backends.py`).

Shape legend: I images, J texts, N patches, M text positions (padded), D features.
"""

import torch
from torch import Tensor

from ds_cmli.cmli.backends import backend_of
from ds_cmli.cmli.inputs import (
    DEFAULT_SCRATCH_BYTES,
    Sides,
    Wanted,
    accepted,
    check_inputs,
    full_precision,
)


def cmli_scores(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    image_mask: Tensor | None = None,
    *,
    backend: str = "auto",
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
    recompute: bool = False,
) -> tuple[Tensor, Tensor]:
    """Score every image with every text by Cross-Modal Late Interaction, in both directions.

    With S[n, m] = image[i, n] . text[j, m] over valid patches n and valid tokens m:
        s_i2t[i, j] = mean over n of max over m of S[n, m]
        s_t2i[i, j] = mean over m of max over n of S[n, m]
    Equations (1)-(4) of the source document; FILIP (arXiv 2111.07783), equations 4 and 5. The
    similarities of all pairs are never stored: memory is the argmax indices (I*J*(N+M) bytes) and
    a bounded scratch.

    Args:
        image: [I, N, D] patch features, float64, float32, bfloat16 or float16. Not normalised
            here: for cosines, the caller normalises (as `CMLILoss` does, in fp32).
        text: [J, M, D] token features, of the same dtype and device.
        token_mask: [J, M] bool, True = valid, in any pattern. Leave out [CLS], [SEP] and [PAD].
            Integers 0 and 1 are taken too, at a CPU-GPU sync for their values.
        image_mask: [I, N], likewise; None = all.
        backend: "auto" (triton on CUDA where it runs, otherwise chunked), "chunked", "triton" or
            "reference" (materialises everything; for tests).
        scratch_bytes: budget for temporary memory. Another budget changes the order of sums, and
            results by 1e-6 at the most.
        recompute: keep nothing but the inputs for backward, which then computes the products again.

    Returns:
        (s_i2t, s_t2i), both [I, J] float32 (float64 for float64 inputs). Products are summed in
        fp32 and maxima taken on those sums, whatever the inputs. A masked position wins no maximum
        and counts in no mean; a text without valid tokens and an image without valid patches score
        0 with zero gradient. Equal similarities: the lowest index wins. NaN and inf propagate.
        Under autocast inputs of two dtypes are taken in the wider one, and nothing else changes.

    Raises:
        TypeError, ValueError: an argument does not fit; one line says which and how.
        RuntimeError: the backend cannot run here, or a derivative is requested that there is not:
            a second one, one in forward mode, or one under torch.func.
    """
    sides = accepted(image, text, token_mask, image_mask, backend, scratch_bytes)
    return _scores(sides, backend, scratch_bytes, recompute)


def _scores(
    sides: Sides, backend: str, scratch_bytes: int, recompute: bool
) -> tuple[Tensor, Tensor]:
    """Both scores [I, J] of checked arguments."""
    backend = _chosen(backend, sides.image)
    if backend == "reference":
        from ds_cmli.cmli.reference import cmli_scores_reference

        with full_precision(sides.image.device):
            return cmli_scores_reference(*sides[:4])
    needed = sides.image.requires_grad or sides.text.requires_grad
    save_argmax = torch.is_grad_enabled() and needed and not recompute
    s_i2t, s_t2i, _, _ = _forward(*sides[:4], backend, scratch_bytes, save_argmax)
    return s_i2t, s_t2i


def cmli_gradients(
    grads: tuple[Tensor, Tensor],
    sides: Sides,
    wanted: Wanted,
    *,
    backend: str = "auto",
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
) -> tuple[Tensor, Tensor]:
    """Gradients [I, N, D] and [J, M, D] of `cmli_scores`' inputs, from those of its scores.

    It is for callers that keep no graph: argmax indices are computed again, a part at a time within
    `scratch_bytes`. A gradient that is not wanted is returned with unspecified values. The other
    arguments and the errors are those of `cmli_scores`.

    Args:
        grads: the gradients [I, J] of s_i2t and s_t2i.
    """
    check_inputs(*sides[:4], backend, scratch_bytes)
    backend = _chosen(backend, sides.image)
    if backend == "reference":
        image = sides.image.detach().requires_grad_()
        text = sides.text.detach().requires_grad_()
        with torch.enable_grad():
            scores = _scores(sides._replace(image=image, text=text), backend, scratch_bytes, False)
        d_image, d_text = torch.autograd.grad(scores, (image, text), grads)
        return d_image, d_text
    none = sides.image.new_empty((0,), dtype=torch.uint8)
    return _backward(*grads, *sides[:4], none, none, backend, scratch_bytes, *wanted)


def _chosen(backend: str, image: Tensor) -> str:
    # On a GPU the operator itself decides: compiled code cannot try kernels.
    return "chunked" if backend == "auto" and image.device.type != "cuda" else backend


def _forward_inside(
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    image_mask: Tensor | None,
    backend: str,
    scratch_bytes: int,
    save_argmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sides = Sides(image, text, token_mask, image_mask)
    with full_precision(image.device):
        return backend_of(backend, image, text).forward(sides, scratch_bytes, save_argmax)


def _backward_inside(
    grad_i2t: Tensor,
    grad_t2i: Tensor,
    image: Tensor,
    text: Tensor,
    token_mask: Tensor,
    image_mask: Tensor | None,
    arg_i2t: Tensor,
    arg_t2i: Tensor,
    backend: str,
    scratch_bytes: int,
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor]:
    sides = Sides(image, text, token_mask, image_mask)
    grads, argmax = (grad_i2t, grad_t2i), (arg_i2t, arg_t2i)
    with full_precision(image.device):
        chosen = backend_of(backend, image, text)
        return chosen.backward(sides, grads, argmax, Wanted(need_image, need_text), scratch_bytes)


_forward = torch.library.custom_op("ds_cmli::cmli_forward", _forward_inside, mutates_args=())
_backward = torch.library.custom_op("ds_cmli::cmli_backward", _backward_inside, mutates_args=())
# What the operators compute by others, for a mode that is to see what they hold.
INSIDE = {
    torch.ops.ds_cmli.cmli_forward.default: _forward_inside,
    torch.ops.ds_cmli.cmli_backward.default: _backward_inside,
}


@_forward.register_fake
def _(image, text, token_mask, image_mask, backend, scratch_bytes, save_argmax):
    return Sides(image, text, token_mask, image_mask).new_results(save_argmax)


@_backward.register_fake
def _(
    grad_i2t,
    grad_t2i,
    image,
    text,
    token_mask,
    image_mask,
    arg_i2t,
    arg_t2i,
    backend,
    scratch_bytes,
    need_image,
    need_text,
):
    d_image = image.new_empty(image.shape if need_image else (0,))
    d_text = text.new_empty(text.shape if need_text else (0,))
    return d_image, d_text


def _save(ctx, inputs, output):
    image, text, token_mask, image_mask, ctx.backend, ctx.scratch_bytes, _ = inputs
    # Without this, autograd would make zeros as gradients of the argmax indices too.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image, text, token_mask, image_mask, *output[2:])


def _differentiate(ctx, grad_i2t, grad_t2i, *_):
    need_image, need_text = ctx.needs_input_grad[:2]
    saved = ctx.saved_tensors  # once: non-reentrant checkpointing unpacks them only once
    image, shape = saved[0], Sides(*saved[:4]).sizes()
    dtype = torch.promote_types(image.dtype, torch.float32)
    if grad_i2t is None:
        grad_i2t = image.new_zeros(shape, dtype=dtype)
    if grad_t2i is None:
        grad_t2i = image.new_zeros(shape, dtype=dtype)
    options = ctx.backend, ctx.scratch_bytes, need_image, need_text
    d_image, d_text = _backward(grad_i2t, grad_t2i, *saved, *options)
    gradients = (d_image if need_image else None, d_text if need_text else None)
    return gradients + (None,) * 5


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "cmli_scores has no second derivative: call backward without create_graph=True"
    )


torch.library.register_autograd("ds_cmli::cmli_forward", _differentiate, setup_context=_save)
torch.library.register_autograd("ds_cmli::cmli_backward", _no_second_derivative)
