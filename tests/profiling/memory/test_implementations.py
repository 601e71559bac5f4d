"""What is compared computes the same thing, and its predicted allocations are the allocator's."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.losses.target_cmli import match_patches
from profiling.memory import implementations as allocations
from profiling.memory.estimates import Setting, claims
from profiling.memory.implementations import (
    broadcast_match,
    broadcast_scores,
    cpu_sizes,
    global_loss,
    implementations,
    materialised_match,
    materialised_scores,
)

SMALL = Setting(B=6, P=2, N=9, M=7, H=32, D=16)


@pytest.mark.parametrize("scores", [broadcast_scores, materialised_scores])
def test_scores_and_gradients_are_the_reference_s(scores):
    image, text = torch.randn(3, 6, 8).double(), torch.randn(5, 4, 8).double()
    case = image, text, torch.arange(4) < torch.tensor([4, 1, 3, 2, 4])[:, None]
    upstream = [torch.randn(3, 5).double() for _ in range(2)]

    def results(function):
        image, text = case[0].clone().requires_grad_(), case[1].clone().requires_grad_()
        result = function(image, text, case[2])
        return [*result, *torch.autograd.grad(result, (image, text), upstream)]

    for ours, theirs in zip(results(scores), results(cmli_scores_reference), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_matches_agree():
    # Products of small integers are exact in fp16, and no two patches of an image are equally good.
    patches = torch.eye(9, 16).half().expand(2, 9, 16)
    tokens = torch.zeros(2, 4, 16, dtype=torch.float16)
    best = torch.tensor([[3, 0, 8, 5], [1, 1, 7, 2]])
    tokens.scatter_(2, best[..., None], 2.0)
    for match in (broadcast_match, materialised_match, match_patches):
        assert match(tokens, patches).equal(best)


def test_global_losses_agree():
    broadcast, product, ours = (implementations(SMALL)["E1", n] for n in ("broadcast", "materialised", "ours"))
    image, text, scale = broadcast.inputs("cpu")
    torch.testing.assert_close(broadcast.forward(image, text, scale), product.forward(image, text, scale))
    # A rank's block of rows; the loss of its own pairs.
    scores = image[:6] @ text.t()
    logits, own = scale.exp() * scores, torch.arange(6)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t()[:6], own)) / 2
    torch.testing.assert_close(ours.forward(image[:6], text, scale), expected)
    assert global_loss is broadcast.forward.func


@pytest.fixture(scope="module")
def warm():
    """Workspaces that libraries take once."""
    for implementation in implementations(allocations.SMALL).values():
        allocations.run(implementation, "cpu", backward=True)


@pytest.mark.parametrize("key", implementations(SMALL), ids=" ".join)
def test_predicted_is_what_the_allocator_reports(warm, key):
    implementation = implementations(SMALL)[key]
    predicted = allocations.predict(implementation)
    if not implementation.op:
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
