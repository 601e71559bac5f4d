"""`cmli_scores`: all-pairs CMLI as one opaque, differentiable operator with several backends; and
`maxsim`, one direction of it.

The two operators `ds_cmli::cmli_forward` and `ds_cmli::cmli_backward` are registered with
torch.library, so that FakeTensorMode, torch.compile and activation checkpointing see their shapes
and never look inside.
They return what `forward` and `backward` of a backend do, chosen inside them (`backends.py`).

Shape legend: I images, J texts, N patches, M text positions (padded), D features.
"""

import torch
from torch import Tensor

from ds_cmli.cmli.backends import backend_of
from ds_cmli.cmli.chunked.kernels import suited
from ds_cmli.cmli.inputs import (
    CMLI,
    DEFAULT_SCRATCH_BYTES,
    Sides,
    Wanted,
    accepted,
    check_inputs,
    full_precision,
)
from ds_cmli.cmli.sequences import MAXSIM, accepted_maxsim, of_each_query, packings, padded


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


def maxsim(
    queries: Tensor,
    documents: Tensor,
    query_mask: Tensor | None = None,
    document_mask: Tensor | None = None,
    reduction: str = "sum",
    *,
    backend: str = "auto",
    scratch_bytes: int = DEFAULT_SCRATCH_BYTES,
    recompute: bool = False,
) -> Tensor:
    """Score every query with every document by late interaction, in one direction.

    With S[l, k] = queries[q, l] . documents[c, k] over valid tokens l and k:
        score[q, c] = sum over l of max over k of S[l, k]
    ColBERT (arXiv 2004.12832), equation 3. It is s_t2i of `cmli_scores`, and computes and keeps
    nothing of s_i2t: memory is the argmax indices (Q*C*L_q bytes, twice that for documents of over
    256 tokens) and a bounded scratch.

    Args:
        queries: [Q, L_q, D], float64, float32, bfloat16 or float16, not normalised here. Packed:
            [R, D], the tokens of all queries one after the other.
        documents: [C, L_d, D], or packed [R, D], of the same dtype and device. [Q, K, L_d, D]: K of
            each query's own, with which alone it is scored.
        query_mask: [Q, L_q] bool, True = valid, in any pattern, or integers 0 and 1, at a CPU-GPU
            sync; None = all. Of packed queries int32 or int64 [Q + 1], the row at which each begins
            and then R (`cu_seqlens` of variable-length attention), at a CPU-GPU sync.
        document_mask: likewise, [C, L_d], [C + 1] or [Q, K, L_d].
        reduction: "sum" over a query's valid tokens, or their "mean".
        backend, scratch_bytes, recompute: as in `cmli_scores`. The chunked backend computes no
            padding; triton copies packed features to padded ones, of which it skips the tiles that
            hold no valid token.

    Returns:
        [Q, C], or [Q, K] for each query's own, float32 (float64 for float64 inputs). Products are
        summed in fp32, whatever the inputs. A masked token adds nothing and wins nothing. A query
        without valid tokens scores 0, and a document without any scores 0 with every query, with
        zero gradient: exclude it where 0 is no low score. Equal similarities: the lowest index
        wins, and the gradient goes to it alone. NaN and inf propagate.

    Raises:
        TypeError, ValueError: an argument does not fit; one line says which and how.
        RuntimeError: as `cmli_scores`.
    """
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction={reduction!r} is unknown; it must be sum or mean")
    arguments = queries, documents, query_mask, document_mask, backend, scratch_bytes
    sides, counts = accepted_maxsim(*arguments)
    # The kernels alone score each query's own documents in one call.
    device, dtype = sides.image.device.type, sides.image.dtype
    if sides.own and not (backend in ("auto", "chunked") and suited(device, dtype)):
        columns = []
        for one in of_each_query(sides):
            columns.append(_scores(one, backend, scratch_bytes, recompute)[1])
        scores = torch.cat(columns, 1)  # [K, Q], means
    else:
        _, scores = _scores(sides, backend, scratch_bytes, recompute)  # [C, Q], means
        if sides.own:
            scores = scores.unflatten(0, (-1, sides.own)).diagonal(dim1=0, dim2=2)  # [K, Q]
    if reduction == "sum":
        scores = scores * counts
    return scores.t().contiguous()


