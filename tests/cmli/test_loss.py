"""`CMLILoss` as a module of other projects: what it refuses, precision, masks, copies, transformations."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from ds_cmli.cmli import CMLILoss, cmli_scores
from tests.cmli.helpers import random_case

IMAGE, TEXT, MASK, _ = random_case(3, 3, 5, 6, 4, dtype=torch.float32, text_lengths=[6, 2, 4])
GOOD = {"image": IMAGE, "text": TEXT, "token_mask": MASK}
SAME = torch.eye(3, dtype=torch.bool)
BAD = {
    "fewer texts": ({"text": TEXT[:2], "token_mask": MASK[:2]}, ValueError, "image has 3 rows and text has 2"),
    "fewer images": ({"image": IMAGE[:1]}, ValueError, "image has 1 rows and text has 3: row b of both"),
    "no pairs": ({"image": IMAGE[:0], "text": TEXT[:0], "token_mask": MASK[:0]}, ValueError, "an empty dimension"),
    "one vector a picture": ({"image": IMAGE[:, 0]}, ValueError, "image must have 3 dimensions"),
    "an array": ({"image": IMAGE.numpy()}, TypeError, "image must be a tensor, not ndarray"),
    "mask of fewer texts": ({"token_mask": MASK[:2]}, ValueError, r"token_mask has shape \[2, 6\]"),
    "mask of other numbers": ({"token_mask": MASK * 2}, ValueError, "token_mask holds 2: integers in a mask must"),
    "negative mask": ({"token_mask": -MASK.long()}, ValueError, "token_mask holds -1"),
    "float mask": ({"token_mask": MASK.float()}, TypeError, "or integers 0 and 1, not torch.float32"),
    "ignore of one row": ({"ignore": SAME[:1]}, ValueError, r"ignore has shape \[1, 3\]; it must be \[3, 3\]"),
    "float ignore": ({"ignore": SAME.float()}, TypeError, "ignore must be a tensor of bool, or of integers"),
    "ignore elsewhere": ({"ignore": SAME.to("meta")}, ValueError, "ignore is on meta and image on cpu"),
    "two dtypes": ({"text": TEXT.half()}, TypeError, "text is torch.float16: cast one of them"),
    "loss elsewhere": (
        {name: x.to("meta") for name, x in GOOD.items()}, ValueError, "CMLILoss is on cpu and image on meta",
    ),
}  # fmt: skip
BAD_SETTINGS = {
    "sharper than the limit": (
        {"init_temperature": 0.001},
        "init_temperature is 0.001: give a number of at least 0.01",
    ),
    "not a number": ({"init_temperature": float("nan")}, "init_temperature is nan"),
    "infinite": ({"init_temperature": float("inf")}, "init_temperature is inf"),
    "text": ({"init_temperature": "0.05"}, "init_temperature is '0.05'"),
    "exchange": ({"exchange": "rings"}, "exchange='rings' is unknown; it must be one of auto, gather, ring"),
    "backend": ({"backend": "cuda"}, "backend='cuda' is unknown"),
    "scratch_bytes": ({"scratch_bytes": 0}, "scratch_bytes=0 must be positive"),
    "gather_bytes": ({"gather_bytes": 1e9}, "gather_bytes=1000000000.0 must be an int"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_does_not_fit_is_one_line(name):
    change, error, message = BAD[name]
    with pytest.raises(error, match=message) as caught:
        CMLILoss()(**GOOD | change)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", BAD_SETTINGS)
def test_wrong_settings_are_told_when_the_loss_is_built(name):
    settings, message = BAD_SETTINGS[name]
    with pytest.raises(ValueError, match=message):
        CMLILoss(**settings)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_masks_of_integers(dtype):
    image_mask = torch.arange(5) < torch.tensor([[5], [1], [3]])
    ignore = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 0]]).bool()
    masks = MASK, image_mask, ignore
    expected = CMLILoss()(IMAGE, TEXT, *masks)
    assert CMLILoss()(IMAGE, TEXT, *(mask.to(dtype) for mask in masks)) == expected
    assert expected != CMLILoss()(**GOOD)
    scores = cmli_scores(IMAGE, TEXT, MASK.to(dtype), image_mask.to(dtype))
    assert all(map(torch.equal, scores, cmli_scores(IMAGE, TEXT, MASK, image_mask)))


def test_an_image_does_not_ignore_its_own_text():
    assert CMLILoss()(**GOOD, ignore=SAME) == CMLILoss()(**GOOD)


def trained(loss, image, text, mask):
    """The value, and the gradients of image, text and temperature."""
    image, text = image.detach().requires_grad_(), text.detach().requires_grad_()
    value = loss(image, text, mask)
    return value.detach(), *torch.autograd.grad(value, (image, text, loss.logit_scale))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_autocast_takes_the_wider_dtype(narrow, wide):
    text = TEXT.to(wide)
    expected = trained(CMLILoss(), IMAGE.to(narrow).to(wide), text, MASK)
    with torch.autocast("cpu", dtype=narrow):
        outcome = trained(CMLILoss(), IMAGE.to(narrow), text, MASK)
        scores = cmli_scores(IMAGE.to(narrow), text, MASK)
    assert [x.dtype for x in outcome] == [wide, narrow, wide, torch.float32]
    assert torch.equal(outcome[0], expected[0]) and torch.equal(outcome[2], expected[2])
    assert torch.equal(outcome[1], expected[1].to(narrow))
    assert all(map(torch.equal, scores, cmli_scores(IMAGE.to(narrow).to(wide), text, MASK)))


def test_the_reference_is_not_narrowed_by_autocast():
    expected = cmli_scores(IMAGE, TEXT, MASK, backend="reference")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = cmli_scores(IMAGE, TEXT, MASK, backend="reference")
    assert all(map(torch.equal, result, expected))


def test_scaled_gradients_in_fp16():
    loss = CMLILoss()
    image = IMAGE.half().requires_grad_()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    scaler.scale(loss(image, TEXT.half(), MASK)).backward()
    expected = trained(loss, IMAGE.half(), TEXT.half(), MASK)[1]
    assert image.grad.dtype == torch.float16
    assert_close(image.grad.float() / 2**10, expected.float(), atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("cut", [0.0, 1e-3])
def test_a_valid_position_of_zeros_learns_nothing(exchange, cut):
    torch.manual_seed(0)
    image, text, mask = torch.randn(6, 5, 8), torch.randn(6, 4, 8), torch.ones(6, 4, dtype=torch.bool)
    image[2, 3], text[4, 1] = 0.0, 0.0
    image.requires_grad_(), text.requires_grad_()
    CMLILoss(exchange=exchange, cut=cut)(image, text, mask).backward()
    assert image.grad[2, 3].eq(0).all() and text.grad[4, 1].eq(0).all()
    assert 0 < image.grad.abs().max() < 10 and 0 < text.grad.abs().max() < 10


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_under_activation_checkpointing(use_reentrant):
    loss = CMLILoss()
    image = IMAGE.clone().requires_grad_()
    checkpoint(loss, image, TEXT, MASK, use_reentrant=use_reentrant).backward()
    assert torch.equal(image.grad, trained(loss, IMAGE, TEXT, MASK)[1])


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_compiled_without_graph_breaks(dtype):
    loss = CMLILoss()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = compiled(IMAGE.bfloat16(), TEXT, MASK.to(dtype))
    assert_close(value, loss(IMAGE.bfloat16().float(), TEXT, MASK))
    if dtype != torch.bool:
        with pytest.raises(ValueError, match="token_mask holds 3"):
            compiled(IMAGE, TEXT, 3 * MASK.to(dtype))


@pytest.mark.parametrize("derivative", ["grad", "jacrev", "jacfwd", "hessian"])
def test_derivatives_of_torch_func_are_refused(derivative):
    with pytest.raises(RuntimeError, match="no derivative in forward mode or under"):
        getattr(torch.func, derivative)(lambda image: CMLILoss()(image, TEXT, MASK))(IMAGE)


def test_forward_mode_is_refused():
    """Not answered with zero."""
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises(RuntimeError, match="no derivative in forward mode"),
    ):
        CMLILoss()(torch.autograd.forward_ad.make_dual(IMAGE, IMAGE), TEXT, MASK)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_over_batches():
    images = torch.stack([IMAGE, 2 * IMAGE.flip(0)]).requires_grad_()
    values = torch.vmap(lambda image: CMLILoss()(image, TEXT, MASK.long()))(images)
    expected = [trained(CMLILoss(), image, TEXT, MASK)[:2] for image in images]
    assert_close(values.tolist(), [value.item() for value, _ in expected])
    assert_close(torch.autograd.grad(values.sum(), images)[0], torch.stack([grad for _, grad in expected]))


def test_a_second_derivative_is_refused():
    image = IMAGE.clone().requires_grad_()
    (grad,) = torch.autograd.grad(CMLILoss()(image, TEXT, MASK), image, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    with mode():
        value = CMLILoss()(**GOOD)
    assert not value.requires_grad and value == CMLILoss()(**GOOD)


def test_other_layouts_of_memory():
    image, text = IMAGE.transpose(0, 2).contiguous().transpose(0, 2), TEXT[:1].expand(3, -1, -1)
    outcome = trained(CMLILoss(), image, text, MASK.t().contiguous().t())
    for ours, expected in zip(outcome, trained(CMLILoss(), IMAGE, text.contiguous(), MASK), strict=True):
        assert_close(ours, expected, atol=1e-6, rtol=1e-6)


def test_copies():
    loss = CMLILoss(0.07, exchange="gather", scratch_bytes=2**20)
    other = CMLILoss(0.5)
    other.load_state_dict(loss.state_dict())
    assert list(loss.state_dict()) == ["logit_scale"]
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss)), other):
        assert copied.logit_scale is not loss.logit_scale
        assert copied(**GOOD) == loss(**GOOD)
    assert copy.deepcopy(loss).score == loss.score


def test_a_narrow_temperature_still_gives_fp32():
    assert CMLILoss().bfloat16()(IMAGE.bfloat16(), TEXT.bfloat16(), MASK).dtype == torch.float32
    assert CMLILoss().double()(IMAGE.double(), TEXT.double(), MASK).dtype == torch.float64


def test_the_import_is_light():
    heavy = {"deepspeed", "transformers", "timm", "torch._dynamo", "pydantic", "rich"}
    line = f"import sys, ds_cmli.cmli; print({heavy!r} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
