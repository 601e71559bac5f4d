"""The operator as PyTorch's own machinery sees it: fake tensors, compile, checkpointing, autocast, errors."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import ds_cmli.cmli.op
from ds_cmli.cmli import cmli_scores
from tests.cmli.helpers import random_case, upstream_for, with_gradients


def scalar(image, text, token_mask, image_mask=None, **options):
    s_i2t, s_t2i = cmli_scores(image, text, token_mask, image_mask, **options)
    return s_i2t.square().sum() + s_t2i.sum()


def gradients(function, case, **options):
    image, text = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
    return torch.autograd.grad(function(image, text, *case[2:], **options), (image, text))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked, dtype):
    image, text, token_mask, image_mask = random_case(3, 4, 6, 5, 4, dtype=dtype, masked=masked)
    for save in (False, True):
        for needs in (False, True):
            inputs = (image.clone().requires_grad_(needs), text.clone().requires_grad_(needs))
            torch.library.opcheck(
                torch.ops.ds_cmli.cmli_forward, (*inputs, token_mask, image_mask, "chunked", 2**20, save)
            )
    s_i2t, s_t2i, arg_i2t, arg_t2i = torch.ops.ds_cmli.cmli_forward(
        image, text, token_mask, image_mask, "chunked", 2**20, True
    )
    for need_image, need_text in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            torch.ops.ds_cmli.cmli_backward,
            (
                s_i2t,
                s_t2i,
                image,
                text,
                token_mask,
                image_mask,
                arg_i2t,
                arg_t2i,
                "chunked",
                2**20,
                need_image,
                need_text,
            ),
        )


@pytest.mark.parametrize("recompute", [False, True])
def test_compile_without_graph_breaks(recompute):
    case = random_case(3, 4, 6, 5, 4, dtype=torch.float32, masked=True)
    # aot_eager traces forward and backward as compile does, and needs no C++ compiler.
    compiled = torch.compile(scalar, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        gradients(compiled, case, recompute=recompute), gradients(scalar, case, recompute=recompute), strict=True
    ):
        assert torch.equal(got, want)


def test_fake_tensors_have_the_shapes_of_real_ones():
    case = random_case(3, 4, 6, 5, 8, dtype=torch.bfloat16, masked=True)
    real = with_gradients(case, upstream_for(case))
    with FakeTensorMode() as mode:
        fake = with_gradients(
            tuple(mode.from_tensor(x) for x in case), tuple(mode.from_tensor(x) for x in upstream_for(case))
        )
    for a, b in zip(fake, real, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, recompute):
    case = random_case(3, 4, 6, 5, 4, dtype=torch.float32)

    def checkpointed(image, text, token_mask, image_mask):
        return checkpoint(
            lambda v, w: scalar(v, w, token_mask, image_mask, recompute=recompute),
            image,
            text,
            use_reentrant=use_reentrant,
        )

    # Reentrant checkpointing works with .backward() only.
    image, text = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
    checkpointed(image, text, *case[2:]).backward()
    for got, want in zip((image.grad, text.grad), gradients(scalar, case), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    """The products inside stay in fp32 (fp64), forward and backward, and no dtype changes."""
    case = random_case(3, 4, 6, 5, 32, dtype=dtype)
    upstream = upstream_for(case)
    plain = with_gradients(case, upstream)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = with_gradients(case, upstream)
    for got, want in zip(cast, plain, strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want)


def test_nothing_is_saved_without_need():
    case = random_case(3, 4, 6, 5, 4)

    def saved(needs_grad=True, **options):
        kept = []
        image, text = case[0].clone().requires_grad_(needs_grad), case[1].clone().requires_grad_(needs_grad)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            cmli_scores(image, text, *case[2:], **options)
        return sorted(x.numel() for x in kept if x.dtype in (torch.uint8, torch.int16))

    assert saved() == sorted([3 * 4 * 6, 3 * 4 * 5])
    assert saved(recompute=True) == [0, 0]
    assert saved(needs_grad=False) == []


def test_second_derivative_is_refused():
    image, text, mask, _ = random_case(2, 3, 4, 5, 6)
    image.requires_grad_()
    (grad,) = torch.autograd.grad(scalar(image, text, mask), image, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: call backward without create_graph=True"):
        grad.sum().backward()


def test_auto_is_chunked_on_a_cpu(monkeypatch):
    used = []
    module = ds_cmli.cmli.op.backend_of
    monkeypatch.setattr(ds_cmli.cmli.op, "backend_of", lambda name, *of: used.append(name) or module(name, *of))
    cmli_scores(*random_case(2, 3, 4, 5, 6))
    assert used == ["chunked"]


GOOD = {"image": torch.zeros(2, 3, 4), "text": torch.zeros(5, 6, 4), "token_mask": torch.ones(5, 6, dtype=torch.bool)}
BAD = {
    "image not a tensor": ({"image": [1.0]}, TypeError, "image must be a tensor, not list"),
    "image of two dimensions": ({"image": torch.zeros(2, 4)}, ValueError, r"image must have 3 dimensions \[I, N, D\]"),
    "no images": ({"image": torch.zeros(0, 3, 4)}, ValueError, r"image \[I, N, D\] has an empty dimension"),
    "no tokens": ({"text": torch.zeros(5, 0, 4)}, ValueError, r"text \[J, M, D\] has an empty dimension"),
    "sparse image": ({"image": torch.zeros(2, 3, 4).to_sparse()}, TypeError, "image must be a dense tensor"),
    "D differs": ({"text": torch.zeros(5, 6, 8)}, ValueError, "image has D=4 features and text has D=8"),
    "integer features": ({"image": torch.zeros(2, 3, 4).long()}, TypeError, "not torch.int64"),
    "dtypes differ": ({"text": torch.zeros(5, 6, 4).half()}, TypeError, "float32 and text is torch.float16: cast one"),
    "too many patches": ({"image": torch.zeros(1, 40000, 4)}, ValueError, "has 40000 positions; at most 32767"),
    "mask of numbers": ({"token_mask": torch.ones(5, 6)}, TypeError, "token_mask must be a bool tensor"),
    "mask of other shape": (
        {"token_mask": torch.ones(5, 7).bool()},
        ValueError,
        r"token_mask has shape \[5, 7\]; it must",
    ),
    "image mask of the text": ({"image_mask": torch.ones(5, 6).bool()}, ValueError, r"image_mask has shape \[5, 6\]"),
    "token_mask missing": ({"token_mask": None}, TypeError, "token_mask must be a tensor, not NoneType"),
    "other device": ({"text": torch.zeros(5, 6, 4, device="meta")}, ValueError, "text is on meta and image on cpu"),
    "mask elsewhere": ({"token_mask": torch.ones(5, 6, device="meta").bool()}, ValueError, "token_mask is on meta"),
    "unknown backend": ({"backend": "cuda"}, ValueError, "backend='cuda' is unknown; it must be one of auto"),
    "no scratch": ({"scratch_bytes": 0}, ValueError, "scratch_bytes=0 must be positive"),
    "scratch of half a byte": ({"scratch_bytes": 0.5}, TypeError, "scratch_bytes must be an int, not float"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gets_one_readable_line(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        cmli_scores(**{**GOOD, **change})
    assert "\n" not in str(caught.value)