def _scores(
    sides: Sides, backend: str, scratch_bytes: int, recompute: bool
) -> tuple[Tensor, Tensor]:
    """Both scores [I, J] of checked arguments; the first is empty if one direction is wanted."""
    backend = _chosen(backend, sides.image)
    if backend == "reference":
        from ds_cmli.cmli.reference import cmli_scores_reference

        with full_precision(sides.image.device):
            return cmli_scores_reference(*padded(sides, *packings(sides))[:4])
    needed = sides.image.requires_grad or sides.text.requires_grad
    save_argmax = torch.is_grad_enabled() and needed and not recompute
    s_i2t, s_t2i, _, _ = _forward(*sides[:4], backend, scratch_bytes, save_argmax, *sides[4:])
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
        grads: the gradients [I, J] of s_i2t and s_t2i; of sides with `one_way` the first is empty,
            and the second is that of the means of `maxsim`, [C, Q].
    """
    one_way = sides.one_way
    check_inputs(*sides[:4], backend, scratch_bytes, MAXSIM if one_way else CMLI)
    backend = _chosen(backend, sides.image)
    if backend == "reference":
        image = sides.image.detach().requires_grad_()
        text = sides.text.detach().requires_grad_()
        with torch.enable_grad():
            scores = _scores(sides._replace(image=image, text=text), backend, scratch_bytes, False)
        d_image, d_text = torch.autograd.grad(scores[one_way:], (image, text), grads[one_way:])
        return d_image, d_text
    none = sides.image.new_empty((0,), dtype=torch.uint8)
    return _backward(*grads, *sides[:4], none, none, backend, scratch_bytes, *wanted, one_way)


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
    one_way: bool = False,
    own: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sides = Sides(image, text, token_mask, image_mask, one_way, own)
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
    one_way: bool = False,
    own: int = 0,
) -> tuple[Tensor, Tensor]:
    sides = Sides(image, text, token_mask, image_mask, one_way, own)
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
def _(
    image, text, token_mask, image_mask, backend, scratch_bytes, save_argmax, one_way=False, own=0
):
    return Sides(image, text, token_mask, image_mask, one_way, own).new_results(save_argmax)


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
    one_way=False,
    own=0,
):
    d_image = image.new_empty(image.shape if need_image else (0,))
    d_text = text.new_empty(text.shape if need_text else (0,))
    return d_image, d_text


def _save(ctx, inputs, output):
    image, text, token_mask, image_mask, ctx.backend, ctx.scratch_bytes, _, *ctx.kind = inputs
    # Without this, autograd would make zeros as gradients of the argmax indices too.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(image, text, token_mask, image_mask, *output[2:])


def _differentiate(ctx, grad_i2t, grad_t2i, *_):
    need_image, need_text = ctx.needs_input_grad[:2]
    saved = ctx.saved_tensors  # once: non-reentrant checkpointing unpacks them only once
    image, shape = saved[0], Sides(*saved[:4]).sizes()
    dtype = torch.promote_types(image.dtype, torch.float32)
    if grad_i2t is None:
        grad_i2t = image.new_zeros((0,) if ctx.kind[0] else shape, dtype=dtype)
    if grad_t2i is None:
        grad_t2i = image.new_zeros(shape, dtype=dtype)
    options = ctx.backend, ctx.scratch_bytes, need_image, need_text, *ctx.kind
    d_image, d_text = _backward(grad_i2t, grad_t2i, *saved, *options)
    gradients = (d_image if need_image else None, d_text if need_text else None)
    return gradients + (None,) * 7


def _no_second_derivative(ctx, *grads):
    raise RuntimeError(
        "cmli_scores and maxsim have no second derivative: call backward without create_graph=True"
    )


torch.library.register_autograd("ds_cmli::cmli_forward", _differentiate, setup_context=_save)
torch.library.register_autograd("ds_cmli::cmli_backward", _no_second_derivative)
