"""What is compared computes the same thing, and its predicted allocations are the allocator's."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from ds_cmli.cmli.contrastive import contrastive_loss
from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.losses import functions as losses
from ds_cmli.memory.cpu_events import sizes as cpu_sizes
from profiling.memory.document import implementations as allocations
from profiling.memory.document.estimates import Setting, claims
from profiling.memory.document.implementations import (
    broadcast_match,
    broadcast_scores,
    global_loss,
    implementations,
    materialised_match,
    materialised_scores,
)
from tests.cmli.helpers import random_case, upstream_for, without_kernels

SMALL = Setting(B=6, P=2, N=9, M=7, H=32, D=16)


@pytest.mark.parametrize("scores", [broadcast_scores, materialised_scores])
def test_scores_and_gradients_are_the_reference_s(scores):
    case = random_case(3, 5, 6, 4, 8, text_lengths=[4, 1, 3, 2, 4], masked=True)[:3]
    upstream = upstream_for(case)

    def results(function):
        image, text = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
        result = function(image, text, case[2])
        return [*result, *torch.autograd.grad(result, (image, text), upstream)]

    for ours, theirs in zip(results(scores), results(cmli_scores_reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_similarities_are_stored_in_16_bits(dtype):
    image, text, mask, _ = random_case(3, 5, 6, 4, 8, dtype=dtype, text_lengths=[4] * 5)
    wide = materialised_scores(image, text, mask)
    narrow = materialised_scores(image, text, mask, narrow=True)
    assert {x.dtype for x in (*wide, *narrow)} == {torch.float32}
    torch.testing.assert_close(narrow, wide, rtol=0.02, atol=0.05)
    largest = lambda function: max(cpu_sizes(lambda: function(image, text, mask)))  # noqa: E731
    assert largest(materialised_scores) == 3 * 6 * 5 * 4 * 4
    assert largest(partial(materialised_scores, narrow=True)) == 3 * 6 * 5 * 4 * 2


def test_matches_agree():
    # Products of small integers are exact in fp16, and no two patches of an image are equally good.
    patches = torch.eye(9, 16).half().expand(2, 9, 16)
    tokens = torch.zeros(2, 4, 16, dtype=torch.float16)
    best = torch.tensor([[3, 0, 8, 5], [1, 1, 7, 2]])
    tokens.scatter_(2, best[..., None], 2.0)
    for match in (broadcast_match, materialised_match, losses.match_patches):
        assert match(tokens, patches).equal(best)


def test_global_losses_agree():
    broadcast, product, ours = (implementations(SMALL)["E1", n] for n in ("broadcast", "materialised", "ours"))
    image, text, scale = broadcast.inputs("cpu")
    torch.testing.assert_close(broadcast.forward(image, text, scale), product.forward(image, text, scale))
    # A rank's block of rows; the loss of its own pairs.
    scores = image[:6] @ text.t()
    expected = contrastive_loss(scores, scores, scale, first=0)
    torch.testing.assert_close(ours.forward(image[:6], text, scale), expected)
    assert global_loss is broadcast.forward.func


@pytest.fixture(scope="module")
def warm():
    """Workspaces that libraries take once."""
    for implementation in implementations(allocations.SMALL).values():
        allocations.run(implementation, "cpu", backward=True)


@pytest.fixture
def by_operators():
    """The op by PyTorch's operators, as on a GPU."""
    with without_kernels():
        yield


@pytest.mark.parametrize("key", implementations(SMALL), ids=" ".join)
def test_predicted_is_what_the_allocator_reports(warm, by_operators, key):
    implementation = implementations(SMALL)[key]
    predicted = allocations.predict(implementation)
    assert predicted.largest == claims(SMALL)[key[0]].stored[key[1]]
    if "E3 materialised" in " ".join(key):  # the 16-bit product takes a workspace of its own, here the largest
        inputs = implementation.inputs("cpu")
        assert predicted.largest in cpu_sizes(lambda: implementation.forward(*inputs))
    else:
        assert predicted == allocations.run(implementation, "cpu", backward=True)


@pytest.mark.parametrize("name", ["materialised", "ours"])
def test_forward_alone(warm, name):
    implementation = implementations(replace(SMALL, B=64))["E2", name]
    both = allocations.run(implementation, "cpu", backward=True)
    forward = allocations.run(implementation, "cpu", backward=False)
    assert (forward.passes, both.passes) == ("forward", "forward and backward")
    assert forward.largest == both.largest
    assert forward == allocations.predict(implementation, backward=False)


def test_backend_of_a_gpu_is_predicted_without_one():
    pytest.importorskip("triton")
    implementation = implementations(Setting(), "triton")["E2", "ours"]
    # 64 MiB hold what 48 images leave for 512 texts: each token's best similarity in 7 blocks of patches, in fp32.
    assert allocations.predict(implementation).largest == 48 * 512 * 7 * 64 * 4


def test_sizes_of_a_recorded_history():
    trace = [
        {"action": "segment_alloc", "size": 2097152},
        {"action": "alloc", "size": 100},
        {"action": "alloc", "size": 300},
        {"action": "free_requested", "size": 100},
        {"action": "free_completed", "size": 100},
        {"action": "alloc", "size": 250},
    ]
    sizes = allocations.trace_sizes(trace)
    assert sizes == [100, 300, -100, 250]
    assert allocations.summarise(sizes, None) == allocations.Allocations(300, 550, "forward")
    assert allocations.summarise(sizes, [700]) == allocations.Allocations(300, 1250, "forward and backward")
