"""What is compared computes the same thing, and its predicted allocations are the allocator's."""

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from ds_cmli.cmli.reference import cmli_scores_reference
from ds_cmli.losses.target_cmli import match_patches
from ds_cmli.memory_model import gpus
from profiling.memory.estimates import Setting, claims
from profiling.memory.implementations import (
    broadcast_match,
    broadcast_scores,
    implementations,
    materialised_match,
    predict,
    run,
)
from profiling.speed.op import cpu_sizes, materialised_scores

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
    image, text, _, scale = inputs = broadcast.inputs("cpu")
    torch.testing.assert_close(broadcast.forward(*inputs), product.forward(*inputs))
    # A rank's block of rows; the loss of its own pairs.
    scores = image[:6] @ text.t()
    logits, own = scale.exp() * scores, torch.arange(6)
    expected = (F.cross_entropy(logits, own) + F.cross_entropy(logits.t()[:6], own)) / 2
    torch.testing.assert_close(ours.forward(image[:6], text, _, scale), expected)


@pytest.fixture(scope="module")
def warm():
    """Workspaces that libraries take once."""
    for implementation in implementations(Setting(2, 1, 4, 4, 8, 8)).values():
        list(run(implementation, "cpu", backward=True))


@pytest.mark.parametrize("key", implementations(SMALL), ids=" ".join)
def test_predicted_is_what_the_allocator_reports(warm, key):
    implementation = implementations(SMALL)[key]
    forward, whole = predict(implementation)
    assert forward.largest == whole.largest == claims(SMALL)[key[0]].stored.get(key[1], whole.largest)
    if "E3 materialised" in " ".join(key):  # the 16-bit product takes a workspace of its own, here the largest
        inputs = implementation.inputs("cpu")
        assert whole.largest in cpu_sizes(lambda: implementation.forward(*inputs))
    else:
        assert list(run(implementation, "cpu", backward=True))[-1] == whole


@pytest.mark.parametrize(("gpu", "backend"), [("T4", "torch"), ("H100 80GB", "triton")])
def test_the_op_of_a_gpu_is_predicted_without_one(gpu, backend):
    one = implementations(SMALL, backend)["E2", "ours"]
    forward, whole = predict(one, gpus.find(gpu))
    assert 0 < forward.largest < forward.peak <= whole.peak


@pytest.mark.parametrize("name", ["materialised", "ours"])
def test_forward_alone(warm, name):
    implementation = implementations(replace(SMALL, B=64))["E2", name]
    forward, whole = predict(implementation)
    assert list(run(implementation, "cpu", backward=True)) == [forward, whole]
    assert list(run(implementation, "cpu", backward=False)) == [forward]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_the_op_of_a_cpu_is_predicted_as_it_is_measured(warm, backend):
    """With its compiled kernels, and by PyTorch's operators."""
    one = implementations(Setting(B=24, P=2, N=49, M=16, H=32, D=64))["E2", "ours"]
    one = replace(one, function=partial(one.function, backend=backend))
    assert tuple(run(one, "cpu", True)) == predict(one)
