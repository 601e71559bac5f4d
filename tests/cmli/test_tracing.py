"""The op under what traces programs: the program computes what the op does, and its gradients."""

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

from ds_cmli.cmli import CMLILoss, cmli_scores

GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.randn(3, 20, 8, generator=GENERATOR)
TEXT = torch.randn(3, 6, 8, generator=GENERATOR)
MASK = torch.arange(6) < torch.tensor([[2], [6], [0]])


class Compared(nn.Module):
    """Projected features, compared by a function or a loss."""

    def __init__(self, compare):
        super().__init__()
        torch.manual_seed(0)
        self.projection = nn.Linear(8, 8)
        self.compare = compare

    def forward(self, image, text, mask):
        return self.compare(self.projection(image), self.projection(text), mask)


def scores(*sides) -> torch.Tensor:
    return torch.stack(cmli_scores(*sides))


MODULES = [Compared(scores), Compared(CMLILoss())]


def with_gradient(module) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the module's output, and the gradient of the sum of its squares."""
    out = module(IMAGE, TEXT, MASK)
    (gradient,) = torch.autograd.grad(out.square().sum(), module.projection.weight)
    return out, gradient


@pytest.mark.parametrize("module", MODULES, ids=["scores", "loss"])
def test_an_exported_program_computes_and_trains_as_the_module(module):
    exported = torch.export.export(module, (IMAGE, TEXT, MASK), strict=False).module()
    # Sums are in another order.
    assert_close(with_gradient(exported), with_gradient(module), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("module", MODULES, ids=["scores", "loss"])
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_make_fx_records_scores_losses_and_their_gradients(module, mode):
    def gradient(image, text, mask):
        image = image.detach().requires_grad_()
        out = module(image, text, mask)
        return out, *torch.autograd.grad(out.square().sum(), (image, module.projection.weight))

    traced = make_fx(gradient, tracing_mode=mode, _allow_non_fake_inputs=True)(IMAGE, TEXT, MASK)
    other_inputs = 2 * IMAGE, -TEXT, ~MASK  # values that the trace has not seen
    assert_close(traced(*other_inputs), gradient(*other_inputs))


@pytest.mark.slow
@pytest.mark.parametrize("module, without_a_break", [(MODULES[0], True), (MODULES[1], False)], ids=["scores", "loss"])
def test_a_compiled_module_computes_and_trains(module, without_a_break):
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=without_a_break)
    assert_close(with_gradient(compiled), with_gradient(module))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_computes_each_batch():
    images = torch.stack([IMAGE, 2 * IMAGE])
    s_i2t, _ = torch.vmap(lambda image: cmli_scores(image, TEXT, MASK))(images)
    assert_close(s_i2t, torch.stack([cmli_scores(image, TEXT, MASK)[0] for image in images]))
